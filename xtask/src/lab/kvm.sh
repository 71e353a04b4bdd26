#!/bin/sh
# The KVM lab's machine: loads KVM, then obeys lines "NUMBER COMMAND" from the port "lab".
export PATH=/images:/usr/sbin:/usr/bin:/sbin:/bin HOME=/ TERM=dumb
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mkdir -p /dev/pts
mount -t devpts pts /dev/pts
mount -t tmpfs run /run
mount -t tmpfs -o size=90% tmp /tmp
ln -s /proc/self/fd /dev/fd
for module in $(cat /lib/modules/order); do
	insmod /lib/modules/$module || echo "lab: no $module"
done
ip link set lo up
# Anybody, as on a desktop: what is tested here needs no root.
chmod 666 /dev/kvm

port=
for name in /sys/class/virtio-ports/*/name; do
	[ "$(cat $name)" = lab ] && port=/dev/$(basename $(dirname $name))
done
[ -n "$port" ] || { echo "lab: no port"; reboot -f; }
exec 3<>$port
echo "lab: ready $(cut -d' ' -f1 /proc/uptime)" >&3

# guest NAME: runs the command of /run/NAME.cfg to its end, its output on the port line by line.
guest() {
	# Made by whoever starts it, so that it can be typed to at once. Both ends, so that neither opening it nor typing waits, and it does not end.
	exec 4<>/run/$1.in
	(
		exec 3>&-
		setsid sh /run/$1.cfg </run/$1.in 4>&- 2>&1 &
		echo $! >/run/$1.pid
		wait $!
		echo $? >/run/$1.status
	) | awk -v name=$1 '{ print name "| " $0; fflush() }' >&3
	echo "lab: ended $1 $(cat /run/$1.status)" >&3
}

# typed NAME TEXT: types on the guest's console.
typed() {
	printf '%b' "$2" >/run/$1.in
}

destroy() {
	kill -9 -$(cat /run/$1.pid)
}

while read -r number command <&3; do
	(eval "$command") </dev/null >/tmp/output 2>&1
	status=$?
	cat /tmp/output >&3
	[ -z "$(tail -c 1 /tmp/output)" ] || echo >&3
	echo "lab: done $number $status" >&3
done
reboot -f
