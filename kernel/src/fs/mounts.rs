//! Where volumes hang in the one tree that the shell and the web server see.
//!
//! A volume that comes while there is none at the root becomes the root; the others hang at `/mnt/NAME`, NAME being
//! the disk or module they came from.

use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;

use super::volume::{File, Volume};
use super::{DirEntry, FsError, Metadata, NodeKind, normalise};
use crate::sync::IrqMutex;

static MOUNTS: IrqMutex<Vec<Mount>> = IrqMutex::new(Vec::new());

/// A volume and the place where it hangs.
#[derive(Clone, Debug)]
pub struct Mount {
    /// An absolute path; `/` for the root.
    pub place: String,
    /// The volume.
    pub volume: Volume,
}

/// Hangs a volume into the tree; answers where.
pub fn add(volume: Volume) -> String {
    let mut mounts = MOUNTS.lock();
    let place = if mounts.iter().all(|mount| mount.place != "/") {
        "/".to_string()
    } else {
        format!("/mnt/{}", volume.source())
    };
    mounts.push(Mount { place: place.clone(), volume });
    place
}

/// Takes the volume that came from `source` out of the tree; answers where it hung. Files that are open stay so.
pub fn remove(source: &str) -> Option<String> {
    let mount = {
        let mut mounts = MOUNTS.lock();
        let at = mounts.iter().position(|mount| mount.volume.source() == source)?;
        mounts.remove(at)
    };
    Some(mount.place)
}

/// Every mount, in the order of mounting.
#[must_use]
pub fn all() -> Vec<Mount> {
    MOUNTS.lock().clone()
}

/// The volume that `path` lies on, and the path within it.
fn resolve(path: &str) -> Result<(Volume, String), FsError> {
    let path = normalise(path)?;
    let mounts = MOUNTS.lock();
    let below = |place: &str| match place {
        "/" => Some(path.clone()),
        place => match path.strip_prefix(place)? {
            "" => Some("/".to_string()),
            rest => rest.starts_with('/').then(|| rest.to_string()),
        },
    };
    mounts
        .iter()
        .filter_map(|mount| Some((mount, below(&mount.place)?)))
        .max_by_key(|(mount, _)| mount.place.len())
        .map(|(mount, rest)| (mount.volume.clone(), rest))
        .ok_or(FsError::NotFound)
}

/// What `path` is.
///
/// # Errors
/// See [`FsError`].
pub async fn metadata(path: &str) -> Result<Metadata, FsError> {
    let (volume, rest) = resolve(path)?;
    volume.metadata(&rest).await
}

/// The entries of a directory, sorted by name; `/mnt` lists the volumes beside the root.
///
/// # Errors
/// See [`FsError`].
pub async fn list(path: &str) -> Result<Vec<DirEntry>, FsError> {
    let (volume, rest) = resolve(path)?;
    let mut entries = match volume.list(&rest).await {
        Err(FsError::NotFound) if normalise(path)? == "/mnt" => Vec::new(),
        entries => entries?,
    };
    let metadata = Metadata { kind: NodeKind::Directory, size: 0 };
    let extra: Vec<String> = match normalise(path)?.as_str() {
        "/mnt" => {
            all().iter().filter_map(|m| m.place.strip_prefix("/mnt/").map(String::from)).collect()
        }
        "/" if all().len() > 1 => Vec::from(["mnt".to_string()]),
        _ => Vec::new(),
    };
    for name in extra {
        if !entries.iter().any(|entry| entry.name == name) {
            entries.push(DirEntry { name, metadata });
        }
    }
    entries.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(entries)
}

/// Opens a file.
///
/// # Errors
/// See [`FsError`].
pub async fn open(path: &str) -> Result<File, FsError> {
    let (volume, rest) = resolve(path)?;
    volume.open(&rest).await
}
