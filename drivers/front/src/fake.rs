//! A fake Xen for tests: a grant table, event channels and page frames that punish mistakes.
//!
//! Both ends run in one process. The front half gets a [`FakeXen`] as its [`XenHal`]; a back half maps and
//! copies through [`FakeXen::map`] and the other methods for peers. Punished by panic: freeing a page that is
//! granted, granting a page that is not allocated, ending a grant twice, an event on a closed port. Freed
//! pages are poisoned. On request it runs out of grants, memory or ports, and holds on to grants.
// UNSAFETY: hands out memory as page frames and lets the peer's half see it as atomics.
#![expect(unsafe_code, reason = "stands in for the hypervisor's view of guest memory")]

use std::collections::BTreeMap;
use std::ops::Deref;
use std::ptr::NonNull;
use std::sync::{Mutex, MutexGuard, PoisonError};

use janus_proto::addr::{DomId, Gpa, GrantRef, PAGE_SIZE, Port};
use janus_proto::sync::AtomicU32;

use crate::dma::FrameSource;
use crate::hal::{GrantAccess, HalError, StillInUse, XenHal};

/// What a freed page is filled with.
pub const POISON: u8 = 0xdb;

/// Why the peer cannot use a grant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GrantFault {
    /// No such reference.
    BadReference,
    /// Granted to another domain.
    WrongDomain,
    /// Granted read-only.
    ReadOnly,
}

#[derive(Debug)]
struct Grant {
    page: u64,
    peer: DomId,
    access: GrantAccess,
    /// Mappings by the peer.
    uses: usize,
    /// The peer is said to hold it for ever.
    held: bool,
}

#[derive(Debug, Default)]
struct PortState {
    peer: Option<DomId>,
    /// Events sent by the guest and not taken by the peer.
    to_peer: usize,
    /// Events sent by the peer and not taken by the guest.
    to_guest: bool,
}

#[derive(Debug, Default)]
struct State {
    /// Allocated runs: first byte and pages.
    runs: BTreeMap<u64, usize>,
    grants: BTreeMap<u32, Grant>,
    next_grant: u32,
    ports: BTreeMap<u32, PortState>,
    next_port: u32,
    leaked_pages: usize,
    /// Grants that may still be made; `None`: any number.
    grants_left: Option<usize>,
    /// Pages that may still be allocated.
    pages_left: Option<usize>,
    ports_left: Option<usize>,
    /// Grants are held from the moment they are made.
    hold_all: bool,
    notifications: usize,
}

/// The fake. Make one with [`FakeXen::new`]; it lives for ever, as the kernel's does.
#[derive(Debug, Default)]
pub struct FakeXen(Mutex<State>);

/// Adjacent pages that the peer has mapped; unmapped when dropped.
#[derive(Debug)]
pub struct Mapping {
    xen: &'static FakeXen,
    grants: Vec<GrantRef>,
    page: u64,
}

impl Deref for Mapping {
    type Target = [AtomicU32];
    fn deref(&self) -> &[AtomicU32] {
        // SAFETY: 1. page-aligned; 2. whole allocated pages: the fake panics when a granted page is freed, and
        // the grants cannot be ended while this mapping counts as a use; 3. seen as atomics only.
        unsafe {
            std::slice::from_raw_parts(
                std::ptr::with_exposed_provenance::<AtomicU32>(usize_of(self.page)),
                self.grants.len() * PAGE_SIZE / size_of::<AtomicU32>(),
            )
        }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        let mut state = self.xen.state();
        for grant in &self.grants {
            if let Some(grant) = state.grants.get_mut(&grant.0) {
                grant.uses -= 1;
            }
        }
    }
}

fn usize_of(value: u64) -> usize {
    usize::try_from(value).expect("a 64-bit host")
}

impl FakeXen {
    /// A new world, for ever.
    #[must_use]
    pub fn new() -> &'static Self {
        Box::leak(Box::default())
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // A test that panicked has failed already; the others go on.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    // --- The peer's side ---

    /// Maps a granted page, as `GNTTABOP_map_grant_ref` by domain `peer`.
    ///
    /// # Errors
    /// See [`GrantFault`].
    pub fn map(
        &'static self,
        peer: DomId,
        grant: GrantRef,
        access: GrantAccess,
    ) -> Result<Mapping, GrantFault> {
        self.map_all(peer, &[grant], access)
    }

