//! What a guest asks for of its memory and parameters, and what it may not.

use std::sync::Mutex;

use super::*;
use crate::machine::ram::Numbering;
use crate::pv::bare::BareCpu;
use crate::pv::domain::Setup;
use crate::pv::fake::Script;

/// Frames: 0 and 1 are tables, 2 the arguments, 3 free; then shared info, rings, grant table.
const ARGUMENTS: u64 = 0x2000;
const SHARED_INFO: Mfn = Mfn(8);

type Puts = Arc<Mutex<Vec<(Mfn, Option<Mfn>)>>>;

struct Noted(Puts);

impl Physmap for Noted {
    fn put(&self, guest: Mfn, frame: Mfn) -> Result<(), Errno> {
        self.0.lock().unwrap().push((guest, Some(frame)));
        Ok(())
    }
    fn take(&self, guest: Mfn) -> Result<(), Errno> {
        self.0.lock().unwrap().push((guest, None));
        Ok(())
    }
}

struct Bench {
    cpu: BareCpu,
    domain: Arc<Domain>,
    space: Arc<HvmSpace>,
    puts: Puts,
    interrupts: Arc<Mutex<Vec<(usize, u8)>>>,
}

fn bench() -> Bench {
    let numbering = Numbering { first: Mfn(0), below: u64::MAX, above: Mfn(u64::MAX) };
    let ram = Arc::new(Ram::with_numbering(100, numbering, 0).unwrap());
    // One table of each level: all memory at its own address, in one page of 2 MiB.
    for (frame, entry) in [(0, 0x1001), (1, 0x3001), (3, HUGE_PAGE)] {
        ram.frame(Mfn(frame)).unwrap()[0].store(entry, Ordering::Relaxed);
    }
    let (puts, interrupts) = (Puts::default(), Arc::new(Mutex::new(Vec::new())));
    let noted = Arc::clone(&interrupts);
    let space = HvmSpace::new(Parts {
        ram: Arc::clone(&ram),
        map: vec![(0, 0x8000, 1), (0x8000, 0x5c000, 2)],
        frames: 8,
        vcpus: 2,
        rings: [(Mfn(9), Port(2)), (Mfn(10), Port(1))],
        shared_info: SHARED_INFO,
        grant_frames: Mfn(20),
        physmap: Box::new(Noted(Arc::clone(&puts))),
        interrupt: Box::new(move |vcpu, vector| noted.lock().unwrap().push((vcpu, vector))),
    });
    let setup = Setup {
        id: DomId(1),
        uuid: [0; 16],
        vcpus: 2,
        ram,
        shared_info: SHARED_INFO,
        grant_frames: Mfn(20),
        console: Mfn(9),
        store: Mfn(10),
    };
    let domain = Domain::new(&setup, space.clone()).unwrap();
    space.belongs_to(&domain);
    let cpu = BareCpu::new(Arc::clone(&domain), Script::new(Vec::new()));
    Bench { cpu, domain, space, puts, interrupts }
}

const HUGE_PAGE: u64 = 0x81;

impl Bench {
    fn call<T: IntoBytes + Immutable + FromBytes>(
        &mut self,
        number: Hypercall,
        op: u32,
        value: &mut T,
    ) -> i64 {
        self.space.write(0, ARGUMENTS, value.as_bytes()).unwrap();
        let answer = self.cpu.call(number.0, [op.into(), ARGUMENTS, 0, 0, 0, 0]).unwrap();
        *value = self.space.read_value(0, ARGUMENTS).unwrap();
        answer
    }

    fn map(&mut self, space: MapSpace, idx: u64, gpfn: u64) -> i64 {
        let gpfn = janus_proto::addr::Pfn(gpfn);
        let mut add = AddToPhysmap { domid: DomId::SELF, size: 0, space, idx, gpfn };
        self.call(Hypercall::MEMORY_OP, MemoryOp::ADD_TO_PHYSMAP.0, &mut add)
    }
}

