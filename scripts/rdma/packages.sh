#!/usr/bin/env bash
# The Debian packages that RDMA without RDMA hardware needs: an emulator, what its initial file system is made with,
# and the verbs libraries and tools. Installs what is missing.
#
#   scripts/rdma/packages.sh    exit status 0: all are there; 3: this host cannot have them, and why is said
set -euo pipefail

readonly packages=(
    qemu-system-x86 busybox-static cpio kmod zstd
    rdma-core ibverbs-providers ibverbs-utils perftest python3-pyverbs
    libucx0 ucx-utils
)

cannot() {
    echo "rdma: $*" >&2
    exit 3
}

[[ $(uname -m) == x86_64 ]] || cannot "the guest is made for x86_64, and this is $(uname -m)"
command -v dpkg-query apt-get >/dev/null && grep -qx 'ID=debian' /etc/os-release ||
    cannot "the guest is made of Debian's packages, and this is $(. /etc/os-release && echo "$PRETTY_NAME")"

missing=()
for package in "${packages[@]}"; do
    [[ $(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null) == installed ]] || missing+=("$package")
done
((${#missing[@]})) || exit 0

sudo=()
if ((EUID != 0)); then
    sudo=(sudo -n)
    sudo -n true 2>/dev/null ||
        cannot "needs Debian packages; run: sudo apt-get update && sudo apt-get install -y ${missing[*]}"
fi
echo "rdma: installs ${missing[*]}"
"${sudo[@]}" apt-get -qq update
"${sudo[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends "${missing[@]}"