    /// Maps pages that the guest granted in the order of their addresses, as a ring of several pages is.
    ///
    /// # Errors
    /// See [`GrantFault`].
    pub fn map_all(
        &'static self,
        peer: DomId,
        grants: &[GrantRef],
        access: GrantAccess,
    ) -> Result<Mapping, GrantFault> {
        let mut state = self.state();
        let mut first = None;
        for (index, grant) in grants.iter().enumerate() {
            let entry = state.grants.get(&grant.0).ok_or(GrantFault::BadReference)?;
            if entry.peer != peer {
                return Err(GrantFault::WrongDomain);
            }
            if access == GrantAccess::ReadWrite && entry.access == GrantAccess::ReadOnly {
                return Err(GrantFault::ReadOnly);
            }
            let start = *first.get_or_insert(entry.page);
            assert_eq!(
                entry.page,
                start + (index * PAGE_SIZE) as u64,
                "a fake maps adjacent pages"
            );
        }
        for grant in grants {
            if let Some(entry) = state.grants.get_mut(&grant.0) {
                entry.uses += 1;
            }
        }
        let page = first.ok_or(GrantFault::BadReference)?;
        Ok(Mapping { xen: self, grants: grants.to_vec(), page })
    }

    /// Sends the guest an event on its port `port`; `false` if it is closed.
    pub fn notify_guest(&self, port: Port) -> bool {
        match self.state().ports.get_mut(&port.0) {
            Some(state) => {
                state.to_guest = true;
                true
            }
            None => false,
        }
    }

    /// Takes the events that the guest sent on `port`; answers how many.
    pub fn take_for_peer(&self, port: Port) -> usize {
        self.state().ports.get_mut(&port.0).map_or(0, |state| std::mem::take(&mut state.to_peer))
    }

    // --- The guest's side, for tests ---

    /// Takes the guest's pending event on `port`.
    pub fn take_for_guest(&self, port: Port) -> bool {
        self.state().ports.get_mut(&port.0).is_some_and(|state| std::mem::take(&mut state.to_guest))
    }

    // --- What went on ---

    /// References that are granted now.
    #[must_use]
    pub fn granted(&self) -> usize {
        self.state().grants.len()
    }
    /// Ports that are open now.
    #[must_use]
    pub fn open_ports(&self) -> usize {
        self.state().ports.len()
    }
    /// Pages that are allocated now, leaked ones included.
    #[must_use]
    pub fn allocated_pages(&self) -> usize {
        self.state().runs.values().sum()
    }
    /// Pages that were reported as leaked.
    #[must_use]
    pub fn leaked_pages(&self) -> usize {
        self.state().leaked_pages
    }
    /// Events that the guest sent in all.
    #[must_use]
    pub fn notifications(&self) -> usize {
        self.state().notifications
    }

    // --- Lies and shortages ---

    /// Only `count` more grants succeed; `None`: all.
    pub fn limit_grants(&self, count: Option<usize>) {
        self.state().grants_left = count;
    }
    /// Only `count` more pages can be allocated; `None`: all.
    pub fn limit_pages(&self, count: Option<usize>) {
        self.state().pages_left = count;
    }
    /// Only `count` more ports can be allocated; `None`: all.
    pub fn limit_ports(&self, count: Option<usize>) {
        self.state().ports_left = count;
    }
    /// The peer holds on to every page granted now and later (`true`), or lets go of all (`false`).
    pub fn hold_everything(&self, hold: bool) {
        let mut state = self.state();
        state.hold_all = hold;
        for grant in state.grants.values_mut() {
            grant.held = hold;
        }
    }
    /// The peer holds on to the page behind one reference.
    pub fn hold(&self, grant: GrantRef) {
        if let Some(grant) = self.state().grants.get_mut(&grant.0) {
            grant.held = true;
        }
    }
}

fn take_one(left: &mut Option<usize>, count: usize) -> bool {
    match left {
        None => true,
        Some(rest) if *rest >= count => {
            *rest -= count;
            true
        }
        Some(_) => false,
    }
}

