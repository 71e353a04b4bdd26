//! The `acpi` crate's view of the machine: physical memory, ports, PCI configuration, time.
// UNSAFETY: reads and writes what byte code of the firmware names.
#![expect(unsafe_code, reason = "firmware tables and byte code name raw addresses")]

use core::ptr::NonNull;
use core::sync::atomic::{AtomicU32, Ordering};

use acpi::aml::AmlError;
use acpi::{Handle, Handler, PciAddress, PhysicalMapping};
use janus_proto::addr::{PAGE_SIZE, Pfn};
use x86_64::instructions::port::Port;

use crate::mm::paging::{self, Flags};
use crate::platform;

/// The kernel as the `acpi` crate sees it.
#[derive(Clone, Copy, Debug)]
pub(super) struct KernelHandler;

static MUTEXES: AtomicU32 = AtomicU32::new(0);

/// Maps what is not mapped of a piece of physical memory, cached: tables lie in reserved RAM.
pub(super) fn map(address: usize, size: usize) {
    let first = address / PAGE_SIZE;
    let last = address.saturating_add(size.max(1) - 1) / PAGE_SIZE;
    for page in first..=last {
        if !paging::native::is_mapped(page * PAGE_SIZE) {
            // SAFETY: not mapped, so nothing refers to it; firmware memory is not the kernel's RAM.
            let result =
                unsafe { paging::map(page * PAGE_SIZE, Pfn(page as u64), 1, Flags::WRITE) };
            if let Err(error) = result {
                panic!("firmware table at {address:#x}: {error}");
            }
        }
    }
}

/// Runs one access to physical memory, mapped first.
fn memory<T>(address: usize) -> *mut T {
    map(address, size_of::<T>());
    core::ptr::with_exposed_provenance_mut(address)
}

/// Selects a PCI configuration register by the legacy ports (PCI 3.0, 3.2.2.3.2) and gives its data port.
fn pci_port(address: PciAddress, offset: u16) -> u16 {
    const ADDRESS: u16 = 0xcf8;
    const DATA: u16 = 0xcfc;
    let value = 1 << 31
        | u32::from(address.bus()) << 16
        | u32::from(address.device()) << 11
        | u32::from(address.function()) << 8
        | u32::from(offset & 0xfc);
    // SAFETY: selects a register; reads and writes follow.
    unsafe { Port::new(ADDRESS).write(value) }
    DATA + (offset & 3)
}

macro_rules! accessors {
    ($($int:ty: $read:ident $write:ident,)*) => {$(
        fn $read(&self, address: usize) -> $int {
            // SAFETY: mapped by `memory`; the firmware's byte code names a register or its own memory.
            unsafe { memory::<$int>(address).read_volatile() }
        }
        fn $write(&self, address: usize, value: $int) {
            // SAFETY: as above.
            unsafe { memory::<$int>(address).write_volatile(value) }
        }
    )*};
}

macro_rules! port_accessors {
    ($($int:ty: $read:ident $write:ident $pci_read:ident $pci_write:ident,)*) => {$(
        fn $read(&self, port: u16) -> $int {
            // SAFETY: the firmware's byte code knows its ports.
            unsafe { Port::new(port).read() }
        }
        fn $write(&self, port: u16, value: $int) {
            // SAFETY: as above.
            unsafe { Port::new(port).write(value) }
        }
        fn $pci_read(&self, address: PciAddress, offset: u16) -> $int {
            // SAFETY: a configuration register, of which reading has no effect on memory.
            unsafe { Port::new(pci_port(address, offset)).read() }
        }
        fn $pci_write(&self, address: PciAddress, offset: u16, value: $int) {
            // SAFETY: the firmware's byte code knows its devices.
            unsafe { Port::new(pci_port(address, offset)).write(value) }
        }
    )*};
}

impl Handler for KernelHandler {
    unsafe fn map_physical_region<T>(
        &self,
        physical_address: usize,
        size: usize,
    ) -> PhysicalMapping<Self, T> {
        map(physical_address, size);
        let virtual_start = NonNull::new(core::ptr::with_exposed_provenance_mut(physical_address))
            .unwrap_or(NonNull::dangling());
        PhysicalMapping {
            physical_start: physical_address,
            virtual_start,
            region_length: size,
            mapped_length: size,
            handler: *self,
        }
    }
    /// Nothing is unmapped: it is firmware memory at its own address, which disturbs nobody.
    fn unmap_physical_region<T>(_region: &PhysicalMapping<Self, T>) {}

    accessors! {
        u8: read_u8 write_u8,
        u16: read_u16 write_u16,
        u32: read_u32 write_u32,
        u64: read_u64 write_u64,
    }
    port_accessors! {
        u8: read_io_u8 write_io_u8 read_pci_u8 write_pci_u8,
        u16: read_io_u16 write_io_u16 read_pci_u16 write_pci_u16,
        u32: read_io_u32 write_io_u32 read_pci_u32 write_pci_u32,
    }

    fn nanos_since_boot(&self) -> u64 {
        platform::now_ns()
    }
    fn stall(&self, microseconds: u64) {
        let end_ns = platform::now_ns().saturating_add(microseconds.saturating_mul(1000));
        while platform::now_ns() < end_ns {
            core::hint::spin_loop();
        }
    }
    fn sleep(&self, milliseconds: u64) {
        self.stall(milliseconds.saturating_mul(1000));
    }
    fn create_mutex(&self) -> Handle {
        Handle(MUTEXES.fetch_add(1, Ordering::Relaxed))
    }
    /// Byte code runs under one lock (`aml.rs`), so its mutexes are always free.
    fn acquire(&self, _mutex: Handle, _timeout: u16) -> Result<(), AmlError> {
        Ok(())
    }
    fn release(&self, _mutex: Handle) {}
}
