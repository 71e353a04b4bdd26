//! The network: status, addresses, ping, and plain TCP for measurements.

use alloc::boxed::Box;
use alloc::string::String;
use alloc::sync::Arc;
use core::fmt::Write;
use core::time::Duration;

use smoltcp::wire::{IpEndpoint, Ipv4Address, Ipv4Cidr};

use super::{Command, Size, number};
use crate::net::icmp::Ping;
use crate::net::{AddressSource, Net, tcp};
use crate::shell::{Session, Status};
use crate::{devices, time};

pub(super) const COMMANDS: &[Command] = &[
    Command {
        name: "net",
        arguments: "[status | dhcp | static ADDRESS/BITS [GATEWAY] | wait] [INTERFACE]",
        help: "prints the state of the network, sets the address, or waits for one",
        run: |session, arguments| Box::pin(net(session, arguments)),
    },
    Command {
        name: "ping",
        arguments: "ADDRESS [COUNT [BYTES]]",
        help: "sends echo requests, 4 unless told, one a second at most",
        run: |session, arguments| Box::pin(ping(session, arguments)),
    },
    Command {
        name: "tcp-send",
        arguments: "ADDRESS PORT BYTES",
        help: "sends zeroes to a TCP server and prints how fast they went",
        run: |session, arguments| Box::pin(tcp_send(session, arguments)),
    },
];

/// How long `net wait` waits.
const ADDRESS_WAIT: Duration = Duration::from_secs(20);

/// The interface to use: the first, unless one is named.
fn pick(session: &mut Session<'_>, name: Option<&String>) -> Result<Arc<Net>, Status> {
    let found = match name {
        Some(name) => devices::net(name),
        None => devices::nets().into_iter().next(),
    };
    found.ok_or_else(|| match name {
        Some(name) => session.fail(format_args!("there is no network interface {name}")),
        None => session.fail("there is no network interface"),
    })
}

async fn net(session: &mut Session<'_>, arguments: &[String]) -> Status {
    let Some((what, rest)) = arguments.split_first() else {
        return all(session);
    };
    match what.as_str() {
        "status" if rest.is_empty() => all(session),
        "status" => match pick(session, rest.first()) {
            Ok(net) => status(session, &net),
            Err(status) => status,
        },
        "dhcp" => match pick(session, rest.first()) {
            Ok(net) => {
                net.use_dhcp();
                Status::SUCCESS
            }
            Err(status) => status,
        },
        "wait" => {
            let net = match pick(session, rest.first()) {
                Ok(net) => net,
                Err(status) => return status,
            };
            match time::timeout(ADDRESS_WAIT, net.configured()).await {
                Ok(Ok(address)) => {
                    let _ = writeln!(session, "{}: {address}", net.name());
                    Status::SUCCESS
                }
                Ok(Err(error)) => session.fail(format_args!("net: {}: {error}", net.name())),
                Err(_) => session.fail(format_args!(
                    "net: {}: no address within {} s; is there a DHCP server? `net static` sets one",
                    net.name(),
                    ADDRESS_WAIT.as_secs()
                )),
            }
        }
        "static" => {
            let Some(address) = rest.first().and_then(|text| text.parse::<Ipv4Cidr>().ok()) else {
                return Status::USAGE;
            };
            let gateway = rest.get(1).and_then(|text| text.parse::<Ipv4Address>().ok());
            let name = rest.get(if gateway.is_some() { 2 } else { 1 });
            let net = match pick(session, name) {
                Ok(net) => net,
                Err(status) => return status,
            };
            match net.set_static(address, gateway) {
                Ok(()) => Status::SUCCESS,
                Err(error) => session.fail(format_args!("net: {address}: {error}")),
            }
        }
        _ => Status::USAGE,
    }
}

fn all(session: &mut Session<'_>) -> Status {
    if devices::nets().is_empty() {
        let _ = writeln!(session, "no network interfaces");
    }
    for net in devices::nets() {
        status(session, &net);
    }
    Status::SUCCESS
}

