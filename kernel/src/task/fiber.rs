//! Fibers: tasks with their own stack, so that synchronous code can wait for async devices.
//!
//! A fiber is a future. Polling it switches to its stack; [`block_on`] inside it switches back when the inner
//! future is pending, and the fiber's waker brings the executor here again. Only callee-saved registers are
//! switched, by ordinary instructions: it works in ring 3 under Xen PV, natively, and on the host.
// UNSAFETY: switches stacks.
#![expect(unsafe_code, reason = "the switch of stacks and the first frame of a new one")]

use alloc::boxed::Box;
use alloc::sync::Arc;
use core::arch::naked_asm;
use core::cell::{Cell, RefCell};
use core::fmt;
use core::future::Future;
use core::pin::{Pin, pin};
use core::ptr::NonNull;
use core::sync::atomic::Ordering;
use core::task::{Context, Poll, Waker};

use super::executor::{Cpu, JoinHandle, current_cpu, spawn_at};
use super::hooks::hooks;
use crate::sync::IrqMutex;

/// Bytes of a fiber's stack. Host builds are unoptimised and need more.
const STACK_BYTES: usize = if cfg!(target_os = "none") { 64 * 1024 } else { 512 * 1024 };

/// A stack with a guard page below it.
struct Stack(NonNull<u8>);

// SAFETY: owned memory, used by whoever owns the value.
unsafe impl Send for Stack {}

impl Stack {
    fn new() -> Option<Self> {
        (hooks().stack_alloc)(STACK_BYTES).map(Self)
    }
    /// The address behind the last byte: a multiple of 16.
    fn top(&self) -> *mut usize {
        self.0.as_ptr().wrapping_add(STACK_BYTES).cast()
    }
}

impl Drop for Stack {
    fn drop(&mut self) {
        (hooks().stack_free)(self.0, STACK_BYTES);
    }
}

/// What the two sides of a switch share. Only one side runs at a time.
pub(super) struct Frame {
    /// Stack pointer of the side that does not run.
    other_sp: Cell<usize>,
    /// Wakes the fiber's task; fresh at each poll.
    waker: RefCell<Option<Waker>>,
    entry: Cell<Option<Box<dyn FnOnce() + Send>>>,
    finished: Cell<bool>,
}

/// Saves the callee-saved registers and the stack pointer (to `*save`), and goes on where `load` was saved.
///
/// # Safety
/// `load` was saved by this function, or is a first frame made by [`Fiber::new`], on a stack that still exists
/// and on which nothing runs; `save` is writable.
#[unsafe(naked)]
unsafe extern "sysv64" fn switch(save: *mut usize, load: usize) {
    naked_asm!(
        "push rbp",
        "push rbx",
        "push r12",
        "push r13",
        "push r14",
        "push r15",
        "mov [rdi], rsp",
        "mov rsp, rsi",
        "pop r15",
        "pop r14",
        "pop r13",
        "pop r12",
        "pop rbx",
        "pop rbp",
        "ret",
    )
}

/// Where a new stack starts: its first frame has the argument in r12. The stack is aligned by 16 here.
#[unsafe(naked)]
extern "sysv64" fn start() {
    naked_asm!(
        "mov rdi, r12",
        "call {main}",
        "ud2", // `main` does not return
        main = sym main,
    )
}

/// The registers that [`switch`] pops first, in memory order.
const SAVED: usize = 6;
/// Index of r12 among them.
const R12: usize = 3;
/// Words of a first frame: the saved registers, the return address, and two so that [`start`] is aligned by 16.
const FIRST_FRAME: usize = SAVED + 3;

/// The first function on a new stack.
///
/// # Safety
/// `frame` points at the frame of the fiber whose stack this runs on.
unsafe extern "sysv64" fn main(frame: *const Frame) -> ! {
    // SAFETY: `Fiber::new` put the address of the fiber's boxed frame here, which outlives the stack.
    let frame = unsafe { &*frame };
    if let Some(entry) = frame.entry.take() {
        entry();
    }
    frame.finished.set(true);
    leave(frame);
    unreachable!("a finished fiber is never resumed")
}

/// Switches to the other side.
fn leave(frame: &Frame) {
    let load = frame.other_sp.get();
    // SAFETY: `other_sp` is where the other side was saved last (or the first frame of a new stack); it is alive,
    // as the poller waits for the fiber and the fiber owns its stack.
    unsafe { switch(frame.other_sp.as_ptr(), load) };
}

/// The future that runs a fiber.
struct Fiber {
    frame: Box<Frame>,
    /// `None` once finished.
    stack: Option<Stack>,
    started: bool,
}

// SAFETY: the entry closure is `Send`; what it keeps on the stack never moves, as a fiber's task is pinned to its CPU.
unsafe impl Send for Fiber {}

