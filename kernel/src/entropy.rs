//! Randomness: a ChaCha20 generator, seeded from everything that is there.
//!
//! Sources are the CPU's RDSEED or RDRAND, an [`EntropyDevice`] (virtio-rng) when one comes up, and
//! timing jitter. Jitter alone is weak: a machine with neither of the others gets a warning in the log,
//! and its numbers are fit for sequence numbers and hash seeds, not for keys ([`is_strong`]).
// UNSAFETY: executes RDRAND and RDSEED.
#![expect(unsafe_code, reason = "RDRAND and RDSEED")]

use alloc::boxed::Box;
use core::arch::asm;
use core::sync::atomic::{AtomicBool, Ordering};

use janus_front::class::EntropyDevice;
use rand_chacha::ChaCha20Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};

use crate::cpu::{self, rdtsc};
use crate::platform::lock::IrqLock;
use crate::platform::{self, Platform};

/// Bytes of the generator's key, and of each helping of entropy.
const KEY: usize = 32;
/// Retries of RDRAND that Intel recommends (Intel SDM volume 1, 7.3.17.1); RDSEED runs dry more easily.
const TRIES: u32 = 10;
/// Time stamps that go into the jitter.
const JITTER_SAMPLES: usize = 64;

struct State {
    generator: Option<ChaCha20Rng>,
    device: Option<Box<dyn EntropyDevice>>,
}

static STATE: IrqLock<State> = IrqLock::new(State { generator: None, device: None });
/// Whether a real source has contributed.
static STRONG: AtomicBool = AtomicBool::new(false);

impl State {
    fn generator(&mut self) -> &mut ChaCha20Rng {
        self.generator.get_or_insert_with(first_generator)
    }
    /// Takes a new key that depends on the old one and on `bytes`.
    fn mix(&mut self, bytes: &[u8]) {
        for helping in bytes.chunks(KEY) {
            let mut key = [0; KEY];
            self.generator().fill_bytes(&mut key);
            for (to, from) in key.iter_mut().zip(helping) {
                *to ^= from;
            }
            self.generator = Some(ChaCha20Rng::from_seed(key));
        }
    }
}

/// The generator with what the CPU alone gives.
fn first_generator() -> ChaCha20Rng {
    let mut state = State { generator: Some(ChaCha20Rng::from_seed(jitter())), device: None };
    if let Some(bytes) = from_cpu() {
        STRONG.store(true, Ordering::Relaxed);
        state.mix(&bytes);
    }
    state.generator.unwrap_or_else(|| ChaCha20Rng::from_seed(jitter()))
}

/// Fills `buf` with random bytes. Never waits.
pub fn fill(buf: &mut [u8]) {
    let mut state = STATE.lock();
    let mut fresh = [0; KEY];
    let count = state.device.as_mut().map_or(0, |device| device.read(&mut fresh));
    if let Some(bytes) = fresh.get(..count).filter(|bytes| !bytes.is_empty()) {
        STRONG.store(true, Ordering::Relaxed);
        state.mix(bytes);
    }
    state.generator().fill_bytes(buf);
}

/// A random number.
#[must_use]
pub fn random_u64() -> u64 {
    let mut bytes = [0; 8];
    fill(&mut bytes);
    u64::from_le_bytes(bytes)
}

/// Adds bytes that an attacker may not know. They cannot make things worse.
pub fn add(bytes: &[u8]) {
    STATE.lock().mix(bytes);
}

/// Uses a device as a source from now on; its bytes are mixed in as they arrive.
pub fn attach(mut device: Box<dyn EntropyDevice>) {
    // Starts the first request.
    let _ = device.read(&mut []);
    STATE.lock().device = Some(device);
}

/// Looks after the device: for its interrupt handler.
pub fn service() {
    let mut bytes = [0; KEY];
    let mut state = STATE.lock();
    let count = state.device.as_mut().map_or(0, |device| device.read(&mut bytes));
    if let Some(bytes) = bytes.get(..count).filter(|bytes| !bytes.is_empty()) {
        STRONG.store(true, Ordering::Relaxed);
        state.mix(bytes);
    }
}

