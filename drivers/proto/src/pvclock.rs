//! The paravirtual clock of Xen and KVM: one structure, one arithmetic.
//!
//! The hypervisor writes a time, the TSC at that time, and how fast the TSC runs; the guest adds what
//! passed since (`xen/include/public/xen.h`, `struct vcpu_time_info`; Linux `Documentation/virt/kvm/x86/msr.rst`,
//! `MSR_KVM_SYSTEM_TIME_NEW`). A version that is odd, or changed, says that the copy is torn.

use core::time::Duration;

use zerocopy::FromZeros as _;
use zerocopy::IntoBytes as _;

use crate::abi::xen::shared_info::VcpuTimeInfo;
use crate::sync::{AtomicU32, Ordering, fence};

/// Words of a [`VcpuTimeInfo`].
pub const TIME_INFO_WORDS: usize = size_of::<VcpuTimeInfo>() / 4;
/// How often to look again while the structure is being updated (under Miri, which is slow: a few times).
const TRIES: u32 = if cfg!(miri) { 50 } else { 100_000 };

/// Copies the structure if it is not being updated.
#[must_use]
pub fn try_read(words: &[AtomicU32]) -> Option<VcpuTimeInfo> {
    let mut copy = VcpuTimeInfo::new_zeroed();
    try_copy(words.get(..TIME_INFO_WORDS)?, copy.as_mut_bytes()).then_some(copy)
}

/// Copies words whose first one is a version; `false`: the copy is torn.
fn try_copy(words: &[AtomicU32], copy: &mut [u8]) -> bool {
    let Some(version) = words.first() else { return false };
    // Orders the version before the values.
    let before = version.load(Ordering::Acquire);
    let mut copy = copy.as_chunks_mut::<4>().0.iter_mut();
    if let Some(first) = copy.next() {
        *first = before.to_ne_bytes();
    }
    for (to, from) in copy.zip(words.iter().skip(1)) {
        *to = from.load(Ordering::Relaxed).to_ne_bytes();
    }
    // Orders the values before our second look at the version.
    fence(Ordering::Acquire);
    before.is_multiple_of(2) && version.load(Ordering::Relaxed) == before
}

/// Writes words whose first one is a version, so that [`try_copy`] notices.
fn replace(words: &[AtomicU32], new: &[u8]) {
    let Some((version, values)) = words.split_first() else { return };
    let busy = version.load(Ordering::Relaxed) | 1;
    version.store(busy, Ordering::Relaxed);
    // Orders the odd version before the values.
    fence(Ordering::Release);
    for (to, from) in values.iter().zip(new.as_chunks::<4>().0.iter().skip(1)) {
        to.store(u32::from_ne_bytes(*from), Ordering::Relaxed);
    }
    // Orders the values before the even version.
    version.store(busy.wrapping_add(1), Ordering::Release);
}

/// Nanoseconds on the hypervisor's clock; `tsc` reads the counter, ordered.
///
/// The counter is read between the two looks at the version, so that a change of its rate, or a
/// move to another CPU, is noticed. `None`: the structure never came to rest.
pub fn now(words: &[AtomicU32], tsc: impl Fn() -> u64) -> Option<u64> {
    let version = words.first()?;
    for _ in 0..TRIES {
        if let Some(info) = try_read(words) {
            let ticks = tsc();
            fence(Ordering::Acquire);
            if version.load(Ordering::Relaxed) == info.version {
                return Some(nanoseconds(&info, ticks));
            }
        }
        core::hint::spin_loop();
    }
    None
}

/// The time at a TSC value. A TSC before the structure's counts as the same moment.
///
/// The distance wraps: a guest whose TSC was set to 0 when it was made may see a timestamp "before 0"
/// until the host looks at its clock again (seen with a PVH first domain on Xen 4.17).
#[must_use]
pub fn nanoseconds(info: &VcpuTimeInfo, tsc: u64) -> u64 {
    let ticks = u64::try_from(tsc.wrapping_sub(info.tsc_timestamp).cast_signed()).unwrap_or(0);
    info.system_time.wrapping_add(scale(ticks, info.tsc_to_system_mul, info.tsc_shift))
}

