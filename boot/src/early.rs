//! The early console: one line per door, the panics before the kernel has a console, and nothing else.
//!
//! Native doors have COM1 and the debug console port; under Xen there is `console_io` (first
//! domain) or the console ring (`xen/include/public/io/console.h`), found in start_info under PV and
//! by HVM parameters under PVH. No locks, no allocation, one CPU.
// UNSAFETY: port I/O, hypercalls and the shared ring page.
#![cfg_attr(target_os = "none", expect(unsafe_code, reason = "ports, hypercalls, the ring page"))]

use core::fmt;

/// Writes to the early console; on the host, where there is none, to nowhere.
#[derive(Clone, Copy, Debug)]
pub struct EarlyConsole;

impl fmt::Write for EarlyConsole {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        write(text.as_bytes());
        Ok(())
    }
}

#[cfg(not(target_os = "none"))]
/// Writes `bytes`; the host has no early console.
pub fn write(_bytes: &[u8]) {}

#[cfg(target_os = "none")]
pub use guest::{crash, power_off, write};
#[cfg(target_os = "none")]
pub(crate) use guest::{init_native, init_pv, write_to_xen, xen_memory_map};

#[cfg(target_os = "none")]
mod guest {
    use crate::hypercall::{self, Gate, hypercall};
    use core::arch::{asm, x86_64::__cpuid};
    use core::sync::atomic::{AtomicU8, AtomicU32, AtomicUsize, Ordering::Relaxed, fence};

    const COM1: u16 = 0x3f8;
    const DEBUGCON: u16 = 0xe9;
    const DEBUG_EXIT: u16 = 0xf4;

    // Which outputs are there.
    const TO_DEBUGCON: u8 = 1 << 0;
    const TO_COM1: u8 = 1 << 1;
    const TO_CONSOLE_IO: u8 = 1 << 2;
    const TO_RING: u8 = 1 << 3;

    static OUTPUTS: AtomicU8 = AtomicU8::new(0);
    static GATE: AtomicU8 = AtomicU8::new(0);
    static RING: AtomicUsize = AtomicUsize::new(0);
    static RING_PORT: AtomicU32 = AtomicU32::new(0);

    fn outb(port: u16, value: u8) {
        // SAFETY: only used for the ports above, which move no memory.
        unsafe { asm!("out dx, al", in("dx") port, in("al") value, options(nomem, nostack)) }
    }

    fn inb(port: u16) -> u8 {
        let value;
        // SAFETY: as above.
        unsafe { asm!("in al, dx", in("dx") port, out("al") value, options(nomem, nostack)) }
        value
    }

    fn gate() -> Option<Gate> {
        match GATE.load(Relaxed) {
            1 => Some(Gate::Syscall),
            2 => Some(Gate::Vmcall),
            3 => Some(Gate::Vmmcall),
            _ => None,
        }
    }

    /// Finds the outputs of a native door: ports, and Xen's console when Xen is there.
    pub(crate) fn init_native() {
        let mut outputs = 0;
        if let Some(gate) = xen_gate() {
            GATE.store(gate as u8, Relaxed);
            if find_hvm_ring(gate) {
                outputs |= TO_RING;
            } else {
                outputs |= TO_CONSOLE_IO;
            }
        }
        // QEMU's debug console reads back its own port number.
        if inb(DEBUGCON) == 0xe9 {
            outputs |= TO_DEBUGCON;
        }
        if inb(COM1 + 5) != 0xff {
            // 115200 baud, 8n1, no interrupts. The FIFOs stay as they are: switching them clears what was typed.
            for (offset, value) in [(1, 0), (3, 0x80), (0, 1), (1, 0), (3, 3), (4, 3)] {
                outb(COM1 + offset, value);
            }
            outputs |= TO_COM1;
        }
        OUTPUTS.store(outputs, Relaxed);
    }

    /// Takes the console of a PV guest: the ring at virtual address `ring`, or `console_io`.
    pub(crate) fn init_pv(ring: Option<(usize, u32)>) {
        GATE.store(Gate::Syscall as u8, Relaxed);
        let output = match ring {
            Some((address, port)) => {
                RING.store(address, Relaxed);
                RING_PORT.store(port, Relaxed);
                TO_RING
            }
            None => TO_CONSOLE_IO,
        };
        OUTPUTS.store(output, Relaxed);
    }

