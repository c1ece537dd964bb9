# shellcheck shell=bash disable=SC2034
# What scripts/demo, scripts/test and scripts/check share: Debian packages, .venv and the test guest, each made only when
# missing. To be sourced by bash, with `set -euo pipefail` in force. Afterwards $root is the repository and the current folder.

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
cd -- "$root"

base_packages=(python3-venv python3-dev gcc libc6-dev pkg-config libfuse3-dev fuse3)
guest_packages=(qemu-system-x86 qemu-utils cpio busybox-static e2fsprogs)
test_packages=(fio xfsprogs attr rsync tar nbdkit nbd-server nginx-light xz-utils iproute2)

say() { printf '%s\n' "$*" >&2; }
die() {
    printf '%s: %s\n' "${0##*/}" "$*" >&2
    exit 1
}

# as_root COMMAND...: as root already, or through sudo, which may ask for the password.
as_root() {
    if [ "$(id -u)" = 0 ]; then
        "$@"
    else
        sudo -- "$@"
    fi
}

may_become_root() { [ "$(id -u)" = 0 ] || command -v sudo >/dev/null; }

# apt_lists: apt-get update, once in a run.
apt_updated=
apt_lists() {
    [ -z "$apt_updated" ] || return 0
    apt_updated=yes
    say "apt-get update ..."
    as_root apt-get update -qq >&2 || say "apt-get update failed; trying with the package lists that are here"
}

