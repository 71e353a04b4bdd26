//! Every hypercall with right, wrong and random arguments.

use proptest::prelude::*;

use janus_proto::abi::xen::event_channel::{BindIpi, InitControl};
use janus_proto::abi::xen::grant_table::{GrantStatus, SetVersion, SetupTable};
use janus_proto::abi::xen::version::CompileInfo;
use janus_proto::abi::xen::{MulticallEntry, VmAssist};
use janus_proto::addr::{DomId, Port};
use zerocopy::{FromZeros as _, IntoBytes as _};

use super::*;
use crate::pv::fake::{FRAMES, cpu, frame, put};

const SCRATCH: u64 = 0x5000;

fn call(cpu: &mut Cpu, number: Hypercall, arguments: &[u64]) -> i64 {
    let mut all = [0; 6];
    all[..arguments.len()].copy_from_slice(arguments);
    match dispatch(cpu, number, all) {
        Answer::Value(value) => value,
        other => panic!("{other:?}"),
    }
}

const EINVAL: i64 = -22;
const EFAULT: i64 = -14;
const ENOSYS: i64 = -38;

#[test]
fn calls_that_are_not_there_say_so_and_are_counted() {
    let (mut cpu, _) = cpu();
    for number in [11, 27, 38, 39, 43, 50, 63, 64, 1 << 32, u64::MAX] {
        assert_eq!(call(&mut cpu, Hypercall(number), &[]), ENOSYS, "{number}");
    }
    assert_eq!(cpu.shared().counters.unknown(), 10);
    assert_eq!((name(17), name(39)), ("xen_version", "unknown"));
}

#[test]
fn calls_for_others_look_at_their_argument_and_refuse() {
    let (mut cpu, _) = cpu();
    for (number, args, want) in [
        (7, [0, 0], EFAULT),
        (36, [SCRATCH, 0], -13),
        (31, [0, 0], EFAULT),
        (31, [17, SCRATCH], EINVAL),
        (34, [0, 0], EFAULT),
        (34, [1, SCRATCH], EINVAL),
        (34, [25, 0], -95),
        (34, [99, 0], ENOSYS),
        (37, [0, 0], -1),
        (40, [0, 0], -95),
        (41, [0, 0], EINVAL),
        (49, [0, 0], EFAULT),
    ] {
        assert_eq!(call(&mut cpu, Hypercall(number), &args), want, "{number} {args:?}");
    }
    put(&cpu, SCRATCH, &[1_u32, 0x15].map(u32::to_le_bytes).concat());
    assert_eq!(call(&mut cpu, Hypercall(35), &[SCRATCH]), -1);
    assert_eq!(cpu.shared().counters.unknown(), 0);
}

#[test]
fn a_multicall_answers_each_and_does_not_nest() {
    let (mut cpu, _) = cpu();
    let entry = |op: Hypercall, args| MulticallEntry { op: op.0, result: 77, args };
    let list = [
        entry(Hypercall::XEN_VERSION, [0; 6]),
        entry(Hypercall(39), [0; 6]),
        entry(Hypercall::MULTICALL, [SCRATCH, 1, 0, 0, 0, 0]),
        entry(Hypercall(38), [0; 6]),
        entry(Hypercall::STACK_SWITCH, [0, 0x7000, 0, 0, 0, 0]),
    ];
    put(&cpu, SCRATCH, list.as_bytes());
    assert_eq!(call(&mut cpu, Hypercall::MULTICALL, &[SCRATCH, 5]), 0);
    let results: [MulticallEntry; 5] = cpu.read(SCRATCH).unwrap();
    let results = results.map(|entry| entry.result.cast_signed());
    assert_eq!(results, [0x4_0011, ENOSYS, EINVAL, ENOSYS, 0]);
    assert_eq!(cpu.state.kernel_stack, 0x7000);
    assert_eq!(call(&mut cpu, Hypercall::MULTICALL, &[FRAMES * 4096 - 64, 2]), EFAULT);
    assert_eq!(call(&mut cpu, Hypercall::MULTICALL, &[0, 1 << 32]), 0);
    // A return to elsewhere ends the list.
    let list = [entry(Hypercall::IRET, [0; 6]), entry(Hypercall::STACK_SWITCH, [0, 1, 0, 0, 0, 0])];
    put(&cpu, SCRATCH, list.as_bytes());
    cpu.state.registers.rsp = 0x8000;
    put(
        &cpu,
        0x8000,
        &[5_u64, 0, 0, 0, 0x2222, 0xe030, 0, 0x6000, 0xe02b].map(u64::to_le_bytes).concat(),
    );
    let answer = dispatch(&mut cpu, Hypercall::MULTICALL, [SCRATCH, 2, 0, 0, 0, 0]);
    assert!(matches!(answer, Answer::Done) && cpu.state.kernel_stack == 0x7000);
    assert_eq!((cpu.state.registers.rip, cpu.state.registers.rax), (0x2222, 5));
}