/// TSC ticks as nanoseconds: `((ticks << shift) * mul) >> 32`, a negative shift to the right.
#[must_use]
pub fn scale(ticks: u64, mul: u32, shift: i8) -> u64 {
    let places = u32::from(shift.unsigned_abs());
    let shifted = if shift < 0 { ticks.checked_shr(places) } else { ticks.checked_shl(places) };
    let product = u128::from(shifted.unwrap_or(0)) * u128::from(mul);
    #[expect(clippy::cast_possible_truncation, reason = "64 + 32 - 32 bits")]
    let nanoseconds = (product >> 32) as u64;
    nanoseconds
}

/// The multiplier and shift for a TSC of `hz` ticks a second: what a hypervisor writes.
#[must_use]
pub fn rate(hz: u64) -> Option<(u32, i8)> {
    // The smallest shift whose multiplier fits has the most significant bits.
    (-31..=31_i8).find_map(|shift| {
        let places = (32 - i32::from(shift)).cast_unsigned();
        let mul = (1_000_000_000_u128 << places).checked_div(u128::from(hz))?;
        u32::try_from(mul).ok().map(|mul| (mul, shift))
    })
}

/// TSC ticks a second, in thousands, from the structure; 0 if it is empty.
#[must_use]
pub fn tsc_khz(info: &VcpuTimeInfo) -> u64 {
    if info.tsc_to_system_mul == 0 {
        return 0;
    }
    let places = u32::from(info.tsc_shift.unsigned_abs());
    let ticks = 1_000_000_u128 << 32;
    // Multiplied before it is divided, to lose nothing; a hypervisor sends shifts of a few places.
    let ticks = match (info.tsc_shift < 0, places) {
        (_, 65..) => return 0,
        (true, _) => ticks << places,
        (false, _) => ticks,
    };
    let khz = ticks / u128::from(info.tsc_to_system_mul);
    let khz = if info.tsc_shift < 0 { khz } else { khz >> places };
    u64::try_from(khz).unwrap_or(u64::MAX)
}

/// The wall clock at system time 0, as a time since 1970: `words` are version, seconds, nanoseconds and,
/// on Xen, the high word of seconds (`struct shared_info`; KVM's `struct pvclock_wall_clock` has three).
///
/// `None`: it is being updated, or nonsense.
#[must_use]
pub fn try_read_wall_clock(words: &[AtomicU32]) -> Option<Duration> {
    if !(3..=4).contains(&words.len()) {
        return None;
    }
    let mut copy = [0_u32; 4];
    let whole = try_copy(words, copy.as_mut_bytes());
    let [_, seconds, nanoseconds, high] = copy;
    let seconds = u64::from(high) << 32 | u64::from(seconds);
    (whole && nanoseconds < 1_000_000_000).then(|| Duration::new(seconds, nanoseconds))
}

/// The hypervisor's side: writes the structure so that readers notice. One writer at a time.
pub fn write(words: &[AtomicU32], info: &VcpuTimeInfo) {
    if let Some(words) = words.get(..TIME_INFO_WORDS) {
        replace(words, info.as_bytes());
    }
}

/// The hypervisor's side of [`try_read_wall_clock`]: three words, or four.
pub fn write_wall_clock(words: &[AtomicU32], base: Duration) {
    let [low, high] = [base.as_secs() & 0xffff_ffff, base.as_secs() >> 32]
        .map(|half| u32::try_from(half).unwrap_or(u32::MAX));
    let new = [0, low, base.subsec_nanos(), high];
    if (3..=4).contains(&words.len()) {
        replace(words, new.as_bytes());
    }
}

#[cfg(test)]
mod loom_tests;
#[cfg(test)]
mod tests;
