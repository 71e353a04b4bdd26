//! The network: an address by DHCP, and a neighbour that answers.

use core::time::Duration;

use janus_kernel::net::icmp::Ping;
use janus_kernel::{devices, guest_test, task, time};

guest_test! {
    /// An address comes by DHCP, and the router answers pings.
    fn the_network_has_an_address_and_a_neighbour(test) {
        let settled = time::timeout(Duration::from_secs(10), devices::settled());
        if task::block_on(settled).is_err() {
            test.error("the devices did not settle within 10 s");
        }
        let Some(net) = devices::nets().into_iter().next() else {
            test.error("there is no network card");
            return;
        };
        net.use_dhcp();
        let configured = task::block_on(time::timeout(Duration::from_secs(10), net.configured()));
        let Ok(configured) = configured else {
            test.check(false, "no address within 10 s");
            return;
        };
        let Some(address) = test.ok("address", configured) else { return };
        // Both QEMU's user network (10.0.2.2) and the lab's dom0 (10.0.0.1) are the gateway.
        let Some(gateway) = net.status().gateway else {
            test.check(false, "DHCP named no router");
            return;
        };
        let answers = task::block_on(async {
            let mut ping = Ping::new(&net, gateway)?;
            let mut longest = Duration::ZERO;
            for size in [8, 56, 1000, 1400] {
                longest = longest.max(ping.send(size, Duration::from_secs(3)).await?);
            }
            Ok::<_, janus_kernel::net::NetError>(longest)
        });
        if let Some(longest) = test.ok("ping", answers) {
            test.note(format_args!("{address}; the slowest answer took {longest:?}"));
        }
    }
}