#[test]
fn the_version_is_that_of_xen() {
    let (mut cpu, _) = cpu();
    let mut version = |op: u64, at: u64| call(&mut cpu, Hypercall::XEN_VERSION, &[op, at]);
    assert_eq!((version(0, 0), version(7, 0)), (0x4_0011, 4096));
    for op in [1, 2, 3, 4, 5, 8, 9] {
        assert_eq!((version(op, SCRATCH), version(op, 8)), (0, EFAULT), "{op}");
    }
    // Features: submap 0, then 1, then one that is not there.
    assert_eq!((version(10, 0), version(11, 0)), (20, ENOSYS));
    for (index, want) in [(0_u32, 0), (1, EINVAL), (2, EINVAL)] {
        put(&cpu, SCRATCH, &[index, 99].map(u32::to_le_bytes).concat());
        assert_eq!(call(&mut cpu, Hypercall::XEN_VERSION, &[6, SCRATCH]), want);
    }
    put(&cpu, SCRATCH, &20_u32.to_le_bytes());
    assert_eq!(call(&mut cpu, Hypercall::XEN_VERSION, &[10, SCRATCH]), 20);
    put(&cpu, SCRATCH, &19_u32.to_le_bytes());
    assert_eq!(call(&mut cpu, Hypercall::XEN_VERSION, &[10, SCRATCH]), -105);
    assert_eq!(call(&mut cpu, Hypercall::XEN_VERSION, &[2, SCRATCH]), 0);
    let info: CompileInfo = cpu.read(SCRATCH).unwrap();
    assert!(info.compiler.starts_with(b"rustc\0"));
}

#[test]
fn bases_stacks_debug_registers_and_assists_are_checked() {
    let (mut cpu, _) = cpu();
    for which in 0..3 {
        assert_eq!(call(&mut cpu, Hypercall::SET_SEGMENT_BASE, &[which, 0x1000]), 0);
        assert_eq!(call(&mut cpu, Hypercall::SET_SEGMENT_BASE, &[which, 1 << 50]), EINVAL);
    }
    assert_eq!(call(&mut cpu, Hypercall::SET_SEGMENT_BASE, &[4, 0]), EINVAL);
    let r = cpu.state.registers;
    assert_eq!((r.fs_base, r.gs_base, cpu.state.other_gs_base), (0x1000, 0x1000, 0x1000));
    assert_eq!(call(&mut cpu, Hypercall::SET_DEBUGREG, &[0, 0x1234]), 0);
    assert_eq!(call(&mut cpu, Hypercall::GET_DEBUGREG, &[0]), 0x1234);
    assert_eq!(call(&mut cpu, Hypercall::SET_DEBUGREG, &[1, 0xffff_8000_0000_0000]), -1);
    assert_eq!(call(&mut cpu, Hypercall::SET_DEBUGREG, &[7, 1 << 40]), EINVAL);
    assert_eq!(call(&mut cpu, Hypercall::SET_DEBUGREG, &[7, 1 << 13]), -1);
    // A breakpoint of I/O, active or not.
    assert_eq!(call(&mut cpu, Hypercall::SET_DEBUGREG, &[7, 0x2_0002]), -1);
    assert_eq!(call(&mut cpu, Hypercall::SET_DEBUGREG, &[7, 0x2_0000]), 0);
    assert_eq!(call(&mut cpu, Hypercall::SET_DEBUGREG, &[8, 0]), -19);
    assert_eq!(call(&mut cpu, Hypercall::GET_DEBUGREG, &[u64::MAX]), -19);
    assert_eq!(call(&mut cpu, Hypercall::VM_ASSIST, &[0, 4]), 0);
    assert!(cpu.domain.assists(VmAssist::ARCHITECTURAL_IOPL));
    for (command, kind) in [(0, 6), (2, 7), (0, 33), (0, u64::MAX)] {
        assert_eq!(call(&mut cpu, Hypercall::VM_ASSIST, &[command, kind]), EINVAL);
    }
    assert_eq!(call(&mut cpu, Hypercall::VM_ASSIST, &[2, 4]), ENOSYS);
}