    /// Is Xen beneath (`arch-x86/cpuid.h`), and by which instruction is it called?
    fn xen_gate() -> Option<Gate> {
        // Xen stands first, or behind a Hyper-V face. Each look leaves the virtual machine.
        const FACES: u32 = 4;
        const HYPERVISOR: u32 = 1 << 31;
        if __cpuid(1).ecx & HYPERVISOR == 0 {
            return None;
        }
        let present = (0..FACES).map(|face| 0x4000_0000 + face * 0x100).any(|base| {
            let leaf = __cpuid(base);
            // "XenVMMXenVMM"
            (leaf.ebx, leaf.ecx, leaf.edx) == (0x566e_6558, 0x6558_4d4d, 0x4d4d_566e)
        });
        if !present {
            return None;
        }
        // "AuthenticAMD", "HygonGenuine": vmmcall.
        let vendor = __cpuid(0).ecx;
        Some(if vendor == 0x444d_4163 || vendor == 0x656e_6975 {
            Gate::Vmmcall
        } else {
            Gate::Vmcall
        })
    }

    /// Asks for the console ring of a PVH guest (`hvm/params.h`).
    fn find_hvm_ring(gate: Gate) -> bool {
        const HVM_PARAM_CONSOLE_PFN: u32 = 17;
        const HVM_PARAM_CONSOLE_EVTCHN: u32 = 18;
        let (Some(pfn), Some(port)) =
            (hvm_param(gate, HVM_PARAM_CONSOLE_PFN), hvm_param(gate, HVM_PARAM_CONSOLE_EVTCHN))
        else {
            return false;
        };
        // The boot tables map 4 GiB.
        if pfn == 0 || pfn >= 1 << 20 || port == 0 {
            return false;
        }
        let (Ok(ring), Ok(port)) = (usize::try_from(pfn << 12), u32::try_from(port)) else {
            return false;
        };
        RING.store(ring, Relaxed);
        RING_PORT.store(port, Relaxed);
        true
    }

    fn hvm_param(gate: Gate, index: u32) -> Option<u64> {
        #[repr(C)]
        struct XenHvmParam {
            domid: u16,
            pad: u16,
            index: u32,
            value: u64,
        }
        const HVMOP_GET_PARAM: u64 = 1;
        const DOMID_SELF: u16 = 0x7ff0;
        let mut param = XenHvmParam { domid: DOMID_SELF, pad: 0, index, value: 0 };
        let address = (&raw mut param).expose_provenance() as u64;
        // SAFETY: the call writes `param.value` and nothing else.
        let result = unsafe { hypercall(gate, hypercall::HVM_OP, HVMOP_GET_PARAM, address, 0) };
        (result == 0).then_some(param.value)
    }

    /// Asks Xen for the memory map that version 0 of hvm_start_info does not have (`memory.h`).
    pub(crate) fn xen_memory_map(info: &mut crate::BootInfo) {
        const XENMEM_MEMORY_MAP: u64 = 9;
        const ENTRY: usize = 20;
        const ENTRIES: u32 = 128;
        #[repr(C)]
        struct XenMemoryMap {
            nr_entries: u32,
            buffer: u64,
        }
        let Some(gate) = gate() else { return };
        let mut table = [0u8; ENTRY * ENTRIES as usize];
        let mut map = XenMemoryMap {
            nr_entries: ENTRIES,
            buffer: table.as_mut_ptr().expose_provenance() as u64,
        };
        let address = (&raw mut map).expose_provenance() as u64;
        // SAFETY: the call writes `nr_entries` and that many entries, at most as many as there is
        // room for.
        let result =
            unsafe { hypercall(gate, hypercall::MEMORY_OP, XENMEM_MEMORY_MAP, address, 0) };
        if result != 0 {
            return;
        }
        for entry in table.chunks_exact(ENTRY).take(map.nr_entries as usize) {
            let field = |offset| crate::memory::read_u64(entry, offset).unwrap_or(0);
            let kind = crate::memory::read_u32(entry, 16).unwrap_or(0);
            info.add_memory(field(0), field(8), crate::MemoryKind::from_e820(kind));
        }
    }

    /// Writes `bytes` to every output there is.
    pub fn write(bytes: &[u8]) {
        let outputs = OUTPUTS.load(Relaxed);
        if outputs & TO_DEBUGCON != 0 {
            for &byte in bytes {
                outb(DEBUGCON, byte);
            }
        }
        if outputs & TO_COM1 != 0 {
            for &byte in bytes {
                // Bounded: a UART that never empties must not hang the boot.
                let _ = (0..10_000).find(|_| inb(COM1 + 5) & 0x20 != 0);
                outb(COM1, byte);
            }
        }
        write_to_xen(bytes);
    }