// SAFETY: memory comes from the global allocator, page-aligned and zeroed, and is the caller's until freed.
unsafe impl FrameSource for FakeXen {
    fn allocate(&self, pages: usize) -> Option<NonNull<u8>> {
        let mut state = self.state();
        if !take_one(&mut state.pages_left, pages) {
            return None;
        }
        let layout = std::alloc::Layout::from_size_align(pages * PAGE_SIZE, PAGE_SIZE).ok()?;
        // SAFETY: the layout is not of size 0, because `DmaBuf` asks for at least one page.
        let memory = NonNull::new(unsafe { std::alloc::alloc_zeroed(layout) })?;
        state.runs.insert(memory.as_ptr().expose_provenance() as u64, pages);
        Some(memory)
    }

    unsafe fn free(&self, start: NonNull<u8>, pages: usize) {
        let mut state = self.state();
        let first = start.as_ptr().expose_provenance() as u64;
        assert_eq!(state.runs.remove(&first), Some(pages), "freed what was not allocated");
        let end = first + (pages * PAGE_SIZE) as u64;
        if let Some((number, grant)) =
            state.grants.iter().find(|(_, grant)| (first..end).contains(&grant.page))
        {
            panic!("freed page {:#x} while grant {number} gives it away", grant.page);
        }
        // SAFETY: the run is allocated and the caller says that nobody uses it.
        unsafe { start.as_ptr().write_bytes(POISON, pages * PAGE_SIZE) };
        let layout = std::alloc::Layout::from_size_align(pages * PAGE_SIZE, PAGE_SIZE)
            .expect("the layout of its allocation");
        // SAFETY: allocated above with the same layout.
        unsafe { std::alloc::dealloc(start.as_ptr(), layout) };
    }

    fn guest_address(&self, memory: NonNull<u8>) -> Gpa {
        Gpa(memory.as_ptr().expose_provenance() as u64)
    }
}

// SAFETY: a grant that was ended is removed, so `map` refuses it; existing mappings forbid ending it.
unsafe impl XenHal for &'static FakeXen {
    fn frames(&self) -> &'static dyn FrameSource {
        *self
    }

    unsafe fn grant(
        &self,
        peer: DomId,
        page: Gpa,
        access: GrantAccess,
    ) -> Result<GrantRef, HalError> {
        let mut state = self.state();
        assert_eq!(page.0 % PAGE_SIZE as u64, 0, "a grant of half a page");
        let inside = state
            .runs
            .range(..=page.0)
            .next_back()
            .is_some_and(|(first, pages)| page.0 < first + (pages * PAGE_SIZE) as u64);
        assert!(inside, "granted page {:#x}, which is not allocated", page.0);
        if !take_one(&mut state.grants_left, 1) {
            return Err(HalError::NoGrants);
        }
        let held = state.hold_all;
        // References 0 to 7 are reserved (`grant_table.h`, GNTTAB_NR_RESERVED_ENTRIES).
        let number = 8 + state.next_grant;
        state.next_grant += 1;
        state.grants.insert(number, Grant { page: page.0, peer, access, uses: 0, held });
        Ok(GrantRef(number))
    }

    fn end_grant(&self, grant: GrantRef) -> Result<(), StillInUse> {
        let mut state = self.state();
        let entry = state.grants.get(&grant.0).expect("ended a grant that does not exist");
        if entry.uses > 0 || entry.held {
            return Err(StillInUse);
        }
        state.grants.remove(&grant.0);
        Ok(())
    }

    fn allocate_port(&self, peer: DomId) -> Result<Port, HalError> {
        let mut state = self.state();
        if !take_one(&mut state.ports_left, 1) {
            return Err(HalError::NoPort);
        }
        state.next_port += 1;
        let port = state.next_port;
        state.ports.insert(port, PortState { peer: Some(peer), ..PortState::default() });
        Ok(Port(port))
    }

    fn notify(&self, port: Port) {
        let mut state = self.state();
        state.notifications += 1;
        let port = state.ports.get_mut(&port.0).expect("an event on a closed port");
        port.to_peer += 1;
    }

    fn close_port(&self, port: Port) {
        let closed = self.state().ports.remove(&port.0).expect("closed a closed port");
        assert!(closed.peer.is_some());
    }

    fn report_leak(&self, _: DomId, pages: usize) {
        self.state().leaked_pages += pages;
    }
}

/// A hal for drivers, for ever.
#[must_use]
pub fn hal_of(xen: &'static FakeXen) -> &'static dyn XenHal {
    Box::leak(Box::new(xen))
}