#[test]
fn the_grant_table_grows_and_changes_its_layout() {
    let (mut cpu, _) = cpu();
    let argument = SetupTable {
        dom: DomId::SELF,
        nr_frames: 2,
        frame_list: SCRATCH + 64,
        ..SetupTable::new_zeroed()
    };
    let setup = |cpu: &mut Cpu, argument: &SetupTable| {
        put(cpu, SCRATCH, argument.as_bytes());
        assert_eq!(call(cpu, Hypercall::GRANT_TABLE_OP, &[2, SCRATCH, 1]), 0);
        cpu.read::<SetupTable>(SCRATCH).unwrap().status
    };
    assert_eq!(setup(&mut cpu, &argument), GrantStatus::OKAY);
    let frames: [u64; 2] = cpu.read(SCRATCH + 64).unwrap();
    assert_eq!(frames, [frame(FRAMES + 1).0, frame(FRAMES + 2).0]);
    let too_many = SetupTable { nr_frames: 65, ..argument };
    assert_eq!(setup(&mut cpu, &too_many), GrantStatus::GENERAL_ERROR);
    let foreign = SetupTable { dom: DomId(9), ..argument };
    assert_eq!(setup(&mut cpu, &foreign), GrantStatus::BAD_DOMAIN);
    assert_eq!(call(&mut cpu, Hypercall::GRANT_TABLE_OP, &[2, SCRATCH, 2]), EINVAL);
    assert_eq!(call(&mut cpu, Hypercall::GRANT_TABLE_OP, &[2, SCRATCH, 1 << 31]), EINVAL);
    // The toolstack's entries survive the change to version 2 and back, mapped as they are.
    let console = crate::memory::GrantMapper::map(
        &cpu.domain.grants(),
        &[janus_proto::abi::xen::grant_table::GNTTAB_RESERVED_CONSOLE],
        janus_proto::grant::Access::ReadWrite,
    )
    .unwrap();
    for (version, want) in [(2, 0), (2, 0), (1, 0), (3, EINVAL), (0, EINVAL)] {
        put(&cpu, SCRATCH, SetVersion { version }.as_bytes());
        let answer = call(&mut cpu, Hypercall::GRANT_TABLE_OP, &[8, SCRATCH, 1]);
        assert_eq!(answer, want, "{version}");
    }
    let entries = cpu.domain.ram().words(frame(FRAMES + 1), 1).unwrap();
    let entry = entries[0].load(Ordering::SeqCst);
    assert_eq!(entry, 1 | 8 | 16);
    drop(console);
    assert_eq!(entries[0].load(Ordering::SeqCst), 1);
}

