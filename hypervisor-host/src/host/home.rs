//! A domain's directories in xenstore, as `xl` makes them (`docs/misc/xenstore-paths.pandoc`).

use janus_proto::addr::{DomId, Port};
use janus_proto::xenstore::{Access, Permission, Request, StoreError, TransactionId};

use super::Identity;
use crate::xenstored::{ConnectionId, Xenstored, home, owned_by};

/// Directories below a domain's home that are its own to write.
const OWN: [&str; 13] = [
    "control/shutdown",
    "control/feature-poweroff",
    "control/feature-reboot",
    "control/feature-suspend",
    "control/sysrq",
    "data",
    "drivers",
    "feature",
    "attr",
    "error",
    "device-misc",
    "messages",
    "hvmloader-report",
];

/// A UUID in its usual form.
pub(super) fn uuid(uuid: [u8; 16]) -> String {
    let hex: String = uuid.iter().map(|byte| format!("{byte:02x}")).collect();
    let parts = [(0, 8), (8, 12), (12, 16), (16, 20), (20, 32)];
    let part = |(start, end)| hex.get(start..end).unwrap_or_default();
    parts.map(part).join("-")
}

/// Writes for the toolstack.
pub(super) struct Writer<'a> {
    pub(super) store: &'a mut Xenstored,
    pub(super) connection: ConnectionId,
}

impl Writer<'_> {
    pub(super) fn ask(&mut self, request: &Request<'_>) -> Result<(), StoreError> {
        self.store.request(self.connection, TransactionId::NONE, request).map(drop)
    }

    pub(super) fn write(&mut self, path: &str, value: &str) -> Result<(), StoreError> {
        self.ask(&Request::Write { path, value: value.as_bytes() })
    }

    pub(super) fn directory(
        &mut self,
        path: &str,
        permissions: Vec<Permission>,
    ) -> Result<(), StoreError> {
        self.ask(&Request::MakeDirectory(path))?;
        self.ask(&Request::SetPermissions { path, permissions })
    }
}

/// Makes the home of `guest`.
pub(super) fn make(
    writer: &mut Writer<'_>,
    guest: DomId,
    identity: &Identity,
    (store_port, console_port): (Port, Port),
    tty: &str,
) -> Result<(), StoreError> {
    let host = DomId(0);
    let root = home(guest);
    let (console, store) = identity.rings;
    let uuid = uuid(identity.uuid);
    let vm = format!("/vm/{uuid}");
    let libxl = format!("/libxl/{guest}");
    let readable = || owned_by(host, guest);
    let own = || vec![Permission { access: Access::None, domain: guest }];
    writer.directory(&vm, readable())?;
    writer.write(&format!("{vm}/name"), &identity.name)?;
    writer.write(&format!("{vm}/uuid"), &uuid)?;
    writer.directory(&libxl, vec![Permission { access: Access::None, domain: host }])?;
    writer.write(&format!("{libxl}/type"), "pv")?;
    writer.directory(&root, readable())?;
    let (memory, most) = (identity.memory_kib.to_string(), identity.max_memory_kib.to_string());
    for (name, value) in [
        ("vm", vm.as_str()),
        ("name", &identity.name),
        ("domid", &guest.to_string()),
        ("memory/static-max", &most),
        ("memory/target", &memory),
        ("memory/videoram", "0"),
        ("control/platform-feature-multiprocessor-suspend", "1"),
        ("control/platform-feature-xs_reset_watches", "1"),
        ("store/port", &store_port.to_string()),
        ("store/ring-ref", &store.to_string()),
        ("console/backend", &format!("/local/domain/0/backend/console/{guest}/0")),
        ("console/backend-id", "0"),
        ("console/limit", "1048576"),
        ("console/type", "xenconsoled"),
        ("console/output", "pty"),
        ("console/tty", tty),
        ("console/port", &console_port.to_string()),
        ("console/ring-ref", &console.to_string()),
    ] {
        writer.write(&format!("{root}/{name}"), value)?;
    }
    for cpu in 0..identity.vcpus {
        writer.write(&format!("{root}/cpu/{cpu}/availability"), "online")?;
    }
    for directory in ["device", "control", "backend"] {
        writer.directory(&format!("{root}/{directory}"), readable())?;
    }
    for directory in OWN {
        writer.directory(&format!("{root}/{directory}"), own())?;
    }
    Ok(())
}