/// Whether a source better than timing jitter has contributed.
#[must_use]
pub fn is_strong() -> bool {
    // The CPU's source is asked when the first number is.
    let _ = random_u64();
    STRONG.load(Ordering::Relaxed)
}

/// Time stamps around work whose duration varies, folded.
fn jitter() -> [u8; KEY] {
    let mut seed = [0_u8; KEY];
    let mut last = rdtsc();
    for sample in 0..JITTER_SAMPLES {
        // A look at the clock's shared state takes a varying time, and more so when interrupted.
        let now = rdtsc() ^ platform::now_ns().rotate_left(32);
        let delta = now.wrapping_sub(last).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        last = now;
        for (to, from) in seed.iter_mut().skip(sample % 4 * 8).zip(delta.to_le_bytes()) {
            *to = to.rotate_left(3) ^ from;
        }
    }
    seed
}

/// 32 bytes from RDSEED or else RDRAND; `None` without them, or when they answer what cannot be random.
fn from_cpu() -> Option<[u8; KEY]> {
    const CPUID_RDRAND: u32 = 1 << 30;
    const CPUID_RDSEED: u32 = 1 << 18;
    if cpu::features() & CPUID_RDRAND == 0 {
        return None;
    }
    let has_rdseed = platform::current() != Platform::XenPv
        && cpu::cpuid(0).eax >= 7
        && cpu::cpuid(7).ebx & CPUID_RDSEED != 0;
    let mut words = [0; KEY / 8];
    for word in &mut words {
        *word = if has_rdseed { rdseed().or_else(rdrand)? } else { rdrand()? };
    }
    // Some CPUs have been seen to answer all ones, or always the same, after a suspend.
    let [first, rest @ ..] = words;
    if rest.iter().all(|word| *word == first) {
        return None;
    }
    let mut bytes = [0; KEY];
    for (to, from) in bytes.chunks_exact_mut(8).zip(words) {
        to.copy_from_slice(&from.to_le_bytes());
    }
    Some(bytes)
}

fn rdrand() -> Option<u64> {
    (0..TRIES).find_map(|_| {
        let (value, ok): (u64, u8);
        // SAFETY: CPUID has RDRAND; it changes the register and the flags.
        unsafe {
            asm!("rdrand {}", "setc {}", out(reg) value, out(reg_byte) ok, options(nomem, nostack))
        };
        (ok != 0).then_some(value)
    })
}

fn rdseed() -> Option<u64> {
    (0..TRIES).find_map(|_| {
        let (value, ok): (u64, u8);
        // SAFETY: CPUID has RDSEED; it changes the register and the flags.
        unsafe {
            asm!("rdseed {}", "setc {}", out(reg) value, out(reg_byte) ok, options(nomem, nostack))
        };
        (ok != 0).then_some(value)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_differ_and_additions_change_what_follows() {
        assert_ne!(random_u64(), random_u64());
        let stream = |extra: &[u8]| {
            let mut state =
                State { generator: Some(ChaCha20Rng::from_seed([7; KEY])), device: None };
            state.mix(extra);
            state.generator().next_u64()
        };
        assert_eq!(stream(b"a"), stream(b"a"));
        assert_ne!(stream(b"a"), stream(b"b"));
        assert_ne!(stream(&[1; 33]), stream(&[1; 32]));
    }

    #[test]
    fn a_device_contributes_when_it_has_something() {
        struct Device(bool);
        impl EntropyDevice for Device {
            fn read(&mut self, buf: &mut [u8]) -> usize {
                let ready = core::mem::replace(&mut self.0, true);
                if ready {
                    buf.fill(9)
                }
                if ready { buf.len() } else { 0 }
            }
        }
        attach(Box::new(Device(false)));
        let before = random_u64();
        assert_ne!(before, random_u64());
        assert!(is_strong());
    }
}