#[test]
fn a_grant_copy_stays_inside_its_pages() {
    use janus_proto::abi::xen::grant_table::{Copy, CopyFlags, CopyPtr};
    let (mut cpu, space) = cpu();
    let end = |target: u64, offset| CopyPtr { target, domid: DomId::SELF, offset, pad0: [0; 4] };
    let copy = |cpu: &mut Cpu, source, dest, len| {
        let argument = Copy {
            source,
            dest,
            len,
            flags: CopyFlags::empty(),
            status: GrantStatus::OKAY,
            pad0: [0; 2],
        };
        put(cpu, SCRATCH, argument.as_bytes());
        assert_eq!(call(cpu, Hypercall::GRANT_TABLE_OP, &[5, SCRATCH, 1]), 0);
        cpu.read::<Copy>(SCRATCH).unwrap().status
    };
    put(&cpu, 0x6000, b"hello");
    let (from, to) = (frame(6).0, frame(7).0);
    assert_eq!(copy(&mut cpu, end(from, 0), end(to, 4091), 5), GrantStatus::OKAY);
    assert_eq!(&cpu.read::<[u8; 5]>(0x7ffb).unwrap(), b"hello");
    assert_eq!(copy(&mut cpu, end(from, 0), end(to, 4092), 5), GrantStatus::BAD_COPY_ARG);
    assert_eq!(copy(&mut cpu, end(7, 0), end(to, 0), 5), GrantStatus::BAD_PAGE);
    let shared = frame(FRAMES).0;
    assert_eq!(copy(&mut cpu, end(from, 0), end(shared, 0), 5), GrantStatus::BAD_PAGE);
    assert_eq!(space.references.load(Ordering::SeqCst), 0);
}

/// Frame `CONTROL` holds the control block, `ARRAY` the event words.
const CONTROL: u64 = 8;
const ARRAY: u64 = 9;

fn fifo() -> (Cpu, std::sync::Arc<crate::pv::fake::Flat>) {
    let (mut cpu, space) = cpu();
    let control_gfn = frame(CONTROL).0;
    let argument = InitControl { control_gfn, offset: 64, ..InitControl::new_zeroed() };
    put(&cpu, SCRATCH, argument.as_bytes());
    assert_eq!(call(&mut cpu, Hypercall::EVENT_CHANNEL_OP, &[11, SCRATCH]), 0);
    assert_eq!(cpu.read::<InitControl>(SCRATCH).unwrap().link_bits, 17);
    put(&cpu, SCRATCH, &frame(ARRAY).0.to_le_bytes());
    assert_eq!(call(&mut cpu, Hypercall::EVENT_CHANNEL_OP, &[12, SCRATCH]), 0);
    (cpu, space)
}

fn ipi(cpu: &mut Cpu) -> Port {
    put(cpu, SCRATCH, BindIpi { vcpu: 0, port: Port(0) }.as_bytes());
    assert_eq!(call(cpu, Hypercall::EVENT_CHANNEL_OP, &[7, SCRATCH]), 0);
    cpu.read::<BindIpi>(SCRATCH).unwrap().port
}

fn with_port(cpu: &mut Cpu, op: u64, words: &[u32]) -> i64 {
    let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
    put(cpu, SCRATCH, &bytes);
    call(cpu, Hypercall::EVENT_CHANNEL_OP, &[op, SCRATCH])
}

#[test]
fn queued_events_are_linked_by_priority_in_their_order() {
    let (mut cpu, space) = fifo();
    let ports: Vec<_> = (0..4).map(|_| ipi(&mut cpu)).collect();
    // The last one is more important.
    assert_eq!(with_port(&mut cpu, 13, &[ports[3].0, 2]), 0);
    assert_eq!(with_port(&mut cpu, 13, &[ports[3].0, 16]), EINVAL);
    // Words begin as zero: not masked.
    for port in &ports {
        assert_eq!(with_port(&mut cpu, 4, &[port.0]), 0);
    }
    let control: [u32; 18] = cpu.read(CONTROL * 4096 + 64).unwrap();
    assert_eq!((control[0], control[2 + 7], control[2 + 2]), (1 << 7 | 1 << 2, 1, 4));
    let words: [u32; 5] = cpu.read(ARRAY * 4096).unwrap();
    let linked = 0xa000_0000;
    assert_eq!(words, [0, linked | 2, linked | 3, linked, linked]);
    assert!(cpu.shared().is_pending());
    // A masked one is not linked until it is unmasked.
    let masked = ipi(&mut cpu);
    put(&cpu, ARRAY * 4096 + 20, &0x4000_0000_u32.to_le_bytes());
    assert_eq!(with_port(&mut cpu, 4, &[masked.0]), 0);
    assert_eq!(cpu.read::<u32>(ARRAY * 4096 + 20).unwrap(), 0xc000_0000);
    assert_eq!(with_port(&mut cpu, 9, &[masked.0]), 0);
    assert_eq!(cpu.read::<u32>(ARRAY * 4096 + 12).unwrap(), linked | masked.0);
    // A reset gives the pages back.
    put(&cpu, SCRATCH, &DomId::SELF.0.to_le_bytes());
    assert_eq!(call(&mut cpu, Hypercall::EVENT_CHANNEL_OP, &[10, SCRATCH]), 0);
    assert_eq!(space.references.load(Ordering::SeqCst), 0);
}

