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

# ended NAME LOG: tells how the domain ended, or what xl had against it.
ended() {
	code=$(sed -n 's/.*has shut down, reason code \([0-9]*\).*/\1/p' $2 | tail -n 1)
	[ -n "$code" ] || sed "s/^/$1! /" $2 >&3
	echo "lab: ended $1 ${code:-none}" >&3
}

# lines NAME: passes its input to the port, each line under the domain's name.
lines() {
	while IFS= read -r line; do
		echo "$1| $line" >&3
	done
}

# guest NAME: runs the domain of /run/NAME.cfg to its end, its console on the port line by line.
guest() {
	xl create -F -c /run/$1.cfg 2>/run/$1.xl | lines $1
	ended $1 /run/$1.xl
}

# paused NAME: creates the domain of /run/NAME.cfg, paused; then as `guest`.
paused() {
	xl create -p /run/$1.cfg >/dev/null || return 1
	(xl console -t pv $1 | lines $1; gone $1; ended $1 /var/log/xen/xl-$1.log) >/dev/null 2>&1 &
}

# gone NAME: waits until the domain is, which is after its console.
gone() {
	while xl domid $1 >/dev/null 2>&1; do sleep 0.1; done
}

destroy() {
	xl destroy $1
}

# attach NAME: as `guest`, but the port is the guest's console, byte by byte, until it ends.
attach() {
	if xl create -p /run/$1.cfg >/run/$1.xl 2>&1; then
		xl unpause $1
		xenconsole --interactive --type pv $(xl domid $1) <&3 >&3
		gone $1
		echo >&3
		ended $1 /var/log/xen/xl-$1.log
	else
		ended $1 /run/$1.xl
	fi
}

# typed NAME TEXT: puts text into the guest's console as if it had been typed there.
typed() {
	printf '%b' "$2" >$(xenstore-read /local/domain/$(xl domid $1)/console/tty)
}

while read -r number command <&3; do
	(eval "$command") </dev/null >/tmp/output 2>&1
	status=$?
	cat /tmp/output >&3
	[ -z "$(tail -c 1 /tmp/output)" ] || echo >&3
	echo "lab: done $number $status" >&3
done
reboot -f
