//! What calls, events, pages and copies cost in this guest: the other side of the bench's measurements outside it.
// UNSAFETY: takes a page of its own out of the address space and puts it back.
#![expect(unsafe_code, reason = "a page is unmapped and mapped, and a loop is in assembly")]

use alloc::boxed::Box;
use alloc::string::String;
use alloc::vec;
use alloc::vec::Vec;
use core::fmt::Write;
use core::hint::black_box;
use core::sync::atomic::{AtomicU64, Ordering};
use core::time::Duration;

use janus_proto::addr::PAGE_SIZE;

use super::Command;
use crate::irq::evtchn;
use crate::mm::{frames, paging};
use crate::platform::{self, Platform};
use crate::shell::{Session, Status};
use crate::{hypercall, task, time};

pub(super) const COMMANDS: &[Command] = &[Command {
    name: "measure",
    arguments: "null-call|monitor-call|event|map|unmap|switch|timer|loop|copy",
    help: "times one operation many times; prints a JSON line of nanoseconds",
    run: |session, arguments| Box::pin(measure(session, arguments)),
}];

/// Batches of a measurement; each is one sample.
const BATCHES: usize = 31;
/// What is copied at once to measure copying.
const COPY: usize = 16 << 20;
/// Turns of the loop.
const TURNS: u64 = 10_000_000;
/// Pages that are unmapped and mapped, one by one.
const PAGES: usize = 64;
/// How long to sleep to measure how late the waking is.
const SLEEP: Duration = Duration::from_micros(300);

/// Samples, in nanoseconds an operation.
type Samples = Vec<u64>;

async fn measure(session: &mut Session<'_>, arguments: &[String]) -> Status {
    let [name] = arguments else { return Status::USAGE };
    let on_xen = platform::current() != Platform::Kvm;
    let samples = match name.as_str() {
        "null-call" | "monitor-call" | "event" if !on_xen => {
            return session.fail(format_args!("measure: {name}: there is no Xen underneath"));
        }
        "null-call" => Ok(batches(1000, || _ = black_box(hypercall::xen_version()))),
        "monitor-call" => Ok(batches(500, || _ = black_box(hypercall::memory::machphys_mapping()))),
        "event" => event(),
        "map" | "unmap" => pages(name == "map"),
        "switch" => Ok(switch().await),
        "timer" => Ok(timer().await),
        "loop" => Ok(turns()),
        "copy" => Ok(copy()),
        _ => return Status::USAGE,
    };
    match samples {
        Ok(samples) => {
            let _ = writeln!(session, "janus-bench: {{\"what\":\"{name}\",\"ns\":{samples:?}}}");
            Status::SUCCESS
        }
        Err(error) => session.fail(format_args!("measure: {name}: {error}")),
    }
}

/// Times batches of `count` operations, after one that does not count.
fn batches(count: u32, mut operation: impl FnMut()) -> Samples {
    let mut samples = Vec::with_capacity(BATCHES);
    for batch in 0..=BATCHES {
        let start = time::now();
        for _ in 0..count {
            operation();
        }
        let time = elapsed(start) / u64::from(count);
        if batch > 0 {
            samples.push(time);
        }
    }
    samples
}

fn elapsed(start: time::Instant) -> u64 {
    u64::try_from(start.elapsed().as_nanos()).unwrap_or(u64::MAX)
}

/// An event to ourselves, until its handler has run.
fn event() -> Result<Samples, String> {
    static SEEN: AtomicU64 = AtomicU64::new(0);
    let channel = evtchn::bind_ipi(
        0,
        "measure",
        Box::new(|| {
            SEEN.fetch_add(1, Ordering::Relaxed);
        }),
    )
    .map_err(|error| alloc::format!("{error}"))?;
    let (before, mut sent) = (SEEN.load(Ordering::Relaxed), 0);
    let samples = batches(500, || {
        channel.notify();
        sent += 1;
    });
    let seen = SEEN.load(Ordering::Relaxed) - before;
    if seen != sent {
        return Err(alloc::format!("{seen} of {sent} events came"));
    }
    Ok(samples)
}

/// Takes pages out, one by one, and puts them back with a touch; answers the times of one of the two.
fn pages(map: bool) -> Result<Samples, String> {
    let first = frames::allocate(PAGES).ok_or("out of memory")?;
    let start = usize::try_from(first.start().0).unwrap_or(0);
    let mut samples = Vec::with_capacity(BATCHES);
    let mut outcome = Ok(());
    for _ in 0..BATCHES {
        let begin = time::now();
        for page in 0..PAGES {
            // SAFETY: a frame of ours, to which nobody has a reference.
            outcome = outcome.and(unsafe { paging::unmap(start + page * PAGE_SIZE, 1) });
        }
        let unmapped = time::now();
        for page in 0..PAGES {
            let (address, frame) =
                (start + page * PAGE_SIZE, janus_proto::addr::Pfn(first.0 + page as u64));
            // SAFETY: the same frame, at its own address, where nothing is mapped now.
            outcome = outcome.and(unsafe { paging::map(address, frame, 1, paging::Flags::WRITE) });
            if outcome.is_ok() {
                // SAFETY: a byte of that page, which is mapped and ours.
                unsafe {
                    core::ptr::with_exposed_provenance_mut::<u8>(address).write_volatile(1);
                }
            }
        }
        let time = if map { elapsed(unmapped) } else { elapsed(begin) - elapsed(unmapped) };
        samples.push(time / PAGES as u64);
    }
    outcome.map_err(|error| alloc::format!("{error:?}"))?;
    // SAFETY: allocated above, all mapped again, and nobody has a reference.
    unsafe { frames::free(first, PAGES) };
    Ok(samples)
}

/// From one task to another: two tasks that do nothing but let the other run.
async fn switch() -> Samples {
    const COUNT: u32 = 5000;
    let mut samples = Vec::with_capacity(BATCHES);
    for _ in 0..BATCHES {
        let start = time::now();
        let tasks = [(); 2].map(|()| {
            task::spawn("measure", async {
                for _ in 0..COUNT {
                    task::yield_now().await;
                }
            })
        });
        for task in tasks {
            task.await;
        }
        samples.push(elapsed(start) / u64::from(2 * COUNT));
    }
    samples
}

/// How late a sleeper wakes.
async fn timer() -> Samples {
    let mut samples = Vec::with_capacity(BATCHES);
    for _ in 0..BATCHES {
        let deadline = time::now() + SLEEP;
        time::sleep_until(deadline).await;
        samples.push(elapsed(deadline));
    }
    samples
}

/// A loop of two instructions, nanoseconds a million turns.
fn turns() -> Samples {
    let samples = batches(1, || {
        // SAFETY: counts a register down.
        unsafe {
            core::arch::asm!("2: dec {0}", "jnz 2b", inout(reg) TURNS => _, options(nomem, nostack));
        }
    });
    samples.into_iter().map(|time| time / (TURNS / 1_000_000)).collect()
}

/// Copying, nanoseconds a MiB.
fn copy() -> Samples {
    let from = vec![1_u8; COPY];
    let mut to = vec![0_u8; COPY];
    let samples = batches(4, || {
        to.copy_from_slice(black_box(&from));
        black_box(&mut to);
    });
    samples.into_iter().map(|time| time / (COPY as u64 >> 20)).collect()
}
