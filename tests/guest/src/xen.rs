//! What only Xen has: event channels, grants, xenstore.
// UNSAFETY: grants a page to another domain.
#![expect(unsafe_code, reason = "a granted page's contract is the caller's")]

use alloc::boxed::Box;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::sync::atomic::{AtomicU32, Ordering};
use core::time::Duration;

use janus_kernel::irq::evtchn;
use janus_kernel::mm::frames;
use janus_kernel::sync::Notify;
use janus_kernel::test::Test;
use janus_kernel::xen::grant;
use janus_kernel::xen::store::store;
use janus_kernel::xen::xenstore::{XenStore, XenStoreError};
use janus_kernel::{guest_test, task, time};
use janus_proto::addr::DomId;
use janus_proto::grant::Access;
use janus_proto::xenstore::{Access as StoreAccess, Permission, StoreError};

fn xenstore(test: &mut Test) -> Option<&'static Arc<XenStore>> {
    let store = store();
    if store.is_none() {
        test.error("there is no xenstore");
    }
    store
}

guest_test! {
    /// An event sent to oneself arrives, once for each time, and wakes a sleeping CPU.
    fn event_to_oneself_arrives(test) {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        static CAME: Notify = Notify::new();
        let handler = Box::new(|| {
            COUNT.fetch_add(1, Ordering::Relaxed);
            CAME.notify();
        });
        let Some(channel) = test.ok("bind_ipi", evtchn::bind_ipi(0, "test", handler)) else { return };
        for round in 1..=20 {
            channel.notify();
            let came = task::block_on(time::timeout(Duration::from_secs(2), CAME.notified()));
            test.check(came.is_ok(), format_args!("event {round} did not come"));
        }
        test.equal("events", COUNT.load(Ordering::Relaxed), 20);
    }

    /// A masked event waits until it is unmasked.
    fn event_that_is_masked_waits(test) {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let handler = Box::new(|| {
            COUNT.fetch_add(1, Ordering::Relaxed);
        });
        let Some(channel) = test.ok("bind_ipi", evtchn::bind_ipi(0, "test", handler)) else { return };
        evtchn::mask(channel.port());
        channel.notify();
        task::block_on(time::sleep(Duration::from_millis(20)));
        test.equal("events while masked", COUNT.load(Ordering::Relaxed), 0);
        evtchn::unmask(channel.port());
        task::block_on(time::sleep(Duration::from_millis(20)));
        test.equal("events once unmasked", COUNT.load(Ordering::Relaxed), 1);
    }

    /// Grants can be given and ended by the hundreds; the table grows as it must.
    fn grants_are_given_and_ended(test) {
        let before = grant::statistics().in_use;
        let mut granted = Vec::new();
        // More than one frame of the table (512 entries) holds.
        for _ in 0..700 {
            let Some(frame) = frames::allocate(1) else {
                test.error("out of memory");
                return;
            };
            // SAFETY: the page is freed below, after its grant has ended.
            let reference = unsafe { grant::grant(DomId(0), frame.start(), Access::ReadOnly) };
            match test.ok("grant", reference) {
                Some(reference) => granted.push((reference, frame)),
                None => return,
            }
        }
        test.equal("grants in use", grant::statistics().in_use, before + 700);
        for (reference, frame) in granted {
            test.equal("end", grant::end(reference), Ok(()));
            test.check(grant::end(reference).is_err(), "a grant ended twice");
            // SAFETY: taken above, and no longer granted.
            unsafe { frames::free(frame, 1) };
        }
        test.equal("grants in use", grant::statistics().in_use, before);
    }

    /// xenstore knows this domain's name, and keeps what is written.
    fn xenstore_reads_and_writes(test) {
        let Some(store) = xenstore(test) else { return };
        let name = task::block_on(store.read("name"));
        if let Some(name) = test.ok("read name", name) {
            test.check(!name.is_empty(), "the domain has no name");
        }
        let done = task::block_on(async {
            store.write("data/test", b"value").await?;
            let value = store.read("data/test").await?;
            store.remove("data/test").await?;
            Ok::<_, XenStoreError>((value, store.read_if_there("data/test").await?))
        });
        if let Some((value, gone)) = test.ok("write, read, remove", done) {
            test.equal("value", &value[..], &b"value"[..]);
            test.equal("after removal", gone, None);
        }
        let missing = task::block_on(store.read("data/nonesuch"));
        test.check(missing.is_err_and(XenStoreError::is_not_found), "a node that is not there was found");
    }

    /// A directory as long as the daemon lets a guest make one (2 KiB of names) is listed whole.
    fn xenstore_lists_directories(test) {
        let Some(store) = xenstore(test) else { return };
        let listed = task::block_on(async {
            for number in 0..30 {
                let path = alloc::format!("data/long/{number:03}-a-name-that-fills-the-message-{}", "x".repeat(20));
                store.write(&path, b"").await?;
            }
            let listed = store.list("data/long").await;
            store.remove("data/long").await?;
            listed
        });
        if let Some(listed) = test.ok("list", listed) {
            test.equal("entries", listed.len(), 30);
        }
    }

    /// Permissions of a node of one's own are what they were set to.
    fn xenstore_permissions_are_kept(test) {
        let Some(store) = xenstore(test) else { return };
        let done = task::block_on(async {
            store.write("data/private", b"1").await?;
            let own = store.permissions("data/private").await?;
            let mut wanted = own.clone();
            wanted.truncate(1);
            if let Some(owner) = wanted.first_mut() {
                owner.access = StoreAccess::None;
            }
            wanted.push(Permission { access: StoreAccess::Read, domain: DomId(0) });
            store.set_permissions("data/private", wanted.clone()).await?;
            Ok::<_, XenStoreError>((wanted, store.permissions("data/private").await?))
        });
        if let Some((wanted, found)) = test.ok("permissions", done) {
            test.equal("permissions", found, wanted);
        }
    }

    /// A transaction that somebody came between is refused, and writing all at once tries again by itself.
    fn xenstore_conflicts_are_told_and_retried(test) {
        let Some(store) = xenstore(test) else { return };
        let done = task::block_on(async {
            store.write("data/c", b"0").await?;
            let transaction = store.begin().await?;
            let seen = transaction.read("data/c").await?;
            store.write("data/c", b"1").await?;
            transaction.write("data/c", b"2").await?;
            let commit = transaction.commit().await;
            let kept = store.read("data/c").await?;
            let nodes = [("c".into(), "3".into()), ("d".into(), "4".into())];
            store.write_all("data", &nodes).await?;
            Ok::<_, XenStoreError>((seen, commit, kept, store.read("data/d").await?))
        });
        if let Some((seen, commit, kept, after)) = test.ok("transactions", done) {
            test.equal("seen", &seen[..], &b"0"[..]);
            test.equal("commit", commit, Err(XenStoreError::Refused(StoreError::Again)));
            test.equal("kept", &kept[..], &b"1"[..]);
            test.equal("written at once", &after[..], &b"4"[..]);
        }
    }

    /// What a transaction writes is seen by others when it is committed, and a watch tells of it.
    fn xenstore_transactions_and_watches(test) {
        let Some(store) = xenstore(test) else { return };
        let done = task::block_on(time::timeout(Duration::from_secs(5), async {
            let mut watch = store.watch("data").await?;
            // A new watch fires once for itself.
            watch.changed().await?;
            let transaction = store.begin().await?;
            transaction.write("data/t", b"1").await?;
            let early = store.read_if_there("data/t").await?;
            transaction.commit().await?;
            let change = watch.changed().await?;
            Ok::<_, XenStoreError>((early, change, store.read("data/t").await?))
        }));
        let Ok(done) = done else {
            test.check(false, "no change was told within 5 s");
            return;
        };
        if let Some((early, change, value)) = test.ok("transaction", done) {
            test.equal("before the commit", early, None);
            test.equal("after it", &value[..], &b"1"[..]);
            test.check(change.ends_with("data/t"), format_args!("the watch told of {change:?}"));
        }
    }
}
