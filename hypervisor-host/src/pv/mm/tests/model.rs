//! Any sequence of calls leaves the counts as a recount has them, and nothing writable that must not be.

use janus_proto::abi::xen::memory::{MemoryOp, Reservation};
use janus_proto::addr::DomId;
use proptest::prelude::*;
use zerocopy::IntoBytes as _;

use super::*;

/// One thing that a guest does.
#[derive(Clone, Debug)]
enum Deed {
    Update { table: u64, index: u64, value: u64, kind: u64 },
    Map { address: u64, value: u64 },
    Extended { cmd: u32, pfn: u64, other: u64 },
    Poke { pfn: u64, index: usize, value: u64 },
    Fault { address: u64, error: u32 },
    Gdt { pfn: u64, entries: u64 },
    Reserve { operation: u32, pfn: u64 },
    Mode { user: bool },
}

fn bits() -> impl Strategy<Value = u64> {
    prop_oneof![
        4 => Just(P),
        6 => Just(RW),
        2 => Just(P | Entry::USER),
        2 => Just(RW | Entry::ACCESSED | Entry::DIRTY),
        1 => Just(P | Entry::NO_EXECUTE),
        1 => Just(0),
        1 => Just(P | 1 << 7),
    ]
}

/// A frame: mostly one of the few that matter, else Xen's or nobody's.
fn frame() -> impl Strategy<Value = u64> {
    prop_oneof![8 => 0..12u64, 4 => 16..24u64, 1 => 0..700u64]
}

fn index() -> impl Strategy<Value = u64> {
    prop_oneof![6 => 0..16u64, 1 => Just(256u64), 1 => 0..512u64]
}

fn address() -> impl Strategy<Value = u64> {
    prop_oneof![
        8 => (0..4u64, 0..18u64).prop_map(|(table, page)| table << 21 | page << 12),
        2 => (0..4u64, 0..4u64, 0..4u64, 0..16u64)
            .prop_map(|(a, b, c, d)| a << 39 | b << 30 | c << 21 | d << 12),
        1 => any::<u64>(),
    ]
}

fn deed() -> impl Strategy<Value = Deed> {
    prop_oneof![
        8 => (frame(), index(), frame(), bits(), 0..4u64).prop_map(
            |(table, index, pfn, bits, kind)| Deed::Update { table, index, value: entry(pfn, bits), kind }
        ),
        6 => (address(), frame(), bits())
            .prop_map(|(address, pfn, bits)| Deed::Map { address, value: entry(pfn, bits) }),
        6 => (0..21u32, frame(), frame())
            .prop_map(|(cmd, pfn, other)| Deed::Extended { cmd, pfn, other }),
        3 => (frame(), 0..16usize, frame(), bits()).prop_map(
            |(pfn, index, to, bits)| Deed::Poke { pfn, index, value: entry(to, bits) }
        ),
        8 => (address(), prop_oneof![Just(4u32), Just(6), Just(0x14)])
            .prop_map(|(address, error)| Deed::Fault { address, error }),
        1 => (frame(), 0..600u64).prop_map(|(pfn, entries)| Deed::Gdt { pfn, entries }),
        2 => (prop_oneof![Just(0u32), Just(1), Just(6)], frame())
            .prop_map(|(operation, pfn)| Deed::Reserve { operation, pfn }),
        1 => any::<bool>().prop_map(|user| Deed::Mode { user }),
    ]
}

impl Guest {
    fn does(&mut self, deed: &Deed) {
        match *deed {
            Deed::Update { table, index, value, kind } => {
                let update = MmuUpdate { ptr: (mfn(table).0 << 12) + index * 8 + kind, val: value };
                let _ = self.memory.update_entry(&mut self.engine, update);
                self.memory.resident.apply(&mut self.engine);
            }
            Deed::Map { address, value } => {
                let _ = self.map(address, value);
            }
            Deed::Extended { cmd, pfn, other } => {
                let _ = self.extended(MmuextCmd(cmd), mfn(pfn).0, mfn(other).0);
            }
            Deed::Poke { pfn, index, value } => {
                // A guest writes what it can: pages that are mapped writable somewhere, or nobody's business.
                let known = self.memory.frame(mfn(pfn));
                let free = known.is_some_and(|frame| {
                    frame.owner == Owner::Guest && (frame.uses == 0 || frame.kind == Kind::Writable)
                });
                if free {
                    self.poke(pfn, index, value);
                }
            }
            Deed::Fault { address, error } => {
                let _ = self.fault(address, error);
            }
            Deed::Gdt { pfn, entries } => {
                let frames = [mfn(pfn).0];
                let count = usize::from(entries > 0);
                let _ = self.memory.load_gdt(0, &frames[..count], entries.min(512));
            }
            Deed::Reserve { operation, pfn } => {
                let Ok(()) = self.memory.copy_to_guest(0, 0x9000, &mfn(pfn).0.to_le_bytes()) else {
                    return;
                };
                let reservation = Reservation {
                    extent_start: 0x9000,
                    nr_extents: 1,
                    extent_order: 0,
                    mem_flags: 0,
                    domid: DomId::SELF,
                    pad0: [0; 6],
                };
                let Ok(()) = self.memory.copy_to_guest(0, 0x8000, reservation.as_bytes()) else {
                    return;
                };
                let operation = MemoryOp(operation).0.into();
                let arguments = [operation, 0x8000, 0, 0, 0, 0];
                let _ = self.memory.memory_op(0, &mut self.engine, arguments);
            }
            Deed::Mode { user } => {
                let cpu = &mut self.memory.cpus[0];
                if let Some(root) = if user { cpu.user_root } else { cpu.root } {
                    cpu.user = user;
                    self.engine.switch(root);
                }
            }
        }
    }
}

proptest! {
    #[test]
    fn counts_are_always_those_of_a_recount(
        deeds in proptest::collection::vec(deed(), 1..60),
    ) {
        let mut guest = Guest::new();
        for deed in &deeds {
            guest.does(deed);
            audit(&guest);
        }
    }
}
