//! Children of the test that go into the jail, because nobody comes out of it.

use std::os::unix::process::ExitStatusExt as _;
use std::process::Command;

use super::filter::{self, Sockets};
use super::*;

/// Runs a test of this module in a process of its own, told so by the environment; answers whether this is the child.
fn in_a_child(name: &str) -> bool {
    const MARK: &str = "JANUS_JAIL_TEST";
    if std::env::var_os(MARK).is_some() {
        return true;
    }
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", &format!("jail::tests::{name}"), "--nocapture"])
        .env(MARK, "1")
        .output()
        .unwrap();
    assert!(output.status.success(), "{:?} {output:?}", output.status.signal());
    false
}

fn status(field: &str) -> String {
    let text = std::fs::read_to_string("/proc/thread-self/status").unwrap();
    text.lines().find_map(|line| line.strip_prefix(field)).unwrap().trim().to_owned()
}

#[test]
#[cfg_attr(miri, ignore = "Miri has no processes")]
fn a_fence_leaves_the_files_that_were_named_and_no_privileges() {
    if !in_a_child("a_fence_leaves_the_files_that_were_named_and_no_privileges") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let named = folder.path().join("named");
    let other = folder.path().join("other");
    let made = tempfile::tempdir().unwrap();
    std::fs::write(&named, "x").unwrap();
    std::fs::write(&other, "x").unwrap();
    let mut fence = Fence { read: vec![named.clone()], ..Fence::default() };
    fence.make(&made.path().join("socket"));
    let closed = fence.close().unwrap();
    assert_eq!(status("NoNewPrivs:"), "1");
    assert_eq!(
        (status("CapEff:"), status("CapPrm:")),
        ("0000000000000000".into(), "0000000000000000".into())
    );
    assert!(std::fs::read(&named).is_ok());
    if closed == Closed::WithoutLandlock {
        return;
    }
    assert!(std::fs::read(&other).is_err());
    assert!(std::fs::write(&named, "y").is_err());
    assert!(std::fs::write(folder.path().join("new"), "y").is_err());
    assert!(std::fs::write(made.path().join("new"), "y").is_ok());
    assert!(Command::new("/bin/true").status().is_err());
    // A thread that starts now is inside as well.
    let inside = std::thread::spawn(move || std::fs::read(&other).is_err());
    assert!(inside.join().unwrap());
    if closed == Closed::Whole {
        assert!(std::net::TcpListener::bind("127.0.0.1:0").is_err());
    }
}

#[test]
#[cfg_attr(miri, ignore = "Miri has no processes")]
fn the_filter_holds_for_threads_that_were_there_before() {
    if !in_a_child("the_filter_holds_for_threads_that_were_there_before") {
        return;
    }
    rustix::thread::set_no_new_privs(true).unwrap();
    let (sender, receiver) = std::sync::mpsc::channel::<()>();
    let older = std::thread::spawn(move || {
        let _ = receiver.recv();
        (status("Seccomp:"), Command::new("/bin/true").status().is_err())
    });
    filter::install(Sockets::Local).unwrap();
    drop(sender);
    assert_eq!(older.join().unwrap(), ("2".into(), true));
    assert_eq!(status("Seccomp:"), "2");
    let refused = |result: io::Result<()>| result.unwrap_err().raw_os_error();
    assert_eq!(refused(std::net::TcpListener::bind("127.0.0.1:0").map(drop)), Some(libc::ENOSYS));
    assert_eq!(refused(std::os::unix::fs::chroot("/")), Some(libc::ENOSYS));
    assert_eq!(
        refused(rustix::process::test_kill_process(rustix::process::getpid()).map_err(Into::into)),
        Some(libc::ENOSYS)
    );
    // What a guest takes still works: memory, threads, time, files, sockets of this machine.
    let more = std::thread::spawn(|| vec![1_u8; 64 << 20].len());
    assert_eq!(more.join().unwrap(), 64 << 20);
    std::thread::sleep(std::time::Duration::from_millis(1));
    assert!(std::os::unix::net::UnixStream::pair().is_ok());
}
