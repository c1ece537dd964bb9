#!/bin/bash
# systemd.sh FOLDER COMMAND...: run COMMAND beside a systemd manager of its own (systemd --user, found by XDG_RUNTIME_DIR), in a mount
# namespace of its own. Exit code 77: this machine does not let one run.
set -e
folder=$1
shift
export XDG_RUNTIME_DIR=$folder/run HOME=$folder
mkdir -m 700 "$XDG_RUNTIME_DIR"
prepare() {
    mount --make-rprivate /
    mount -t tmpfs none /run
    mkdir -p /run/systemd/system
    mount -t tmpfs none /sys/fs/cgroup
    mkdir /sys/fs/cgroup/systemd
    mount -t cgroup -o none,name=systemd,xattr none /sys/fs/cgroup/systemd
    mkdir "/sys/fs/cgroup/systemd/cachefs-test-$$"
    echo $$ >"/sys/fs/cgroup/systemd/cachefs-test-$$/cgroup.procs"
}
prepare || exit 77
/usr/lib/systemd/systemd --user --unit=basic.target &
manager=$!
trap 'kill $manager; wait $manager || true' EXIT
for _ in $(seq 100); do
    [ -S "$XDG_RUNTIME_DIR/systemd/private" ] && break
    kill -0 $manager || exit 77
    sleep 0.1
done
"$@"
