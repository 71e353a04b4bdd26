#!/bin/sh
# Hotplug script for a disk that is a block device already: tells blkback its numbers.
[ "$1" = add ] || exit 0
device=$(xenstore-read $XENBUS_PATH/params)
xenstore-write $XENBUS_PATH/physical-device $(stat -L -c %t:%T $device) $XENBUS_PATH/hotplug-status connected