#[test]
fn a_control_block_is_checked_and_given_once() {
    let (mut cpu, space) = fifo();
    let before = space.references.load(Ordering::SeqCst);
    for (control_gfn, offset, vcpu, want) in [
        (frame(CONTROL).0, 0, 0, EINVAL),
        (frame(CONTROL).0, 0, 2, -2),
        (frame(CONTROL).0, 4, 1, EINVAL),
        (frame(CONTROL).0, 4096 - 64, 1, EINVAL),
        (frame(CONTROL).0, u32::MAX, 1, EINVAL),
        (frame(FRAMES).0, 0, 1, EINVAL),
        (5, 0, 1, EINVAL),
    ] {
        let argument = InitControl { control_gfn, offset, vcpu, ..InitControl::new_zeroed() };
        put(&cpu, SCRATCH, argument.as_bytes());
        assert_eq!(call(&mut cpu, Hypercall::EVENT_CHANNEL_OP, &[11, SCRATCH]), want);
    }
    assert_eq!(space.references.load(Ordering::SeqCst), before);
}

#[test]
fn a_vcpu_info_moves_and_takes_its_events_along() {
    let (mut cpu, space) = cpu();
    cpu.shared().set_masked(true);
    let register = |cpu: &mut Cpu, mfn: u64, offset: u32| {
        put(cpu, SCRATCH, &mfn.to_le_bytes());
        put(cpu, SCRATCH + 8, &offset.to_le_bytes());
        call(cpu, Hypercall::VCPU_OP, &[10, 0, SCRATCH])
    };
    assert_eq!(register(&mut cpu, frame(9).0, 4096 - 56), -6);
    assert_eq!(register(&mut cpu, frame(9).0, 4), -6);
    assert_eq!(register(&mut cpu, frame(FRAMES).0, 0), EINVAL);
    assert_eq!(register(&mut cpu, frame(9).0, 128), 0);
    assert_eq!(register(&mut cpu, frame(9).0, 128), EINVAL);
    assert_eq!(space.references.load(Ordering::SeqCst), 1);
    let info: [u64; 2] = cpu.read(9 * 4096 + 128).unwrap();
    assert_eq!(info, [0x101, u64::MAX]);
    assert!(cpu.shared().is_masked() && cpu.shared().is_pending());
}

fn argument() -> impl Strategy<Value = u64> {
    let end = FRAMES * 4096;
    prop_oneof![
        4 => 0..32_u64,
        4 => 0x1000..end,
        2 => end - 64..end + 64,
        1 => frame(0).0..frame(FRAMES + 100).0,
        1 => any::<u64>(),
        1 => any::<u32>().prop_map(u64::from),
    ]
}

proptest! {
    /// Whatever a guest passes, nothing breaks, and what was referenced for a call is given back after it.
    #[test]
    fn no_arguments_break_anything(
        words in proptest::collection::vec(argument(), 64),
        calls in proptest::collection::vec((0..64_u64, proptest::array::uniform6(argument())), 1..24),
    ) {
        let (mut cpu, _) = cpu();
        // No wait lasts: an NMI is always due.
        cpu.shared().send_nmi();
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        for page in [1, 5, FRAMES - 1] {
            put(&cpu, page * 4096, &bytes);
        }
        cpu.state.registers.rsp = words[0];
        for (number, arguments) in calls {
            if let Answer::Value(value) = dispatch(&mut cpu, Hypercall(number), arguments) {
                prop_assert!(value > -4096, "{number}: {value}");
            }
        }
    }
}
