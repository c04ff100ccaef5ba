#!/usr/bin/env bash
# Runs a command in a guest that has soft-RoCE devices, in this checkout, and ends with its exit status.
#
#   scripts/rdma/run_guest.sh [--seconds 420] [--share DIR] COMMAND...
#
# In the guest the host's files are read-only (what is written is forgotten), and $GUEST_SHARE is DIR, where both write.
# No output, no network. Exit status 124: not done in time; 125: the guest ended without a word from the command.
set -euo pipefail
here=$(cd -P "$(dirname "${BASH_SOURCE[0]}")" && pwd)
cd "$here/../.."
readonly guest=$PWD/.guest

seconds=420
share=
while [[ ${1-} == --* ]]; do
    case $1 in
        --seconds) seconds=$2 ;;
        --share) share=$(realpath "$2") ;;
        *)
            echo "$0: unknown option $1" >&2
            exit 2
            ;;
    esac
    shift 2
done
"$here/build_guest.sh"

if [[ -z $share ]]; then
    share=$(mktemp -d)
    trap 'rm -rf "$share"' EXIT
fi
rm -f "$share/status"
cat >"$share/main" <<MAIN
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root TERM=dumb LC_ALL=C.UTF-8
export GUEST_SHARE=/media KVRDMA_IN_GUEST=1
cd $(printf %q "$PWD") && scripts/rdma/devices.sh && echo "guest: up after \$(cut -d ' ' -f 1 /proc/uptime) s" &&
    touch /media/up && $(printf '%q ' "$@")
echo \$? >/media/status
sync
MAIN

# boot ACCELERATOR SECONDS
boot() {
    rm -f "$share/up"
    timeout --foreground "$2" qemu-system-x86_64 -accel "$1" -cpu max -M pc -nodefaults -no-reboot -display none \
        -serial stdio -m "${KVRDMA_GUEST_MEMORY:-4096}" -smp "${KVRDMA_GUEST_CPUS:-2}" \
        -kernel "$guest/vmlinuz" -initrd "$guest/initrd.img" \
        -append "console=ttyS0 panic=-1 quiet loglevel=4 mitigations=off" \
        -fsdev local,id=host,path=/,security_model=none,readonly=on,multidevs=remap \
        -device virtio-9p-pci,fsdev=host,mount_tag=host \
        -fsdev local,id=share,path="$share",security_model=none -device virtio-9p-pci,fsdev=share,mount_tag=share \
        </dev/null | sed -u 's/\r$//'
}

# KVM where it boots this kernel (some hosts have a /dev/kvm that boots none), else emulation: 10 to 50 times slower.
kvm_works() {
    [[ -w /dev/kvm ]] || return 1
    if [[ ! -f $guest/kvm ]]; then
        local probe
        probe=$(mktemp -d)
        printf 'touch /media/up\n' >"$probe/main"
        share=$probe boot kvm 20 >/dev/null 2>&1 || true
        [[ -f $probe/up ]] && echo yes >"$guest/kvm" || echo no >"$guest/kvm"
        rm -rf "$probe"
    fi
    [[ $(<"$guest/kvm") == yes ]]
}

accelerator=tcg,thread=multi
if kvm_works; then accelerator=kvm; fi
echo "rdma: boots a guest (${accelerator%%,*}), for at most $seconds s"
status=0
boot "$accelerator" "$seconds" || status=$?
if [[ -f $share/status ]]; then exit "$(<"$share/status")"; fi
if ((status == 124)); then
    echo "rdma: the guest was not done after $seconds s" >&2
    exit 124
fi
echo "rdma: the guest ended without a word from its command$([[ -f $share/up ]] || echo ', and was never up')" >&2
exit 125
