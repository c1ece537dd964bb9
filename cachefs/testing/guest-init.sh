#!/bin/busybox sh
# /init of the test guest (built by cachefs.testing.guest): its root file system is the ext4 on /dev/vda.
#
# guest=check   mounts read-only and checks the digests of the files in /manifest
# guest=boot    the same read-write; then checks what earlier boots wrote, writes, syncs, reads it back, trims
# guest=fill    the same as check, then leaves 32 MiB in /scratch, which the next guest=boot removes and trims
# guest=churn   the same as check, then writes 200 MiB, deletes them and trims
#
# What matters stands in lines that begin with "GUEST". The last one is "GUEST done" or "GUEST FAILED: why".

/bin/busybox --install -s /bin
export PATH=/bin

finish() {
    poweroff -f
    sleep 60
}

fail() {
    dmesg | tail -n 8
    echo "GUEST FAILED: $*"
    finish
}

# The files of a checksum list, read from the disk rather than from the page cache.
verify() {
    (cd "$1" && sha256sum -c -s "$2") && return
    (cd "$1" && sha256sum -c "$2" 2>/dev/null) | grep -v ': OK$'
    return 1
}

drop_caches() {
    sync
    echo 3 >/proc/sys/vm/drop_caches
}

# From here to the end of the file system: what the scenarios share.
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev

scenario=boot
for word in $(cat /proc/cmdline); do
    case $word in guest=*) scenario=${word#guest=} ;; esac
done

while read -r module; do
    insmod "/modules/$module.ko" || fail "insmod $module"
done </modules/order

tries=0
until [ -b /dev/vda ]; do
    tries=$((tries + 1))
    [ $tries -lt 100 ] || fail "no /dev/vda after 5 s"
    sleep 0.05
done
echo "GUEST $scenario: Linux $(uname -r), /dev/vda has $(($(cat /sys/block/vda/size) * 512)) bytes"

mode=rw
[ "$scenario" = check ] && mode=ro
mount -t ext4 -o "$mode" /dev/vda /mnt || fail "cannot mount /dev/vda"
verify /mnt manifest || fail "files of the base have the wrong contents"
echo "GUEST digests ok $(wc -l </mnt/manifest) files"

case $scenario in
check) ;;

fill)
    mkdir -p /mnt/scratch
    dd if=/dev/urandom of=/block bs=1M count=4 2>/dev/null
    for i in 1 2 3 4 5 6 7 8; do
        dd if=/block of=/mnt/scratch/$i bs=1M conv=fsync 2>/dev/null || fail "writing /scratch/$i"
    done
    echo "GUEST filled $((8 * 4)) MiB"
    ;;

churn)
    mkdir -p /mnt/churn
    dd if=/dev/urandom of=/block bs=1M count=4 2>/dev/null
    i=1
    while [ $i -le 50 ]; do
        dd if=/block of=/mnt/churn/$i bs=1M conv=fsync 2>/dev/null || fail "writing /churn/$i"
        i=$((i + 1))
    done
    echo "GUEST wrote $((50 * 4)) MiB"
    rm -rf /mnt/churn
    sync
    trimmed=$(fstrim -v /mnt) || fail "fstrim: $trimmed"
    echo "GUEST trimmed $(echo "$trimmed" | tr -cd '0-9') bytes"
    drop_caches
    verify /mnt manifest || fail "files of the base have changed after fstrim"
    ;;

boot)
    before=0
    [ -f /mnt/boots ] && read -r before </mnt/boots
    boot=$((before + 1))
    i=1
    while [ $i -le "$before" ]; do
        verify /mnt/written $i.sha256 || fail "what boot $i wrote has changed"
        i=$((i + 1))
    done
    [ "$(wc -l </mnt/boots.log)" -eq $boot ] || fail "boots.log has $(wc -l </mnt/boots.log) lines before boot $boot"
    if [ "$before" -eq 0 ]; then before=nothing; else before=ok; fi
    echo "GUEST boot $boot, wrote before: $before"

    mkdir -p /mnt/written
    dd if=/dev/urandom of=/mnt/written/$boot bs=64k count=32 conv=fsync 2>/dev/null || fail "writing /written/$boot"
    (cd /mnt/written && sha256sum $boot >$boot.sha256) || fail "writing /written/$boot.sha256"
    echo "boot $boot" >>/mnt/boots.log || fail "appending to boots.log"
    echo "$boot" >/mnt/boots || fail "writing /boots"
    drop_caches
    verify /mnt/written $boot.sha256 || fail "what this boot wrote reads back differently"
    echo "GUEST wrote and synced $((32 * 64)) KiB"

    rm -rf /mnt/scratch
    sync
    trimmed=$(fstrim -v /mnt) || fail "fstrim: $trimmed"
    echo "GUEST trimmed $(echo "$trimmed" | tr -cd '0-9') bytes"
    drop_caches
    verify /mnt manifest || fail "files of the base have changed after fstrim"
    verify /mnt/written $boot.sha256 || fail "what this boot wrote has changed after fstrim"
    ;;

*) fail "no scenario '$scenario'" ;;
esac

umount /mnt || fail "cannot unmount"
echo "GUEST done"
finish
