#!/bin/busybox sh
# First process of a guest: mounts the host's files under an overlay, moves there and runs the command.
# The machine ends whatever happens: the kernel panics when this process ends, and QEMU stops at a panic.
B=/bin/busybox
$B mount -t proc proc /proc
$B mount -t devtmpfs dev /dev
exec >/dev/ttyS0 2>&1
for module in /modules/*.ko; do $B insmod "$module" || echo "cannot load $module"; done
share=trans=virtio,version=9p2000.L,msize=512000
$B mount -t 9p -o ro,cache=loose,$share host /lower || echo "cannot mount the host's files"
$B mount -t tmpfs -o size=75% upper /upper
$B mkdir /upper/files /upper/work
$B mount -t overlay -o lowerdir=/lower,upperdir=/upper/files,workdir=/upper/work root /new || echo "cannot mount the overlay"

# The host's own kernel interfaces must not show through.
for place in dev proc run sys; do $B mkdir -p /new/$place; done
$B mount -t tmpfs run /new/run
$B mount -t sysfs sys /new/sys
$B mount -t cgroup2 cgroup2 /new/sys/fs/cgroup
$B mount -t bpf bpf /new/sys/fs/bpf
$B mount -t tracefs tracefs /new/sys/kernel/tracing
$B mkdir -p /new/run/guest
$B mount -t 9p -o $share guest /new/run/guest || echo "cannot mount the folder for results"
$B mount --move /dev /new/dev
$B mount --move /proc /new/proc
# Not a mere chroot: the kernel starts modprobe with the root of this process.
exec $B switch_root /new /bin/sh /run/guest/stage2.sh
