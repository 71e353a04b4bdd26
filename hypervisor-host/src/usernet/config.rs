//! What a user network is told: [`Config`], [`Publish`], [`Resolvers`].

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::str::FromStr;

/// The gateway; towards it is the host itself.
pub const GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 2);
/// The DNS server.
pub const DNS: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 3);
/// What DHCP leases.
pub const LEASE: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 15);
/// The network's mask.
pub const NETMASK: Ipv4Addr = Ipv4Addr::new(255, 255, 255, 0);
pub(super) const NETWORK: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 0);
pub(super) const BROADCAST: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 255);

/// The DNS port.
pub(super) const DNS_PORT: u16 = 53;

/// A user network.
#[derive(Clone, Debug)]
pub struct Config {
    /// Bytes of an IP packet, 576 to 65521; told to the guest by DHCP.
    pub mtu: u16,
    /// The gateway's address reaches services on the host's loopback interface.
    pub host_loopback: bool,
    /// Nothing goes outside: only DHCP, ARP, the gateway's echo and published ports.
    pub restrict: bool,
    /// Ports of the host that lead into the guest.
    pub publish: Vec<Publish>,
    /// Who answers the guest's DNS questions.
    pub resolvers: Resolvers,
    /// Addresses that the guest uses, and what they are for the host; they come before every other rule.
    pub aliases: Vec<(Ipv4Addr, Ipv4Addr)>,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            mtu: 1500,
            host_loopback: true,
            restrict: false,
            publish: Vec::new(),
            resolvers: Resolvers::default(),
            aliases: Vec::new(),
        }
    }
}

/// A transport.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Transport {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
}

impl fmt::Display for Transport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
        })
    }
}

/// A port of the host that leads into the guest: `[HOST:]PORT:GUESTPORT[/tcp|/udp]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Publish {
    /// Where the host listens; port 0: one that is free.
    pub host: SocketAddr,
    /// The guest's port.
    pub guest_port: u16,
    /// Its transport.
    pub transport: Transport,
}

/// What is wrong with the text of a published port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PublishError {
    /// Not of the form.
    Form,
    /// The host's address is none.
    Address,
    /// A port is no number up to 65535, or the guest's is 0.
    Port,
    /// Neither `tcp` nor `udp`.
    Transport,
}

impl fmt::Display for PublishError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Form => "a published port is [ADDRESS:]HOSTPORT:GUESTPORT[/tcp|/udp]",
            Self::Address => "the host's address of a published port is not an IP address",
            Self::Port => "a port is a number up to 65535, and the guest's is not 0",
            Self::Transport => "the transport of a published port is tcp or udp",
        })
    }
}

impl std::error::Error for PublishError {}

impl FromStr for Publish {
    type Err = PublishError;

    fn from_str(text: &str) -> Result<Self, PublishError> {
        let (ports, transport) = match text.split_once('/') {
            None | Some((_, "tcp")) => (text.trim_end_matches("/tcp"), Transport::Tcp),
            Some((ports, "udp")) => (ports, Transport::Udp),
            Some(_) => return Err(PublishError::Transport),
        };
        let (host, guest_port) = ports.rsplit_once(':').ok_or(PublishError::Form)?;
        let guest_port = guest_port.parse().map_err(|_| PublishError::Port)?;
        let (address, port) = match host.rsplit_once(':') {
            None => (Ipv4Addr::LOCALHOST.into(), host),
            Some((address, port)) => {
                let bare = address.strip_prefix('[').and_then(|rest| rest.strip_suffix(']'));
                let address = bare.unwrap_or(address).parse::<IpAddr>();
                (address.map_err(|_| PublishError::Address)?, port)
            }
        };
        let port = port.parse().map_err(|_| PublishError::Port)?;
        if guest_port == 0 {
            return Err(PublishError::Port);
        }
        Ok(Self { host: SocketAddr::new(address, port), guest_port, transport })
    }
}

impl fmt::Display for Publish {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}/{}", self.host, self.guest_port, self.transport)
    }
}

/// Who answers the guest's DNS questions.
#[derive(Clone, Debug)]
pub enum Resolvers {
    /// Those of a file in the format of resolv.conf(5), read again for each new asker.
    File(PathBuf),
    /// These.
    Fixed(Vec<SocketAddr>),
}

impl Default for Resolvers {
    fn default() -> Self {
        Self::File(PathBuf::from("/etc/resolv.conf"))
    }
}

/// Resolvers that are tried, as resolv.conf(5) has it.
const MAX_RESOLVERS: usize = 3;
/// Bytes of a resolv.conf that are looked at.
const MAX_FILE: u64 = 64 * 1024;

impl Resolvers {
    /// Those to ask now, the first first.
    pub(super) fn list(&self) -> Vec<SocketAddr> {
        match self {
            Self::Fixed(list) => list.iter().take(MAX_RESOLVERS).copied().collect(),
            Self::File(path) => read(path).map(|text| parse(&text)).unwrap_or_default(),
        }
    }
}

fn read(path: &Path) -> std::io::Result<String> {
    use std::io::Read as _;
    let mut bytes = Vec::new();
    std::fs::File::open(path)?.take(MAX_FILE).read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

fn parse(text: &str) -> Vec<SocketAddr> {
    let servers = text.lines().filter_map(|line| {
        let mut words = line.split_whitespace();
        let address = words.next().filter(|word| *word == "nameserver").and(words.next())?;
        Some(SocketAddr::new(address.parse().ok()?, DNS_PORT))
    });
    servers.take(MAX_RESOLVERS).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn published_ports_are_read_in_every_form() {
        for (text, host, port, transport) in [
            ("8080:80", "127.0.0.1:8080", 80, Transport::Tcp),
            ("8080:80/tcp", "127.0.0.1:8080", 80, Transport::Tcp),
            ("0.0.0.0:53:5353/udp", "0.0.0.0:53", 5353, Transport::Udp),
            ("[::1]:0:22", "[::1]:0", 22, Transport::Tcp),
        ] {
            let want = Publish { host: host.parse().unwrap(), guest_port: port, transport };
            assert_eq!(text.parse(), Ok(want), "{text}");
            assert_eq!(want.to_string().parse(), Ok(want));
        }
        for (text, want) in [
            ("80", PublishError::Form),
            ("", PublishError::Form),
            ("80:0", PublishError::Port),
            ("65536:1", PublishError::Port),
            ("a:1", PublishError::Port),
            ("1:2/sctp", PublishError::Transport),
            ("localhost:1:2", PublishError::Address),
            ("1:2/", PublishError::Transport),
        ] {
            assert_eq!(text.parse::<Publish>(), Err(want), "{text}");
        }
    }

    #[test]
    fn resolvers_are_read_from_a_file() {
        let text = "# no\nsearch a b\nnameserver 192.0.2.1\n nameserver\t2001:db8::1 # second\n\
                    nameserver x\nnameserver 192.0.2.3\nnameserver 192.0.2.4\n";
        let want: Vec<SocketAddr> = ["192.0.2.1:53", "[2001:db8::1]:53", "192.0.2.3:53"]
            .map(|text| text.parse().unwrap())
            .into();
        assert_eq!(parse(text), want);
        assert_eq!(Resolvers::File("/nonexistent".into()).list(), []);
    }
}
