//! Disks as they are, without file systems.

use alloc::boxed::Box;
use alloc::string::String;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::fmt::Write;

use janus_front::class::BlockFeatures;
use sha2::{Digest, Sha256};

use super::{Command, Size, hex, number};
use crate::block::{Block, Reader};
use crate::devices;
use crate::shell::{Session, Status};

pub(super) const COMMANDS: &[Command] = &[Command {
    name: "block",
    arguments: "info [DISK] | read DISK OFFSET LENGTH | hash DISK [LENGTH]",
    help: "lists disks, dumps bytes of one, or prints its SHA-256",
    run: |session, arguments| Box::pin(block(session, arguments)),
}];

/// Bytes of a request when a disk is read from end to end, and requests ahead of the reader.
const PIECE: usize = 256 * 1024;
const DEPTH: usize = 4;

async fn block(session: &mut Session<'_>, arguments: &[String]) -> Status {
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match *arguments {
        [] | ["info"] => {
            if devices::blocks().is_empty() {
                let _ = writeln!(session, "no disks");
            }
            for disk in devices::blocks() {
                info(session, &disk);
            }
            Status::SUCCESS
        }
        ["info", name] => match find(session, name) {
            Ok(disk) => {
                info(session, &disk);
                Status::SUCCESS
            }
            Err(status) => status,
        },
        ["read", name, offset, len] => match (find(session, name), number(offset), number(len)) {
            (Err(status), ..) => status,
            (Ok(disk), Some(offset), Some(len)) => dump(session, &disk, offset, len).await,
            _ => Status::USAGE,
        },
        ["hash", name] => match find(session, name) {
            Ok(disk) => hash(session, &disk, disk.capacity()).await,
            Err(status) => status,
        },
        ["hash", name, len] => match (find(session, name), number(len)) {
            (Err(status), _) => status,
            (Ok(disk), Some(len)) => hash(session, &disk, len).await,
            _ => Status::USAGE,
        },
        _ => Status::USAGE,
    }
}

fn find(session: &mut Session<'_>, name: &str) -> Result<Arc<Block>, Status> {
    devices::block(name).ok_or_else(|| {
        let known: Vec<String> = devices::blocks().iter().map(|disk| disk.name().into()).collect();
        session.fail(format_args!("block: there is no disk {name}; there are: {}", known.join(" ")))
    })
}

fn info(session: &mut Session<'_>, disk: &Block) {
    let geometry = disk.geometry();
    let mut features = String::new();
    for (flag, name) in [
        (BlockFeatures::WRITE, "write"),
        (BlockFeatures::FLUSH, "flush"),
        (BlockFeatures::DISCARD, "discard"),
        (BlockFeatures::WRITE_ZEROES, "write-zeroes"),
    ] {
        if geometry.features.contains(flag) {
            features.push(' ');
            features.push_str(name);
        }
    }
    let _ = writeln!(
        session,
        "{}: {} bytes, blocks of {}, requests up to {}, {} at once;{features}",
        disk.name(),
        disk.capacity(),
        geometry.block_size,
        Size(u64::from(geometry.max_request)),
        geometry.queue_depth,
    );
    let _ = writeln!(session, "  {:?}", disk.counters());
}

async fn dump(session: &mut Session<'_>, disk: &Block, offset: u64, len: u64) -> Status {
    const LONGEST: u64 = 64 * 1024;
    if len > LONGEST {
        return session
            .fail(format_args!("block: {len} bytes are too many to print; at most {LONGEST}"));
    }
    let block = u64::from(disk.geometry().block_size);
    let start = offset / block * block;
    let Some(end) = offset.checked_add(len).and_then(|end| end.checked_next_multiple_of(block))
    else {
        return session.fail("block: outside the disk");
    };
    let mut bytes = alloc::vec![0; usize::try_from(end - start).unwrap_or(0)];
    if let Err(error) = disk.read_into(start, &mut bytes).await {
        return session.fail(format_args!("block: {}: {error}", disk.name()));
    }
    let skip = usize::try_from(offset - start).unwrap_or(0);
    let wanted = bytes.get(skip..skip + usize::try_from(len).unwrap_or(0)).unwrap_or_default();
    for (row, line) in wanted.chunks(16).enumerate() {
        let _ = write!(session, "{:010x} ", offset + 16 * row as u64);
        for byte in line {
            let _ = write!(session, " {byte:02x}");
        }
        let text: String = line
            .iter()
            .map(|&b| if (32..127).contains(&b) { char::from(b) } else { '.' })
            .collect();
        let _ = writeln!(session, "{:1$}  {text}", "", 3 * (16 - line.len()));
    }
    Status::SUCCESS
}

async fn hash(session: &mut Session<'_>, disk: &Arc<Block>, len: u64) -> Status {
    let mut hash = Sha256::new();
    let mut reader = match Reader::new(disk, 0, len, PIECE, DEPTH) {
        Ok(reader) => reader,
        Err(error) => return session.fail(format_args!("block: {}: {error}", disk.name())),
    };
    while let Some(piece) = reader.next().await {
        match piece {
            Ok(piece) => hash.update(&*piece),
            Err(error) => return session.fail(format_args!("block: {}: {error}", disk.name())),
        }
    }
    let _ = writeln!(session, "{}  {}", hex(&hash.finalize()), disk.name());
    Status::SUCCESS
}
