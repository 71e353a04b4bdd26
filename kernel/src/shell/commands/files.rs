//! The mounted volumes.

use alloc::boxed::Box;
use alloc::string::String;
use alloc::vec;
use alloc::vec::Vec;
use core::fmt::Write;

use sha2::{Digest, Sha256};

use super::{Command, Size, hex};
use crate::fs::volume::File;
use crate::fs::{FsError, NodeKind, mounts};
use crate::shell::{Session, Status};
use crate::{task, time};

pub(super) const COMMANDS: &[Command] = &[
    Command {
        name: "ls",
        arguments: "[PATH]",
        help: "lists a directory, or one file",
        run: |session, arguments| Box::pin(ls(session, arguments)),
    },
    Command {
        name: "cat",
        arguments: "FILE ...",
        help: "prints files",
        run: |session, arguments| Box::pin(cat(session, arguments)),
    },
    Command {
        name: "sha256sum",
        arguments: "FILE ...",
        help: "prints the SHA-256 of files, as the tool of this name does",
        run: |session, arguments| Box::pin(sha256sum(session, arguments)),
    },
    Command {
        name: "mounts",
        arguments: "",
        help: "lists the mounted volumes",
        run: |session, _| {
            Box::pin(async move {
                for mount in mounts::all() {
                    let (kind, source) = (mount.volume.type_name(), mount.volume.source());
                    let _ = writeln!(
                        session,
                        "{:<16} {kind:<9} {source} {}",
                        mount.place,
                        mount.volume.label()
                    );
                }
                Status::SUCCESS
            })
        },
    },
];

async fn ls(session: &mut Session<'_>, arguments: &[String]) -> Status {
    let path = arguments.first().map_or("/", String::as_str);
    let entries = match mounts::metadata(path).await {
        Ok(metadata) if metadata.kind != NodeKind::Directory => {
            let _ = writeln!(session, "{:>12} {path}", metadata.size);
            return Status::SUCCESS;
        }
        Ok(_) | Err(FsError::NotFound) => mounts::list(path).await,
        Err(error) => Err(error),
    };
    match entries {
        Ok(entries) => {
            for entry in entries {
                let mark = match entry.metadata.kind {
                    NodeKind::File => "",
                    NodeKind::Directory => "/",
                    NodeKind::Symlink => "@",
                    NodeKind::Other => "=",
                };
                let name = crate::http::printable(&entry.name);
                let _ = writeln!(session, "{:>12} {name}{mark}", entry.metadata.size);
            }
            Status::SUCCESS
        }
        Err(error) => session.fail(format_args!("ls: {path}: {error}")),
    }
}

/// Bytes read at a time; the next piece is read while the one before is worked on.
const PIECE: usize = 256 * 1024;

/// Reads a file from end to end, handing each piece to `work` while the next is read.
async fn each_piece(path: &str, mut work: impl FnMut(&[u8])) -> Result<u64, FsError> {
    let file: File = mounts::open(path).await?;
    let (size, mut at) = (file.size(), 0);
    let mut current = file.read_at(0, vec![0; PIECE]).await?;
    while !current.is_empty() {
        at += current.len() as u64;
        // The volume's fiber starts on the next piece when this task yields to it.
        let next = file.read_at(at, Vec::from_iter(core::iter::repeat_n(0, PIECE)));
        let ((), next) = task::join(async { work(&current) }, next).await;
        current = next?;
    }
    if at == size {
        Ok(at)
    } else {
        Err(FsError::Corrupt(alloc::format!("{at} of {size} bytes are there")))
    }
}

async fn cat(session: &mut Session<'_>, arguments: &[String]) -> Status {
    if arguments.is_empty() {
        return Status::USAGE;
    }
    for path in arguments {
        if let Err(error) = each_piece(path, |piece| session.write_bytes(piece)).await {
            return session.fail(format_args!("cat: {path}: {error}"));
        }
    }
    Status::SUCCESS
}

async fn sha256sum(session: &mut Session<'_>, arguments: &[String]) -> Status {
    if arguments.is_empty() {
        return Status::USAGE;
    }
    for path in arguments {
        let mut hash = Sha256::new();
        let start = time::now();
        match each_piece(path, |piece| hash.update(piece)).await {
            Ok(size) => {
                let _ = writeln!(session, "{}  {path}", hex(&hash.finalize()));
                log::info!("hashed {} in {} ms", Size(size), start.elapsed().as_millis());
            }
            Err(error) => return session.fail(format_args!("sha256sum: {path}: {error}")),
        }
    }
    Status::SUCCESS
}