impl Fiber {
    fn new(entry: Box<dyn FnOnce() + Send>) -> Option<Self> {
        let stack = Stack::new()?;
        let frame = Box::new(Frame {
            other_sp: Cell::new(0),
            waker: RefCell::new(None),
            entry: Cell::new(Some(entry)),
            finished: Cell::new(false),
        });
        let mut words = [0_usize; FIRST_FRAME];
        words[R12] = (&raw const *frame).addr();
        words[SAVED] = start as *const () as usize;
        let sp = stack.top().wrapping_sub(words.len());
        // SAFETY: the words lie at the top of a fresh stack that is longer and that nobody else sees.
        unsafe { sp.cast::<[usize; FIRST_FRAME]>().write(words) };
        frame.other_sp.set(sp.addr());
        Some(Self { frame, stack: Some(stack), started: false })
    }
}

impl Future for Fiber {
    type Output = ();
    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        if self.stack.is_none() {
            return Poll::Ready(());
        }
        self.started = true;
        let cpu = current_cpu();
        self.frame.waker.replace(Some(cx.waker().clone()));
        cpu.fiber.store((&raw const *self.frame).cast_mut(), Ordering::Relaxed);
        leave(&self.frame);
        cpu.fiber.store(core::ptr::null_mut(), Ordering::Relaxed);
        if !self.frame.finished.get() {
            return Poll::Pending;
        }
        self.stack = None;
        self.frame.waker.replace(None);
        Poll::Ready(())
    }
}

impl Drop for Fiber {
    fn drop(&mut self) {
        if self.started
            && let Some(stack) = self.stack.take()
        {
            // Cancelled half-way: values on the stack were not dropped, and others may point at them.
            log::warn!("a fiber was cancelled before its end: its stack is leaked");
            core::mem::forget(stack);
        }
    }
}

/// Whether the caller runs on a fiber's stack.
pub(super) fn is_current(cpu: &Cpu) -> bool {
    !cpu.fiber.load(Ordering::Relaxed).is_null()
}

/// Parks the calling fiber until the future is ready.
pub(super) fn block_on<F: Future>(cpu: &Cpu, future: F) -> F::Output {
    // SAFETY: the pointer is set while the fiber that owns the frame runs, and that is the caller.
    let frame = unsafe { &*cpu.fiber.load(Ordering::Relaxed) };
    let mut future = pin!(future);
    loop {
        let waker = frame.waker.borrow().clone().unwrap_or_else(|| Waker::noop().clone());
        // Code under this poll that calls `block_on` again parks the same fiber: allowed, and it works.
        if let Poll::Ready(output) = future.as_mut().poll(&mut Context::from_waker(&waker)) {
            return output;
        }
        leave(frame);
    }
}

/// No memory for another stack.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NoStack;

impl fmt::Display for NoStack {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("no memory for a fiber's stack")
    }
}

impl core::error::Error for NoStack {}

/// Starts a fiber on this CPU: `f` may call [`super::block_on`].
///
/// # Errors
/// [`NoStack`].
pub fn try_spawn_fiber<T: Send + 'static>(
    name: &'static str,
    f: impl FnOnce() -> T + Send + 'static,
) -> Result<JoinHandle<T>, NoStack> {
    let result = Arc::new(IrqMutex::new(None));
    let slot = Arc::clone(&result);
    let fiber = Fiber::new(Box::new(move || {
        let output = guarded(f);
        *slot.lock() = Some(output);
    }))
    .ok_or(NoStack)?;
    Ok(spawn_at(current_cpu(), true, name, async move {
        fiber.await;
        let output = result.lock().take();
        finished(output.expect("the entry stores a result before the fiber finishes"))
    }))
}

/// As [`try_spawn_fiber`].
///
/// # Panics
/// Without memory for the stack, as any other allocation.
pub fn spawn_fiber<T: Send + 'static>(
    name: &'static str,
    f: impl FnOnce() -> T + Send + 'static,
) -> JoinHandle<T> {
    try_spawn_fiber(name, f).expect("memory for a fiber's stack")
}

/// In the guest a panic ends everything.
#[cfg(target_os = "none")]
fn guarded<T>(f: impl FnOnce() -> T) -> T {
    f()
}
#[cfg(target_os = "none")]
fn finished<T>(output: T) -> T {
    output
}

/// On the host a panic must not unwind past the first frame of the stack: it goes on in the poller.
#[cfg(not(target_os = "none"))]
fn guarded<T>(f: impl FnOnce() -> T) -> std::thread::Result<T> {
    std::panic::catch_unwind(core::panic::AssertUnwindSafe(f))
}
#[cfg(not(target_os = "none"))]
fn finished<T>(output: std::thread::Result<T>) -> T {
    output.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}
