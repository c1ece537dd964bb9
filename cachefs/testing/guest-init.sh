#!/bin/busybox sh
# /init of the test guest (built by cachefs.testing.guest): its root file system is the ext4 on /dev/vda.
#
# guest=check   mounts read-only and checks the digests of the files in /manifest
# guest=boot    the same read-write; then checks what earlier boots wrote, writes, syncs, reads it back, trims
# guest=fill    the same as check, then leaves 32 MiB in /scratch, which the next guest=boot removes and trims
# guest=churn   the same as check, then writes 200 MiB, deletes them and trims
# guest=fio     fio, from the disk of tools on /dev/vdb, writes a file of 24 MiB past the page cache and compares it
# guest=load    writes, syncs and reads files on /dev/vda and on the ext4 of /dev/vdb, until a line comes from the console
# guest=errors  the same, without file systems: reads /dev/vda, writes its last 8 MiB and /dev/vdb, and says what fails
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

now() { # in units of 10 ms
    read -r up _ </proc/uptime
    echo "${up%.*}${up#*.}"
}

# say_done BEGAN WHAT: and how long it took, if that was a second
say_done() {
    took=$(($(now) - $1))
    shift
    echo "GUEST did $*"
    [ $took -lt 100 ] || echo "GUEST stalled $* for ${took}0 ms"
}

wait_for_console() {
    read -r _ </dev/console
    : >/stop
    wait
}

# part ROUND: what is written in that round, 1 MiB
part() { dd if=/block bs=64k count=16 skip=$(($1 % 48)) 2>/dev/null; }

# keep_writing DISK WRITER: four files in turn; each is synced, and compared a round later
keep_writing() {
    round=0
    until [ -f /stop ]; do
        round=$((round + 1))
        began=$(now)
        file=/$1/load/$2-$((round % 4))
        part $round | dd of="$file" bs=64k iflag=fullblock conv=fsync 2>/dev/null || fail "writing $file"
        echo $round >"/acknowledged/$1-$2-$((round % 4))"
        [ $round = 1 ] || part $((round - 1)) | cmp - "/$1/load/$2-$(((round - 1) % 4))" || fail "$file: wrong"
        say_done "$began" "write $1-$2 $round"
    done
}

keep_reading() {
    round=0
    until [ -f /stop ]; do
        round=$((round + 1))
        began=$(now)
        echo 3 >/proc/sys/vm/drop_caches
        verify /mnt manifest || fail "files of the base: wrong, or not to be read"
        say_done "$began" "read mnt $round"
    done
}

# keep_trying NAME FUNCTION ARGUMENT...: calls FUNCTION ROUND ARGUMENT... for ever, and says how long failed ones took
keep_trying() {
    name=$1 function=$2
    shift 2
    round=0
    until [ -f /stop ]; do
        round=$((round + 1))
        began=$(now)
        if "$function" $round "$@"; then
            say_done "$began" "$name $round"
        else
            echo "GUEST error $name $round after $((($(now) - began) * 10)) ms"
            sleep 0.2
        fi
    done
}

# write_blocks ROUND DISK WRITER START: 64 KiB, one of four places; what is under way is not acknowledged
write_blocks() {
    place=$(($4 + $3 * 4 + $1 % 4))
    rm -f "/acknowledged/$2-$place"
    part "$1" | dd of="/dev/$2" bs=64k count=1 seek=$place iflag=fullblock oflag=direct conv=fsync,notrunc 2>/dev/null || return
    echo "$1" >"/acknowledged/$2-$place"
}

# At a pace of its own: where nothing else goes on, as many as could be would be another load than beside the others.
write_blocks_in_peace() {
    sleep 0.05
    write_blocks "$@"
}

read_blocks() { dd if=/dev/vda of=/dev/null bs=64k count=4 skip=$((($1 * 4) % 512)) iflag=direct 2>/dev/null; }

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
case $scenario in check | errors) mode=ro ;; esac
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

fio)
    mkdir -p /tools
    mount -t ext4 -o ro /dev/vdb /tools || fail "cannot mount /dev/vdb"
    /tools/lib/ld-linux-x86-64.so.2 --library-path /tools/lib /tools/tool --name=job --filename=/mnt/fio --thread \
        --rw=randrw --bsrange=512-64k --size=24m --io_size=36m --direct=1 --ioengine=libaio --iodepth=16 --fsync=64 \
        --verify=crc32c --verify_fatal=1 --verify_state_save=0 --output=/fio.txt || {
        cat /fio.txt
        fail "fio found wrong bytes or an error"
    }
    echo "GUEST fio: $(grep -c 'err= 0' /fio.txt) job without an error"
    umount /tools
    drop_caches
    verify /mnt manifest || fail "files of the base have changed beside fio"
    ;;

load)
    mkdir -p /second /acknowledged /mnt/load
    mount -t ext4 /dev/vdb /second || fail "cannot mount /dev/vdb"
    mkdir -p /second/load
    dd if=/dev/urandom of=/block bs=1M count=4 2>/dev/null
    for disk in mnt second; do
        for writer in 1 2; do keep_writing $disk $writer & done
    done
    keep_reading &
    wait_for_console
    drop_caches
    for name in $(ls /acknowledged); do
        read -r round <"/acknowledged/$name"
        part "$round" | cmp - "/${name%%-*}/load/${name#*-}" || fail "$name: what was acknowledged is not there"
    done
    echo "GUEST right $(ls /acknowledged | wc -l) files"
    dmesg | grep -E 'I/O error|EXT4-fs (error|warning)' && fail "the kernel met an error"
    (cd /second && sha256sum load/* >load.sha256) || fail "writing /second/load.sha256"
    umount /second || fail "cannot unmount /second"
    ;;

errors)
    mkdir -p /acknowledged
    dd if=/dev/urandom of=/block bs=1M count=4 2>/dev/null
    tail=$(($(cat /sys/block/vda/size) / 128 - 128))
    for worker in 0 1; do
        keep_trying "write vda-$worker" write_blocks_in_peace vda $worker $tail &
        keep_trying "read vda-$worker" read_blocks &
    done
    for worker in 0 1 2 3 4 5; do
        keep_trying "write vdb-$worker" write_blocks vdb $worker 0 &
    done
    wait_for_console
    for name in $(ls /acknowledged); do
        read -r round <"/acknowledged/$name"
        part "$round" | head -c 65536 >/expected
        dd if="/dev/${name%-*}" bs=64k count=1 skip="${name#*-}" iflag=direct 2>/dev/null | cmp - /expected ||
            fail "$name: what was acknowledged is not there"
    done
    echo "GUEST right $(ls /acknowledged | wc -l) blocks"
    ;;

*) fail "no scenario '$scenario'" ;;
esac

umount /mnt || fail "cannot unmount"
echo "GUEST done"
finish
