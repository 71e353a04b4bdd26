//! Memory: page frames, the heap, and what must fault.
// UNSAFETY: reads and writes where it must not, to see the kernel stop it.
#![expect(unsafe_code, reason = "the tests here break the rules on purpose")]

use alloc::vec::Vec;
use core::hint::black_box;

use janus_kernel::guest_test;
use janus_kernel::mm::frames;

guest_test! {
    /// Each frame is handed out once, and free frames are counted.
    fn frames_are_distinct_and_counted(test) {
        let before = frames::statistics().free;
        let mut taken: Vec<_> = (0..64).filter_map(|_| frames::allocate(1)).collect();
        test.equal("frames taken", taken.len(), 64);
        taken.sort_unstable_by_key(|frame| frame.0);
        test.check(taken.windows(2).all(|pair| pair.first() != pair.last()), "a frame was handed out twice");
        test.check(taken.iter().all(|frame| frame.0 != 0), "frame 0 was handed out: it is not mapped");
        for frame in &taken {
            // SAFETY: taken above, one frame each, and not used since.
            unsafe { frames::free(*frame, 1) };
        }
        // The list itself may have cost the heap a frame or two, which it keeps.
        let after = frames::statistics().free;
        test.check(before.abs_diff(after) <= 64, format_args!("{before} frames were free, now {after}"));
    }

    /// A run of frames has the alignment asked for.
    fn runs_of_frames_are_aligned(test) {
        for align in [1, 2, 16, 512] {
            let Some(start) = frames::allocate_aligned(4, align) else {
                test.error("out of memory");
                return;
            };
            test.equal("remainder", start.0 % align as u64, 0);
            // SAFETY: taken above and not used.
            unsafe { frames::free(start, 4) };
        }
    }

    /// A run too long for what lies below 4 GiB is found above, mapped, and keeps what is put there.
    fn memory_above_4_gib_keeps_what_is_put_there(test) {
        // On a PC with 6 GiB, at most 3 GiB lie below.
        const FRAMES: usize = (3 << 30) / 4096 + 256;
        let Some(start) = frames::allocate(FRAMES) else {
            test.error("no run of 3 GiB: the machine wants 6 GiB");
            return;
        };
        test.check(start.0 >= 1 << 20, format_args!("the run starts at frame {:#x}", start.0));
        let places = [0, 1, FRAMES / 2, FRAMES - 1];
        let pointer = |frame: usize| {
            let address = usize::try_from(start.start().0).unwrap_or(0) + frame * 4096;
            core::ptr::with_exposed_provenance_mut::<u64>(address)
        };
        for frame in places {
            // SAFETY: inside the run just taken; all memory is mapped at its own address.
            unsafe { pointer(frame).write_volatile(!(frame as u64)) };
        }
        for frame in places {
            // SAFETY: as above.
            test.equal("word", unsafe { pointer(frame).read_volatile() }, !(frame as u64));
        }
        // SAFETY: taken above, and not used any more.
        unsafe { frames::free(start, FRAMES) };
    }

    /// Small and large blocks of the heap keep their contents while others come and go.
    fn the_heap_keeps_what_is_put_there(test) {
        let mut kept: Vec<Vec<u8>> = Vec::new();
        for round in 0..200_usize {
            let byte = u8::try_from(round % 251).unwrap_or(0);
            let size = [1, 16, 24, 100, 1000, 5000, 70_000].get(round % 7).copied().unwrap_or(1);
            kept.push(alloc::vec![byte; size]);
            if round % 3 == 0 {
                kept.swap_remove(round / 7 % kept.len());
            }
        }
        let intact = kept.iter().all(|block| block.first().is_some_and(|first| block.iter().all(|b| b == first)));
        test.check(intact, "a block's contents changed");
    }

    /// The null page is not mapped: must end in a page fault that names the address.
    fn reading_null_faults(test) {
        let null = black_box(core::ptr::without_provenance::<u64>(8));
        // SAFETY: none: this must fault, and the machine end with a crash.
        let value = unsafe { null.read_volatile() };
        test.check(false, format_args!("read {value:#x} from the null page"));
    }

    /// Code cannot be written.
    fn writing_to_code_faults(test) {
        let code = black_box(writing_to_code_faults as fn(&mut _) as *mut u8);
        // SAFETY: none: this must fault, and the machine end with a crash.
        unsafe { code.write_volatile(0xcc) };
        test.check(false, "wrote to code");
    }

    /// Constants cannot be written.
    fn writing_to_constants_faults(test) {
        static CONSTANT: [u8; 64] = [7; 64];
        let constant = black_box(CONSTANT.as_ptr().cast_mut());
        // SAFETY: none: this must fault, and the machine end with a crash.
        unsafe { constant.write_volatile(1) };
        test.check(false, "wrote to a constant");
    }

    /// Data cannot be executed.
    fn executing_data_faults(test) {
        // A return instruction, on the heap.
        let code = black_box(alloc::vec![0xc3_u8; 16]);
        // SAFETY: none: this must fault, and the machine end with a crash.
        let function = unsafe { core::mem::transmute::<*const u8, extern "C" fn()>(code.as_ptr()) };
        function();
        test.check(false, "executed data");
    }

    /// Endless recursion runs into the guard page below the boot stack, not into data.
    fn overflowing_the_stack_faults(test) {
        let depth = recurse(black_box(1));
        test.check(false, format_args!("recursed {depth} deep without a fault"));
    }
}

#[inline(never)]
fn recurse(depth: u64) -> u64 {
    let block = black_box([depth; 64]);
    // Never true, which the compiler does not know.
    if black_box(depth) == u64::MAX {
        return depth;
    }
    recurse(black_box(depth + 1)) + block.iter().sum::<u64>()
}
