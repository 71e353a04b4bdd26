#!/bin/sh
# dom0 of the lab: starts the toolstack, then obeys lines "NUMBER COMMAND" from the port "lab".
export PATH=/usr/lib/xen-4.17/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/ TERM=dumb
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mkdir -p /dev/pts
mount -t devpts pts /dev/pts
mount -t tmpfs run /run
mount -t tmpfs -o size=90% tmp /tmp
mkdir -p /run/xen /run/xenstored /run/lock /var/lib/xenstored
# Hotplug scripts and libxl expect these names.
ln -s /proc/self/fd /dev/fd
ln -s fd/0 /dev/stdin
ln -s fd/1 /dev/stdout
ln -s fd/2 /dev/stderr
for module in $(cat /lib/modules/order); do
	case $module in
	brd.ko) insmod /lib/modules/$module rd_nr=2 rd_size=262144 ;;
	*) insmod /lib/modules/$module ;;
	esac
done
mount -t xenfs xenfs /proc/xen
xenstored --pid-file /run/xenstored.pid
xen-init-dom0 >/dev/null
xenconsoled --pid-file=/run/xenconsoled.pid --log=guest --log-dir=/var/log/xen
ip link set lo up

port=
for name in /sys/class/virtio-ports/*/name; do
	[ "$(cat $name)" = lab ] && port=/dev/$(basename $(dirname $name))
done
[ -n "$port" ] || { echo "lab: no port"; reboot -f; }
exec 3<>$port
echo "lab: ready $(cut -d' ' -f1 /proc/uptime)" >&3

# guest NAME: runs the domain of /run/NAME.cfg to its end, its console on the port line by line.
guest() {
	[ -p /run/$1.in ] || mkfifo /run/$1.in
	xl create -F -c /run/$1.cfg 2>/run/$1.xl <>/run/$1.in | while IFS= read -r line; do
		echo "$1| $line" >&3
	done
	code=$(sed -n 's/.*has shut down, reason code \([0-9]*\).*/\1/p' /run/$1.xl | tail -n 1)
	[ -n "$code" ] || sed "s/^/$1! /" /run/$1.xl >&3
	echo "lab: ended $1 ${code:-none}" >&3
}

# paused NAME: creates the domain of /run/NAME.cfg, paused; then as `guest`.
paused() {
	[ -p /run/$1.in ] || mkfifo /run/$1.in
	xl create -p /run/$1.cfg >/dev/null || return 1
	follow $1 <>/run/$1.in >/dev/null 2>&1 &
}
follow() {
	xl console -t pv $1 | while IFS= read -r line; do
		echo "$1| $line" >&3
	done
	echo "lab: ended $1 none" >&3
}

# attach NAME: as `guest`, but the port is the guest's console, byte by byte, until it ends.
attach() {
	xl create -F -c /run/$1.cfg 2>/run/$1.xl <&3 >&3
	code=$(sed -n 's/.*has shut down, reason code \([0-9]*\).*/\1/p' /run/$1.xl | tail -n 1)
	[ -n "$code" ] || cat /run/$1.xl >&3
	echo >&3
	echo "lab: ended $1 ${code:-none}" >&3
}

while read -r number command <&3; do
	(eval "$command") </dev/null >/tmp/output 2>&1
	status=$?
	cat /tmp/output >&3
	[ -z "$(tail -c 1 /tmp/output)" ] || echo >&3
	echo "lab: done $number $status" >&3
done
reboot -f