#[test]
fn pages_are_put_where_the_guest_wants_them_and_only_those_it_may_have() {
    let mut bench = bench();
    assert_eq!(bench.map(MapSpace::SHARED_INFO, 0, 5), 0);
    assert_eq!(bench.map(MapSpace::GRANT_TABLE, 3, 0x12345), 0);
    assert_eq!(bench.map(MapSpace::GRANT_TABLE, STATUS, 0x12346), 0);
    let expected = [(5, 8), (0x12345, 23), (0x12346, 20 + MAX_GRANT_FRAMES)];
    let expected = expected.map(|(guest, frame)| (Mfn(guest), Some(Mfn(frame))));
    assert_eq!(*bench.puts.lock().unwrap(), expected);
    let invalid = -i64::from(Errno::EINVAL.0);
    assert_eq!(bench.map(MapSpace::SHARED_INFO, 1, 5), invalid);
    assert_eq!(bench.map(MapSpace::GRANT_TABLE, MAX_GRANT_FRAMES, 5), invalid);
    assert_eq!(bench.map(MapSpace::GRANT_TABLE, STATUS | MAX_STATUS_FRAMES, 5), invalid);
    assert_eq!(bench.map(MapSpace::GRANT_TABLE, !STATUS, 5), invalid);
    assert_eq!(bench.map(MapSpace::GMFN, 0, 5), invalid);
    assert_eq!(bench.puts.lock().unwrap().len(), 3);
}

#[test]
fn parameters_say_where_the_rings_are_and_nobody_moves_them() {
    let mut bench = bench();
    let mut param = |index, op: HvmOp, value| {
        let mut param = HvmParamValue { domid: DomId::SELF, pad: 0, index, value };
        let answer = bench.call(Hypercall::HVM_OP, op.0, &mut param);
        (answer, param.value)
    };
    assert_eq!(param(HvmParam::CONSOLE_PFN, HvmOp::GET_PARAM, 0), (0, 9));
    assert_eq!(param(HvmParam::CONSOLE_EVTCHN, HvmOp::GET_PARAM, 0), (0, 2));
    assert_eq!(param(HvmParam::STORE_PFN, HvmOp::GET_PARAM, 0), (0, 10));
    assert_eq!(param(HvmParam::STORE_EVTCHN, HvmOp::GET_PARAM, 0), (0, 1));
    let refused = -i64::from(Errno::EPERM.0);
    assert_eq!(param(HvmParam::STORE_PFN, HvmOp::SET_PARAM, 3).0, refused);
    assert_eq!(param(HvmParam(60), HvmOp::GET_PARAM, 0).0, -i64::from(Errno::EINVAL.0));
}

#[test]
fn an_event_that_came_before_its_vector_is_told_of_when_there_is_one() {
    let mut bench = bench();
    bench.domain.vcpu(1).mark_pending();
    bench.space.upcall(1);
    assert!(bench.interrupts.lock().unwrap().is_empty());
    for (vcpu, vector, answer) in
        [(1, 0xf3, 0), (2, 0xf3, -i64::from(Errno::ENOENT.0)), (0, 3, -i64::from(Errno::EINVAL.0))]
    {
        let mut upcall = EvtchnUpcallVector { vcpu, vector, pad0: [0; 3] };
        let op = HvmOp::SET_EVTCHN_UPCALL_VECTOR.0;
        assert_eq!(bench.call(Hypercall::HVM_OP, op, &mut upcall), answer);
    }
    assert_eq!(*bench.interrupts.lock().unwrap(), [(1, 0xf3)]);
}

#[test]
fn calls_for_paravirtualised_memory_do_not_exist() {
    let mut bench = bench();
    for number in [Hypercall::MMU_UPDATE, Hypercall::SET_TRAP_TABLE, Hypercall::IRET] {
        let answer = bench.cpu.call(number.0, [0; 6]);
        assert_eq!(answer, Some(-i64::from(Errno::ENOSYS.0)), "{number:?}");
    }
    let far = bench.cpu.call(Hypercall::MEMORY_OP.0, [7, 0x7fff_0000_0000, 0, 0, 0, 0]);
    assert_eq!(far, Some(-i64::from(Errno::EFAULT.0)));
}
