//! Xen: grants and xenstore. Elsewhere the commands say that there is none.

use alloc::boxed::Box;
use alloc::string::String;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::fmt::Write;

use super::Command;
use crate::http::printable;
use crate::platform;
use crate::shell::{Session, Status};
use crate::xen::grant;
use crate::xen::store::store;
use crate::xen::xenstore::{XenStore, XenStoreError};

pub(super) const COMMANDS: &[Command] = &[
    Command {
        name: "grants",
        arguments: "",
        help: "prints how many pages other domains may use",
        run: |session, _| Box::pin(async move { grants(session) }),
    },
    Command {
        name: "xenstore",
        arguments: "ls [PATH] | read PATH | write PATH VALUE | rm PATH | mkdir PATH | permissions PATH",
        help: "reads and changes the store of the Xen toolstack; paths without / are this domain's own",
        run: |session, arguments| Box::pin(xenstore(session, arguments)),
    },
];

fn grants(session: &mut Session<'_>) -> Status {
    let statistics = grant::statistics();
    if statistics.max_frames == 0 {
        return session.fail(format_args!(
            "grants: there is no grant table under {}",
            platform::current().name()
        ));
    }
    let _ = writeln!(
        session,
        "{} pages granted, {} references free, table of {} frames (at most {})",
        statistics.in_use, statistics.available, statistics.frames, statistics.max_frames
    );
    Status::SUCCESS
}

async fn xenstore(session: &mut Session<'_>, arguments: &[String]) -> Status {
    let Some(store) = store() else {
        return session.fail(format_args!(
            "xenstore: there is no xenstore under {}",
            platform::current().name()
        ));
    };
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let result = match *arguments {
        ["ls"] => list(session, store, "", 0).await,
        ["ls", path] => list(session, store, path, 0).await,
        ["read", path] => store.read(path).await.map(|value| {
            let _ = writeln!(session, "{}", text(&value));
        }),
        ["write", path, value] => store.write(path, value.as_bytes()).await,
        ["rm", path] => store.remove(path).await,
        ["mkdir", path] => store.make_directory(path).await,
        ["permissions", path] => store.permissions(path).await.map(|permissions| {
            for permission in permissions {
                let _ = writeln!(session, "{permission:?}");
            }
        }),
        _ => return Status::USAGE,
    };
    match result {
        Ok(()) => Status::SUCCESS,
        Err(error) => {
            session.fail(format_args!("{}: {error}", arguments.get(1).unwrap_or(&"xenstore")))
        }
    }
}

/// Levels shown below the path asked for.
const MAX_LEVELS: usize = 16;

/// Prints the tree below `path`, as `xenstore-ls` does.
fn list<'a>(
    session: &'a mut Session<'_>,
    store: &'a Arc<XenStore>,
    path: &'a str,
    level: usize,
) -> core::pin::Pin<Box<dyn Future<Output = Result<(), XenStoreError>> + Send + 'a>> {
    Box::pin(async move {
        // The domain's own directory has no name that it could be asked by, but an empty path is none.
        let own;
        let path = if path.is_empty() {
            let id = store.read("domid").await?;
            own = alloc::format!("/local/domain/{}", text(&id));
            own.as_str()
        } else {
            path
        };
        for name in store.list(path).await? {
            let child = alloc::format!("{}/{name}", path.trim_end_matches('/'));
            let indent = level;
            match store.read(&child).await {
                Ok(value) => {
                    let _ = writeln!(
                        session,
                        "{:indent$}{} = \"{}\"",
                        "",
                        printable(&name),
                        text(&value)
                    );
                }
                // It may have gone since it was listed, or not be ours to read.
                Err(XenStoreError::Refused(error)) => {
                    let _ = writeln!(session, "{:indent$}{} ({error})", "", printable(&name));
                    continue;
                }
                Err(error) => return Err(error),
            }
            if level < MAX_LEVELS {
                match list(session, store, &child, level + 1).await {
                    Ok(()) | Err(XenStoreError::Refused(_)) => {}
                    Err(error) => return Err(error),
                }
            }
        }
        Ok(())
    })
}

/// A value as text that a terminal survives.
fn text(value: &[u8]) -> String {
    printable(&String::from_utf8_lossy(value))
}
