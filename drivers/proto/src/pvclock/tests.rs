//! The arithmetic against plain fractions, and torn copies.
#![cfg(not(loom))]

use proptest::prelude::*;

use super::*;
use crate::abi::xen::shared_info::TimeFlags;

fn info(tsc_timestamp: u64, system_time: u64, mul: u32, shift: i8) -> VcpuTimeInfo {
    VcpuTimeInfo {
        tsc_timestamp,
        system_time,
        tsc_to_system_mul: mul,
        tsc_shift: shift,
        flags: TimeFlags::TSC_STABLE,
        ..VcpuTimeInfo::new_zeroed()
    }
}

fn words(count: usize) -> Vec<AtomicU32> {
    (0..count).map(|_| AtomicU32::new(0)).collect()
}

#[test]
fn known_rates_come_out_right() {
    // 2 GHz: half a nanosecond a tick; 1 GHz: shift 1 and one half.
    assert_eq!(rate(2_000_000_000), Some((1 << 31, 0)));
    assert_eq!(rate(1_000_000_000), Some((1 << 31, 1)));
    assert_eq!(rate(0), None);
    assert_eq!(scale(1_000_000, 1 << 31, 0), 500_000);
    assert_eq!(scale(1_000_000, 1 << 31, 1), 1_000_000);
    assert_eq!(scale(1_000_000, 1 << 31, -1), 250_000);
    // Shifts that no hypervisor sends are no panic.
    for shift in [i8::MIN, -64, 64, i8::MAX] {
        assert_eq!(scale(u64::MAX, u32::MAX, shift), 0, "{shift}");
    }
    let info = info(1000, 5_000_000_000, 1 << 31, 0);
    assert_eq!(nanoseconds(&info, 3000), 5_000_001_000);
    assert_eq!(nanoseconds(&info, 999), 5_000_000_000, "a TSC slightly behind is no leap");
    assert_eq!(tsc_khz(&info), 2_000_000);
    assert_eq!(tsc_khz(&VcpuTimeInfo::new_zeroed()), 0);
}

#[test]
fn a_copy_in_the_middle_of_an_update_is_refused() {
    let words = words(TIME_INFO_WORDS);
    write(&words, &info(1, 2, 3, 4));
    let copy = try_read(&words).unwrap();
    assert_eq!((copy.version, copy.tsc_timestamp, copy.system_time), (2, 1, 2));
    assert_eq!((copy.tsc_shift, copy.flags), (4, TimeFlags::TSC_STABLE));
    words[0].store(3, Ordering::Relaxed);
    assert_eq!(try_read(&words), None);
    assert_eq!(now(&words, || 0), None, "never at rest: an answer, not a hang");
    assert_eq!(try_read(&words[..7]), None);
    assert_eq!(now(&[], || 0), None);
}

#[test]
fn a_rate_that_changes_while_the_counter_is_read_is_noticed() {
    let words = words(TIME_INFO_WORDS);
    write(&words, &info(0, 1000, 1 << 31, 1));
    let calls = std::cell::Cell::new(0);
    let time = now(&words, || {
        calls.set(calls.get() + 1);
        if calls.get() == 1 {
            write(&words, &info(0, 9000, 1 << 31, 1));
        }
        10
    });
    assert_eq!((time, calls.get()), (Some(9010), 2));
}

#[test]
fn the_wall_clock_has_three_or_four_words() {
    let words = words(4);
    for (word, value) in words.iter().zip([2, 5, 7, 1]) {
        word.store(value, Ordering::Relaxed);
    }
    assert_eq!(try_read_wall_clock(&words), Some(Duration::new((1 << 32) + 5, 7)));
    assert_eq!(try_read_wall_clock(&words[..3]), Some(Duration::new(5, 7)));
    assert_eq!(try_read_wall_clock(&words[..2]), None);
    words[2].store(1_000_000_000, Ordering::Relaxed);
    assert_eq!(try_read_wall_clock(&words), None, "no such nanosecond");
    words[2].store(0, Ordering::Relaxed);
    words[0].store(1, Ordering::Relaxed);
    assert_eq!(try_read_wall_clock(&words), None, "being updated");
}

/// Compares `seconds` of ticks at `hz` with the fraction, and says what is wrong.
fn check_rate(hz: u64, seconds: u64) -> Result<(), String> {
    let (mul, shift) = rate(hz).ok_or("no rate")?;
    let nanoseconds = scale(hz * seconds, mul, shift);
    let want = seconds * 1_000_000_000;
    // Each step rounds down. The multiplier is at least 2^31, so it lacks less than 2^-31 of the whole;
    // the ticks that are shifted out are worth less than one nanosecond; so is the fraction dropped last.
    let most = want / (1 << 31) + 2;
    if !(want.saturating_sub(most)..=want).contains(&nanoseconds) {
        return Err(format!("{hz} Hz, {seconds} s: {nanoseconds} ns"));
    }
    let khz = tsc_khz(&info(0, 0, mul, shift));
    if !(hz / 1000..=hz / 1000 + 1 + hz / (1000 << 30)).contains(&khz) {
        return Err(format!("{hz} Hz: {khz} kHz"));
    }
    Ok(())
}

/// Both roundings at their largest: two nanoseconds of a second are missing.
#[test]
fn the_worst_roundings_of_a_rate_are_within_its_bounds() {
    for hz in [8_377_993_759, 16_056_257_278, 18_362_934_495] {
        assert_eq!(check_rate(hz, 1), Ok(()));
        let (mul, shift) = rate(hz).unwrap();
        assert_eq!(scale(hz, mul, shift), 999_999_998, "{hz} Hz");
    }
}

proptest! {
    /// A second of ticks is a second, within the 31 significant bits of the multiplier.
    #[test]
    fn rates_and_scales_agree(hz in 1_000_u64..20_000_000_000, seconds in 1_u64..1000) {
        if let Err(told) = check_rate(hz, seconds) {
            prop_assert!(false, "{told}");
        }
    }

    #[test]
    fn any_structure_is_survived(raw: [u32; 8], tsc: u64) {
        let words: Vec<_> = raw.into_iter().map(AtomicU32::new).collect();
        prop_assert_eq!(now(&words, || tsc).is_some(), raw[0] % 2 == 0);
        if let Some(info) = try_read(&words) {
            // Any answer will do, as long as it does not divide by zero.
            let _ = tsc_khz(&info);
        }
    }
}

#[test]
fn a_timestamp_before_the_counters_zero_is_in_the_past() {
    let (mul, shift) = rate(1_000_000_000).expect("a rate");
    let mut info = VcpuTimeInfo::new_zeroed();
    (info.tsc_to_system_mul, info.tsc_shift) = (mul, shift);
    info.system_time = 5_000;
    info.tsc_timestamp = 0_u64.wrapping_sub(1_000);
    assert_eq!(nanoseconds(&info, 2_000), 8_000);
    info.tsc_timestamp = 3_000;
    assert_eq!(nanoseconds(&info, 2_000), 5_000);
}
