#!/usr/bin/env bash
# Makes .guest: a Debian kernel with soft-RoCE (rdma_rxe) and an initial file system for it, 80 MB to download.
# Quick when nothing changed. The guest's root is the host's own, so that nothing is installed in it.
set -euo pipefail
cd -P "$(dirname "${BASH_SOURCE[0]}")/../.."

readonly guest=$PWD/.guest
readonly here=$PWD/scripts/rdma
# crc32_generic: without it rxe says "failed to init crc32".
readonly modules=(
    virtio_pci 9pnet_virtio 9p overlay virtio_net veth dummy sch_netem
    crc32_generic crc32_pclmul rdma_rxe ib_uverbs rdma_ucm
)

mkdir -p "$guest"
exec {lock}>"$guest/lock"
flock "$lock"
digest=$(cat "$here/build_guest.sh" "$here/init" | sha256sum)
[[ -f $guest/stamp && $(<"$guest/stamp") == "$digest" ]] && exit
rm -rf "$guest"/{stamp,kernel,kernel.new,initrd,initrd.img}

# The kernel that Debian's meta package names: its modules and its image.
download() {
    (cd "$guest" && rm -f "$1"_*.deb && apt-get -qq download "$1" >"$guest/log" 2>&1)
}
fetch() {
    download "$1" && return
    if ((EUID == 0)); then apt-get -qq update; else sudo -n apt-get -qq update 2>/dev/null || true; fi
    download "$1" || {
        tail -n 5 "$guest/log" >&2
        echo "rdma: cannot download Debian's package $1" >&2
        exit 1
    }
}
echo "rdma: downloads a kernel with soft-RoCE into .guest"
fetch linux-image-amd64
image=$(dpkg-deb -f "$guest"/linux-image-amd64_*.deb Depends | grep -o 'linux-image-[^ ,]*-amd64' | head -n 1)
fetch "$image"
dpkg-deb -x "$guest/$image"_*.deb "$guest/kernel.new"
rm -f "$guest"/*.deb
release=$(ls "$guest/kernel.new/lib/modules")
PATH=$PATH:/usr/sbin:/sbin
depmod -b "$guest/kernel.new" "$release"

root=$guest/initrd
mkdir -p "$root"/{bin,proc,sys,dev,host,memory,modules,root}
cp /bin/busybox "$root/bin/"
install -m 755 "$here/init" "$root/init"
for module in "${modules[@]}"; do
    modprobe -d "$guest/kernel.new" -S "$release" --show-depends "$module" | awk '$1 == "insmod" { print $2 }'
done | awk '!seen[$0]++' >"$guest/modules"
while read -r path; do
    cp "$path" "$root/modules/"
    basename "$path"
done <"$guest/modules" >"$root/modules/order"
(cd "$root" && find . | cpio -o -H newc --quiet | zstd -3 -q -f -o "$guest/initrd.img")
cp "$guest/kernel.new/boot/vmlinuz-$release" "$guest/vmlinuz"
rm -rf "$root" "$guest/kernel.new" "$guest/modules"
printf '%s\n' "$digest" >"$guest/stamp"
