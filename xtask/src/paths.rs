//! Where things are: the workspace, and the places under `target/` that this tool fills.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

/// The workspace's top directory.
pub(crate) fn root() -> PathBuf {
    // The manifest's directory is known at run time under cargo, and at build time without it.
    let manifest = std::env::var_os("CARGO_MANIFEST_DIR")
        .map_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")), PathBuf::from);
    manifest.parent().map_or_else(|| manifest.clone(), Path::to_path_buf)
}

/// The guest's own target directory: two cargos and two compilers without lock fights.
pub(crate) fn guest_target() -> PathBuf {
    root().join("target/guest")
}

/// Files that this tool makes and may throw away: disks, boot images, initramfs parts.
///
/// # Errors
/// The directory cannot be made.
pub(crate) fn cache(name: &str) -> std::io::Result<PathBuf> {
    let dir = root().join("target/xtask").join(name);
    std::fs::create_dir_all(&dir)?;
    Ok(dir)
}

/// A name beside `path` that no other thread or process uses: to make a file under before [`std::fs::rename`].
pub(crate) fn fresh(path: &Path) -> PathBuf {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    path.with_extension(format!(
        "new-{}-{}",
        std::process::id(),
        NEXT.fetch_add(1, Ordering::Relaxed)
    ))
}

/// Makes or replaces a file as a whole: a machine may be running from the one that is there.
///
/// # Errors
/// It cannot be written.
pub(crate) fn replace(path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    let fresh = fresh(path);
    std::fs::write(&fresh, bytes)?;
    std::fs::rename(&fresh, path)
}

/// The first of `names` that is a program in `PATH`, or in the places where an ordinary user's `PATH` lacks it.
pub(crate) fn program(names: &[&str]) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let extra = ["/usr/sbin", "/sbin", "/usr/lib/xen-4.17/bin"];
    names.iter().find_map(|name| {
        std::env::split_paths(&path)
            .chain(extra.iter().map(PathBuf::from))
            .map(|dir| dir.join(name))
            .find(|file| file.is_file())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_replaced_whole_whoever_else_does_so() {
        let path = cache("test-replace").unwrap().join("file");
        std::thread::scope(|scope| {
            for letter in b'a'..b'e' {
                let path = &path;
                scope.spawn(move || {
                    for _ in 0..50 {
                        replace(path, &[letter; 10_000]).unwrap();
                        let seen = std::fs::read(path).unwrap();
                        assert!(seen.len() == 10_000 && seen.iter().all(|byte| *byte == seen[0]));
                    }
                });
            }
        });
    }
}
