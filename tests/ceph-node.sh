#!/usr/bin/env bash
# ceph-node.sh FOLDER: a Ceph cluster of this machine alone, for tests: one monitor and one OSD that keeps everything in
# memory, on 127.0.0.1, without authentication, with a pool named "pool". Nothing outside FOLDER is read or written.
#
# It returns when the pool can be used. FOLDER/ceph.conf is what clients want; FOLDER/*.pid are the two daemons, to be killed.
# Debian: apt-get install ceph-mon ceph-osd ceph-common qemu-block-extra
set -euo pipefail

folder=$(realpath -- "${1:?usage: ceph-node.sh FOLDER}")
port=$(python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
mkdir -p "$folder"/mon "$folder"/osd
new_uuid() { cat /proc/sys/kernel/random/uuid; }
cluster=$(new_uuid)

export CEPH_CONF=$folder/ceph.conf
cat >"$CEPH_CONF" <<END
[global]
fsid = $cluster
mon host = v2:127.0.0.1:$port
ms bind msgr1 = false
ms bind ipv6 = false
public addr = 127.0.0.1
cluster addr = 127.0.0.1
auth cluster required = none
auth service required = none
auth client required = none
ms cluster mode = crc
ms service mode = crc
ms client mode = crc
ms mon cluster mode = crc
ms mon service mode = crc
ms mon client mode = crc
keyring = $folder/keyring
log file = $folder/\$name.log
pid file = $folder/\$name.pid
run dir = $folder
admin socket =
crash dir = $folder
[mon]
mon data = $folder/mon
# a test machine's disk may be nearly full
mon data avail crit = 1
mon data avail warn = 2
mon allow pool size one = true
osd pool default size = 1
osd pool default min size = 1
[osd]
osd data = $folder/osd
osd objectstore = memstore
memstore device bytes = 1073741824
END

# within SECONDS COMMAND...: until COMMAND succeeds
within() {
    local ends=$((SECONDS + $1))
    shift
    until "$@" >/dev/null 2>&1; do
        [ $SECONDS -lt $ends ] || { echo "not within the time: $*" >&2; exit 1; }
        sleep 0.1
    done
}

# authentication is off, and the daemons want their keys all the same
ceph-authtool --create-keyring "$folder/keyring" --gen-key -n mon. --cap mon 'allow *' >/dev/null
ceph-authtool "$folder/keyring" --gen-key -n client.admin --cap mon 'allow *' --cap osd 'allow *' >/dev/null
monmaptool --create --fsid "$cluster" --addv a "[v2:127.0.0.1:$port]" "$folder/monmap" >/dev/null
ceph-mon --mkfs -i a --monmap "$folder/monmap" --keyring "$folder/keyring"
ceph-mon -i a
within 30 timeout 5 ceph -s

osd=$(new_uuid)
ceph osd new "$osd" >/dev/null
ceph-osd -i 0 --mkfs --osd-uuid "$osd" >/dev/null 2>&1
ceph-osd -i 0 >/dev/null
is_up() { ceph osd stat | grep -q '1 up'; }
within 60 is_up
ceph osd crush add osd.0 1 root=default host=node >/dev/null 2>&1
ceph osd crush rule create-simple alone default osd >/dev/null 2>&1 || true
ceph osd pool create pool 8 8 replicated alone >/dev/null 2>&1
ceph osd pool application enable pool rbd >/dev/null 2>&1
within 60 timeout 10 rbd create --size 1M pool/probe