fn status(session: &mut Session<'_>, net: &Net) -> Status {
    let status = net.status();
    let [a, b, c, d, e, f] = status.properties.mac;
    let link = if status.link_up { "up" } else { "down" };
    let _ = writeln!(
        session,
        "{}: {a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{f:02x}, link {link}, MTU {}, {:?}",
        net.name(),
        status.properties.mtu,
        status.properties.offloads,
    );
    let source = match status.source {
        AddressSource::None => "not configured",
        AddressSource::Dhcp => "by DHCP",
        AddressSource::Static => "fixed",
    };
    match status.address {
        Some(address) => {
            let _ = write!(session, "  address {address} {source}");
            if let Some(gateway) = status.gateway {
                let _ = write!(session, ", gateway {gateway}");
            }
            let _ = writeln!(session);
        }
        None => {
            let _ = writeln!(session, "  no address, {source}");
        }
    }
    if let Some(failure) = status.failure {
        let _ = writeln!(session, "  failed: {failure}");
    }
    let _ = writeln!(session, "  {} sockets; {:?}", status.sockets, status.counters);
    Status::SUCCESS
}

async fn ping(session: &mut Session<'_>, arguments: &[String]) -> Status {
    let Some(to) = arguments.first().and_then(|text| text.parse::<Ipv4Address>().ok()) else {
        return Status::USAGE;
    };
    let count = arguments.get(1).map_or(Some(4), |text| number(text));
    let len = arguments.get(2).map_or(Some(56), |text| number(text));
    let (Some(count), Some(len)) = (count, len.and_then(|len| usize::try_from(len).ok())) else {
        return Status::USAGE;
    };
    let net = match pick(session, None) {
        Ok(net) => net,
        Err(status) => return status,
    };
    let mut ping = match Ping::new(&net, to) {
        Ok(ping) => ping,
        Err(error) => return session.fail(format_args!("ping: {to}: {error}")),
    };
    let (mut answers, mut fastest, mut slowest, mut sum) =
        (0u32, Duration::MAX, Duration::ZERO, Duration::ZERO);
    for sequence in 0..count {
        let start = time::now();
        match ping.send(len, Duration::from_secs(1)).await {
            Ok(took) => {
                answers += 1;
                (fastest, slowest, sum) = (fastest.min(took), slowest.max(took), sum + took);
                let _ = writeln!(session, "{to}: answer {sequence} after {} us", took.as_micros());
            }
            Err(error) => {
                let _ = writeln!(session, "{to}: request {sequence}: {error}");
            }
        }
        if sequence + 1 < count {
            time::sleep(Duration::from_secs(1).saturating_sub(start.elapsed())).await;
        }
    }
    if answers == 0 {
        return session.fail(format_args!("ping: {to}: no answer to {count} requests"));
    }
    let mean = sum / answers;
    let _ = writeln!(
        session,
        "{answers} of {count} answered, {}/{}/{} us (least/mean/most)",
        fastest.as_micros(),
        mean.as_micros(),
        slowest.as_micros()
    );
    Status::SUCCESS
}

async fn tcp_send(session: &mut Session<'_>, arguments: &[String]) -> Status {
    let [address, port, bytes] = arguments else { return Status::USAGE };
    let (Ok(address), Ok(port), Some(bytes)) =
        (address.parse::<Ipv4Address>(), port.parse::<u16>(), number(bytes))
    else {
        return Status::USAGE;
    };
    let net = match pick(session, None) {
        Ok(net) => net,
        Err(status) => return status,
    };
    let start = time::now();
    let sent = async {
        let stream = tcp::connect(&net, IpEndpoint::new(address.into(), port)).await?;
        let zeroes = alloc::vec![0; 64 * 1024];
        let mut left = bytes;
        while left > 0 {
            let len = usize::try_from(left).unwrap_or(usize::MAX).min(zeroes.len());
            stream.write_all(zeroes.get(..len).unwrap_or_default()).await?;
            left -= len as u64;
        }
        stream.flush().await?;
        stream.close().await
    };
    match sent.await {
        Ok(()) => {
            let micros = start.elapsed().as_micros().max(1);
            let rate = u128::from(bytes) * 8 / micros;
            let _ = writeln!(session, "sent {} in {micros} us: {rate} Mbit/s", Size(bytes));
            Status::SUCCESS
        }
        Err(error) => session.fail(format_args!("tcp-send: {address}:{port}: {error}")),
    }
}
