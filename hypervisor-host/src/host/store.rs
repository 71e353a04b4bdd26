//! A domain's home in the store, as a toolstack writes it.

use janus_proto::addr::DomId;
use janus_proto::xenstore::{Request, StoreError, TransactionId};

use crate::xenstored::{ConnectionId, Xenstored, home, owned_by};

/// What the store says of a domain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// Its name.
    pub name: String,
    /// Its UUID.
    pub uuid: [u8; 16],
    /// Its memory in KiB.
    pub memory_kib: u64,
    /// Its virtual CPUs.
    pub vcpus: usize,
    /// The machine frames of its console and store rings.
    pub rings: (u64, u64),
}

/// A UUID as text.
fn uuid_text(uuid: [u8; 16]) -> String {
    let hex = uuid.map(|byte| format!("{byte:02x}")).concat();
    let mut parts = Vec::new();
    let mut rest = hex.as_str();
    for length in [8, 4, 4, 4, 12] {
        let (part, later) = rest.split_at_checked(length).unwrap_or((rest, ""));
        parts.push(part);
        rest = later;
    }
    parts.join("-")
}

struct Toolstack<'a> {
    store: &'a mut Xenstored,
    connection: ConnectionId,
}

impl Toolstack<'_> {
    fn ask(&mut self, request: &Request<'_>) -> Result<(), StoreError> {
        self.store.request(self.connection, TransactionId::NONE, request).map(drop)
    }
    fn directory(&mut self, path: &str, owner: DomId, reader: DomId) -> Result<(), StoreError> {
        self.ask(&Request::MakeDirectory(path))?;
        self.ask(&Request::SetPermissions { path, permissions: owned_by(owner, reader) })
    }
    fn write(&mut self, path: &str, value: &str) -> Result<(), StoreError> {
        self.ask(&Request::Write { path, value: value.as_bytes() })
    }
}

const HOST: DomId = DomId(0);

/// Writes the home of `guest`, whose rings have these ports: the store's and the console's.
///
/// # Errors
/// The daemon refused.
pub(super) fn introduce(
    store: &mut Xenstored,
    guest: DomId,
    identity: &Identity,
    (store_port, console_port): (u32, u32),
) -> Result<(), StoreError> {
    let connection = store.connect(HOST);
    let mut tools = Toolstack { store, connection };
    let (path, uuid) = (home(guest), uuid_text(identity.uuid));
    let vm = format!("/vm/{uuid}");
    // Read by the guest, written by the toolstack.
    for directory in [&path, &vm, &format!("{path}/memory"), &format!("{path}/cpu")] {
        tools.directory(directory, HOST, guest)?;
    }
    // The guest's own.
    for name in ["control", "data", "device", "drivers", "feature", "attr", "error", "console"] {
        tools.directory(&format!("{path}/{name}"), guest, HOST)?;
    }
    for name in ["control/shutdown", "control/feature-poweroff", "control/feature-reboot"] {
        tools.write(&format!("{path}/{name}"), "")?;
    }
    let (console, ring) = identity.rings;
    for (name, value) in [
        ("vm", vm.clone()),
        ("name", identity.name.clone()),
        ("domid", guest.to_string()),
        ("memory/static-max", identity.memory_kib.to_string()),
        ("memory/target", identity.memory_kib.to_string()),
        ("memory/videoram", "0".into()),
        ("store/port", store_port.to_string()),
        ("store/ring-ref", ring.to_string()),
        ("console/port", console_port.to_string()),
        ("console/ring-ref", console.to_string()),
        ("console/type", "janus".into()),
        ("console/limit", "1048576".into()),
        ("console/backend-id", "0".into()),
        ("console/output", "pty".into()),
    ] {
        tools.write(&format!("{path}/{name}"), &value)?;
    }
    for cpu in 0..identity.vcpus {
        tools.write(&format!("{path}/cpu/{cpu}/availability"), "online")?;
    }
    tools.write(&format!("{vm}/name"), &identity.name)?;
    tools.write(&format!("{vm}/uuid"), &uuid)?;
    tools.store.disconnect(connection);
    tools.store.announce("@introduceDomain");
    Ok(())
}

/// Writes the request that the guest watches for.
///
/// # Errors
/// The daemon refused.
pub(super) fn request_shutdown(
    store: &mut Xenstored,
    guest: DomId,
    what: &str,
) -> Result<(), StoreError> {
    let connection = store.connect(HOST);
    let mut tools = Toolstack { store, connection };
    let written = tools.write(&format!("{}/control/shutdown", home(guest)), what);
    store.disconnect(connection);
    written
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::xenstored::Reply;

    #[test]
    fn a_guest_finds_its_home_and_may_write_only_its_part() {
        let mut store = Xenstored::default();
        let identity = Identity {
            name: "test".into(),
            uuid: [0x12; 16],
            memory_kib: 65536,
            vcpus: 2,
            rings: (7, 8),
        };
        introduce(&mut store, DomId(3), &identity, (1, 2)).unwrap();
        let guest = store.connect(DomId(3));
        let mut ask = |request: Request<'_>| store.request(guest, TransactionId::NONE, &request);
        let vm = ask(Request::Read("/local/domain/3/vm"));
        let path = "/vm/12121212-1212-1212-1212-121212121212";
        assert_eq!(vm, Ok(Reply::Payload(path.into())));
        let target = ask(Request::Read("/local/domain/3/memory/target"));
        assert_eq!(target, Ok(Reply::Payload("65536".into())));
        let write = |path| Request::Write { path, value: b"x" };
        assert!(ask(write("/local/domain/3/memory/target")).is_err());
        assert!(ask(write("/local/domain/3/data/x")).is_ok());
        assert!(ask(write("/local/domain/3/control/shutdown")).is_ok());
        request_shutdown(&mut store, DomId(3), "poweroff").unwrap();
        let read = Request::Read("/local/domain/3/control/shutdown");
        let asked = store.request(guest, TransactionId::NONE, &read);
        assert_eq!(asked, Ok(Reply::Payload("poweroff".into())));
    }
}
