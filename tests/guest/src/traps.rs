//! Traps: exceptions end in a report that names them, with a symbolised backtrace.
// UNSAFETY: executes instructions that must trap.
#![expect(unsafe_code, reason = "the tests here trap on purpose")]

use core::arch::asm;

use janus_kernel::guest_test;

guest_test! {
    /// Division by zero.
    fn dividing_by_zero_is_reported(test) {
        // SAFETY: none needed: traps, and the machine ends with a crash.
        unsafe { asm!("xor edx, edx", "mov eax, 1", "xor ecx, ecx", "div ecx", out("eax") _, out("ecx") _, out("edx") _) };
        test.check(false, "divided by zero");
    }

    /// An instruction that there is not.
    fn an_invalid_opcode_is_reported(test) {
        // SAFETY: none needed: traps, and the machine ends with a crash.
        unsafe { asm!("ud2") };
        test.check(false, "executed ud2");
    }

    /// A panic prints its message, its place, and the functions that led there.
    fn a_panic_has_a_backtrace(test) {
        outer_function_of_the_panic(test.outcome() as u32);
    }
}

#[inline(never)]
fn outer_function_of_the_panic(number: u32) {
    inner_function_of_the_panic(number);
}

#[inline(never)]
fn inner_function_of_the_panic(number: u32) {
    panic!("on purpose, with number {number}");
}
