#!/bin/sh
# Hotplug script for a point-to-point network: 10.0.0.1 here, 10.0.0.2 in the guest, DHCP for those who ask.
[ "$1" = online ] || exit 0
ip addr add 10.0.0.1/24 dev $vif
ip link set $vif up
cat >/run/udhcpd-$vif.conf <<END
interface $vif
start 10.0.0.2
end 10.0.0.2
max_leases 1
auto_time 0
lease_file /run/udhcpd-$vif.leases
pidfile /run/udhcpd-$vif.pid
opt subnet 255.255.255.0
opt router 10.0.0.1
opt lease 3600
END
: >/run/udhcpd-$vif.leases
# It asks by ARP whether an address is free, and waits 2 s for an answer that nobody can give.
udhcpd -a 20 /run/udhcpd-$vif.conf </dev/null >/dev/null 2>&1
xenstore-write $XENBUS_PATH/hotplug-status connected