    /// Writes `bytes` to Xen's console only: the assembly has had the ports already.
    pub(crate) fn write_to_xen(bytes: &[u8]) {
        let outputs = OUTPUTS.load(Relaxed);
        let Some(gate) = gate() else { return };
        if outputs & TO_CONSOLE_IO != 0 {
            const CONSOLEIO_WRITE: u64 = 0;
            let address = bytes.as_ptr().expose_provenance() as u64;
            // SAFETY: the call reads `bytes`.
            let _ = unsafe {
                hypercall(gate, hypercall::CONSOLE_IO, CONSOLEIO_WRITE, bytes.len() as u64, address)
            };
        }
        if outputs & TO_RING != 0 {
            write_to_ring(gate, bytes);
        }
    }

    // struct xencons_interface: in[1024], out[2048], in_cons, in_prod, out_cons, out_prod.
    const OUT: usize = 1024;
    const OUT_SIZE: usize = 2048;
    const OUT_CONS: usize = 3080;
    const OUT_PROD: usize = 3084;

    fn write_to_ring(gate: Gate, bytes: &[u8]) {
        let ring = RING.load(Relaxed);
        let index = |offset: usize| -> &'static AtomicU32 {
            let pointer = core::ptr::with_exposed_provenance::<AtomicU32>(ring + offset);
            // SAFETY: `ring` is the page that the hypervisor named as console ring, mapped and never
            // unmapped; the indices are aligned, and only ever seen as atomics.
            unsafe { &*pointer }
        };
        let slot = |position: u32| -> &'static AtomicU8 {
            let offset = OUT + position as usize % OUT_SIZE;
            let pointer = core::ptr::with_exposed_provenance::<AtomicU8>(ring + offset);
            // SAFETY: as above; the masked position stays inside `out`.
            unsafe { &*pointer }
        };
        for &byte in bytes {
            let prod = index(OUT_PROD).load(Relaxed);
            // Bounded: what nobody drains is dropped rather than waited for.
            let mut patience = 10_000;
            while prod.wrapping_sub(index(OUT_CONS).load(Relaxed)) as usize >= OUT_SIZE {
                if patience == 0 {
                    return;
                }
                patience -= 1;
                notify(gate);
                sched_op(gate, SCHEDOP_YIELD, 0);
            }
            slot(prod).store(byte, Relaxed);
            // The byte before the index that shows it.
            fence(core::sync::atomic::Ordering::Release);
            index(OUT_PROD).store(prod.wrapping_add(1), Relaxed);
        }
        notify(gate);
    }

    const SCHEDOP_YIELD: u64 = 0;
    const SCHEDOP_SHUTDOWN: u64 = 2;

    fn notify(gate: Gate) {
        const EVTCHNOP_SEND: u64 = 4;
        let port = RING_PORT.load(Relaxed);
        let address = (&raw const port).expose_provenance() as u64;
        // SAFETY: the call reads the port.
        let _ = unsafe { hypercall(gate, hypercall::EVENT_CHANNEL_OP, EVTCHNOP_SEND, address, 0) };
    }

    fn sched_op(gate: Gate, op: u64, argument: u64) {
        // SAFETY: yield has no argument; shutdown only reads its own.
        let _ = unsafe { hypercall(gate, hypercall::SCHED_OP, op, argument, 0) };
    }

    /// Ends the guest as crashed, in whatever way is there this early; stops the CPU otherwise.
    pub fn crash() -> ! {
        const SHUTDOWN_CRASH: u32 = 3;
        // CRASH (6) on QEMU's isa-debug-exit.
        end(SHUTDOWN_CRASH, 0x16)
    }

    /// Ends the guest in order, as [`crash`] does not.
    pub fn power_off() -> ! {
        const SHUTDOWN_POWEROFF: u32 = 0;
        end(SHUTDOWN_POWEROFF, 0x10)
    }

    /// Tells Xen this reason, or writes this to QEMU's isa-debug-exit, which elsewhere goes nowhere.
    fn end(reason: u32, debug_exit: u8) -> ! {
        match gate() {
            Some(gate) => {
                let address = (&raw const reason).expose_provenance() as u64;
                sched_op(gate, SCHEDOP_SHUTDOWN, address);
            }
            None => outb(DEBUG_EXIT, debug_exit),
        }
        loop {
            match gate() {
                Some(Gate::Syscall) => {
                    if let Some(gate) = gate() {
                        sched_op(gate, SCHEDOP_YIELD, 0);
                    }
                }
                // SAFETY: stops the CPU; interrupts are off.
                _ => unsafe { asm!("cli", "hlt", options(nomem, nostack)) },
            }
        }
    }
}