# need PACKAGE...: installs those that are missing.
need() {
    command -v dpkg-query >/dev/null || {
        say "This is not Debian: make sure that you have what Debian calls: $*"
        return 0
    }
    local package installed missing=()
    installed=$(dpkg-query -W -f='${db:Status-Abbrev}${Package}\n' "$@" 2>/dev/null) || true
    for package; do
        [[ $'\n'$installed$'\n' == *$'\nii '"$package"$'\n'* ]] || missing+=("$package")
    done
    [ ${#missing[@]} -gt 0 ] || return 0
    may_become_root || die "missing packages, and there is no sudo. As root: apt-get install --no-install-recommends ${missing[*]}"
    apt_lists
    say "apt-get install ${missing[*]} ..."
    local log
    log=$(mktemp)
    if ! as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" >"$log" 2>&1; then
        tail -n 15 "$log" >&2
        rm -f -- "$log"
        die "apt-get install failed (above). See to it, then run this again; nothing done so far is lost"
    fi
    rm -f -- "$log"
}

# find_python: sets $system_python, a Python >= 3.11 that can compile pyfuse3. Debian's own first: python3-dev is its.
find_python() {
    local candidate
    for candidate in /usr/bin/python3 python3 python3.13 python3.12 python3.11; do
        if "$candidate" -c 'import os, sys, sysconfig, venv
sys.exit(sys.version_info < (3, 11) or not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")))' 2>/dev/null; then
            system_python=$(command -v "$candidate")
            return
        fi
    done
    die "no Python >= 3.11 with venv and Python.h: on Debian 12, apt-get install python3-venv python3-dev"
}

# make_venv runtime|EXTRA: .venv with cachefs installed from this tree, alone or with an extra of pyproject.toml.
# Made anew when the interpreter or the place of the tree changed, filled again when pyproject.toml did. Sets $python.
make_venv() {
    local extra=$1 made_by installed folder what
    python=$root/.venv/bin/python
    find_python
    made_by="$("$system_python" -VV) $system_python $root"
    installed=$(sha256sum <pyproject.toml)
    mkdir -p .build || die "cannot write to $root"
    for folder in .build .venv; do
        [ ! -e $folder ] || [ -w $folder ] || die "$root/$folder belongs to $(stat -c %U $folder): remove it, or be that user"
    done
    (
        # two scripts at once: the second waits, and finds it done
        flock 9
        if [ "$(cat .venv/made-by 2>/dev/null)" != "$made_by" ]; then
            say "making .venv ..."
            rm -rf .venv
            "$system_python" -m venv .venv >&2 || die "python -m venv failed (above)"
            printf '%s\n' "$made_by" >.venv/made-by
        fi
        # what was installed with an extra has the runtime too
        if [ "$extra" = runtime ] && [ "$(cat .venv/installed-dev 2>/dev/null)" = "$installed" ]; then exit 0; fi
        if [ "$(cat ".venv/installed-$extra" 2>/dev/null)" = "$installed" ]; then exit 0; fi
        say "installing cachefs and what it needs into .venv (compiles pyfuse3, about a minute) ..."
        [ "$extra" = runtime ] && what=. || what=".[$extra]"
        .venv/bin/python -m pip install --quiet --quiet --disable-pip-version-check --editable "$what" >&2 ||
            die "pip install failed (above). See to it, then run this again"
        printf '%s\n' "$installed" >".venv/installed-$extra"
    ) 9>.build/setup.lock
}

# make_guest: the kernel and initramfs of the test guest in .build/guest. Needs make_venv and $guest_packages.
make_guest() {
    [ -d .build/guest/kernels ] ||
        say "downloading a kernel for the test guest (27 MB, unpacked into .build/guest, not installed) ..."
    ! "$python" -m cachefs.testing.guest build .build/guest >/dev/null 2>&1 || return 0
    # most likely apt has no package lists, as in a fresh image, or old ones
    ! may_become_root || apt_lists
    "$python" -m cachefs.testing.guest build .build/guest || die "the test guest could not be made (above)"
}

# need_fuse: a clear word before a hundred failures.
need_fuse() {
    [ -e /dev/fuse ] || as_root modprobe fuse 2>/dev/null || true
    [ -e /dev/fuse ] || die "there is no /dev/fuse: load the module fuse, or start the container with --device /dev/fuse --cap-add SYS_ADMIN"
    # udev makes it so on Debian; a container without udev may have it for root alone
    [ -r /dev/fuse ] && [ -w /dev/fuse ] ||
        die "/dev/fuse is not open to user $(id -un): be root, or have root run 'chmod 666 /dev/fuse'"
    # fusermount3 looks there when a user unmounts; systemd makes it at boot, a bare debootstrap has none
    if [ "$(id -u)" != 0 ] && ! [ -e /etc/mtab ]; then
        say "making the link /etc/mtab, which fusermount3 needs ..."
        as_root ln -s ../proc/self/mounts /etc/mtab || die "as root: ln -s ../proc/self/mounts /etc/mtab"
    fi
}

# unmount_below FOLDER: takes down every mount and loop device below it, however its server is.
unmount_below() {
    local below=$1 mountpoint device file
    # mountinfo writes a space as \040; the last mounted comes first
    while IFS= read -r mountpoint; do
        mountpoint=$(printf '%b' "${mountpoint//\\/\\0}")
        case $mountpoint in
        "$below" | "$below"/*) umount -l -- "$mountpoint" 2>/dev/null || fusermount3 -u -z -q -- "$mountpoint" || true ;;
        esac
    done < <(awk '{ print $5 }' /proc/self/mountinfo | tac)
    [ "$(id -u)" = 0 ] && command -v losetup >/dev/null || return 0
    while read -r device file; do
        case $file in "$below"/*) losetup -d "$device" 2>/dev/null || true ;; esac
    done < <(losetup --list --noheadings --output NAME,BACK-FILE 2>/dev/null)
}

# marked MARK: the pids with CACHEFS_RUN=MARK in their environment: what this run has started, also what went into the
# background, and nothing else. A zombie has no environment any more.
marked() {
    local environ
    for environ in $(env -u CACHEFS_RUN grep -lszxF -e "CACHEFS_RUN=$1" /proc/[0-9]*/environ || true); do
        environ=${environ%/environ}
        echo "${environ#/proc/}"
    done
}

# end_marked MARK FOLDER: ends what the run has started, gently first, and takes down what it mounted below FOLDER.
end_marked() {
    local signal tries pids
    for signal in TERM KILL; do
        pids=$(marked "$1")
        [ -n "$pids" ] || break
        # shellcheck disable=SC2086 # a list of numbers
        kill -$signal $pids 2>/dev/null || true
        for tries in {1..30}; do
            [ -n "$(marked "$1")" ] || break 2
            sleep 0.1
        done
    done
    unmount_below "$2"
}

# run_interruptibly COMMAND...: runs it so that Ctrl-C and SIGTERM reach it, as SIGINT, and waits for its own end.
# The shell alone would leave SIGTERM lying until COMMAND has ended, and start background work deaf to SIGINT.
run_interruptibly() {
    local child code=0
    env --default-signal=INT -- "$@" <&0 &
    child=$!
    trap 'kill -INT "$child" 2>/dev/null || true' TERM HUP
    # the terminal sends Ctrl-C to the child as well
    trap : INT
    while :; do
        wait "$child" && code=0 || code=$?
        kill -0 "$child" 2>/dev/null || break
    done
    trap - TERM HUP INT
    return "$code"
}
