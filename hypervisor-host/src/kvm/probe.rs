//! Whether KVM is there and really runs guests, found out in a bounded time.
//!
//! A device that can be opened promises little: there are hypervisors in software behind it that interpret kernel code
//! instruction by instruction, hundreds of times slower, and some never return from a run. So the last question is put
//! by a guest of a few instructions, with a limit on its time, on a thread that is left behind if it does not answer.
// UNSAFETY: tells KVM which memory of this process is the guest's.
#![expect(unsafe_code, reason = "KVM writes to memory that is named by its address")]

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use janus_proto::addr::Mfn;
use kvm_bindings::{Msrs, kvm_msr_entry, kvm_regs, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};

use super::guest;
use super::registers::{Entry, set_special};
use crate::machine::ram::{Numbering, Ram};

/// KVM's device.
pub const DEVICE: &str = "/dev/kvm";
/// Nothing that is asked here may take longer.
pub const LIMIT: Duration = Duration::from_millis(80);
/// The API's version since 2007.
const API_VERSION: i32 = 12;
/// The module of a hypervisor in software, and the MSR by which its virtual CPUs tell what they are ("PVM").
const SOFTWARE_MODULE: &str = "/sys/module/kvm_pvm";
const SOFTWARE_MSR: u32 = 0x4b56_4d11;
const SOFTWARE_MARK: u64 = 0x4d_5650;
/// Turns of the probe guest's loop, two instructions each.
const TURNS: u32 = 20_000;
/// What a turn may take where instructions run as such; an interpreter needs some 500 ns, and an emulated processor,
/// on which this is tested, some 20 ns.
const TURN_LIMIT: Duration = Duration::from_nanos(100);
/// Where the probe guest's code is.
const CODE: u64 = 0x1000;

/// What there is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Guests run natively.
    Native,
    /// There is no such device.
    Absent,
    /// It may not be opened.
    NotPermitted,
    /// It is something else.
    NotKvm(String),
    /// Guests' kernel code is interpreted; how that was found.
    Interprets(&'static str),
    /// It did not answer in time.
    Hangs,
}

impl Verdict {
    /// Whether guests should run on it.
    #[must_use]
    pub fn is_usable(&self) -> bool {
        *self == Self::Native
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Native => f.write_str("KVM runs guests natively"),
            Self::Absent => f.write_str("there is no /dev/kvm"),
            Self::NotPermitted => {
                f.write_str("/dev/kvm may not be opened (the group `kvm` may, as a rule)")
            }
            Self::NotKvm(error) => write!(f, "/dev/kvm is no usable KVM: {error}"),
            Self::Interprets(how) => write!(f, "/dev/kvm interprets kernel code ({how})"),
            Self::Hangs => write!(f, "/dev/kvm did not answer within {} ms", LIMIT.as_millis()),
        }
    }
}

/// Finds out about a device; takes at most [`LIMIT`] and a little.
#[must_use]
pub fn probe(device: &Path) -> Verdict {
    if device == Path::new(DEVICE) && Path::new(SOFTWARE_MODULE).exists() && device.exists() {
        return match guest::open(device) {
            Ok(_) => Verdict::Interprets("the module kvm_pvm"),
            Err(error) => verdict_of(&error),
        };
    }
    if !device.exists() {
        return Verdict::Absent;
    }
    let device: PathBuf = device.to_owned();
    bounded(LIMIT, move || ask(&device))
}

/// Runs a question on a thread of its own, which is left behind if it does not come back in time.
fn bounded(limit: Duration, ask: impl FnOnce() -> Verdict + Send + 'static) -> Verdict {
    let (sender, receiver) = mpsc::channel();
    let asking = move || {
        // Nobody listens any more if it is late.
        let _ = sender.send(ask());
    };
    if std::thread::Builder::new().name("kvm-probe".into()).spawn(asking).is_err() {
        return Verdict::NotKvm("no thread to ask it from".into());
    }
    receiver.recv_timeout(limit).unwrap_or(Verdict::Hangs)
}

fn verdict_of(error: &guest::KvmError) -> Verdict {
    match error {
        guest::KvmError::Device(_, error) => match error.errno() {
            libc::ENOENT | libc::ENODEV | libc::ENXIO => Verdict::Absent,
            libc::EACCES | libc::EPERM => Verdict::NotPermitted,
            _ => Verdict::NotKvm(error.to_string()),
        },
        other => Verdict::NotKvm(other.to_string()),
    }
}

fn ask(device: &Path) -> Verdict {
    match guest::open(device) {
        Err(error) => verdict_of(&error),
        Ok(kvm) if kvm.get_api_version() != API_VERSION => {
            Verdict::NotKvm(format!("it does not speak KVM's API {API_VERSION}"))
        }
        Ok(kvm) => run(&kvm).unwrap_or_else(|error| Verdict::NotKvm(error.to_string())),
    }
}

/// A guest that counts down and halts.
fn code() -> Vec<u8> {
    let mut code = vec![0xb9]; // mov ecx, TURNS
    code.extend(TURNS.to_le_bytes());
    code.extend([0x49, 0x75, 0xfd, 0xf4]); // dec ecx; jnz -3; hlt
    code
}

fn run(kvm: &Kvm) -> Result<Verdict, kvm_ioctls::Error> {
    let failed = |error: std::io::Error| {
        kvm_ioctls::Error::new(error.raw_os_error().unwrap_or(libc::ENOMEM))
    };
    let numbering = Numbering { first: Mfn(0), below: u64::MAX, above: Mfn(u64::MAX) };
    let ram = Ram::with_numbering(2, numbering, 0).map_err(failed)?;
    let words = ram.words(Mfn(1), 1).unwrap_or_default();
    for (word, bytes) in words.iter().zip(code().chunks(4)) {
        let mut four = [0; 4];
        four.iter_mut().zip(bytes).for_each(|(to, from)| *to = *from);
        word.store(u32::from_le_bytes(four), std::sync::atomic::Ordering::Relaxed);
    }
    let vm = kvm.create_vm()?;
    let region = kvm_userspace_memory_region {
        slot: 0,
        flags: 0,
        guest_phys_addr: CODE,
        memory_size: 4096,
        userspace_addr: words.as_ptr().expose_provenance() as u64,
    };
    // SAFETY: the page is a mapping of `ram`'s that is seen as atomics; `ram` outlives the virtual machine, which is
    // gone when this function has returned.
    unsafe { vm.set_user_memory_region(region) }?;
    let verdict = count(&vm);
    drop(vm);
    drop(ram);
    verdict
}

fn count(vm: &VmFd) -> Result<Verdict, kvm_ioctls::Error> {
    let mut vcpu = vm.create_vcpu(0)?;
    if is_software(&vcpu) {
        return Ok(Verdict::Interprets("its virtual CPUs say so"));
    }
    let mut special = vcpu.get_sregs()?;
    set_special(&mut special, Entry::Pvh { rip: CODE, start_info: 0 });
    vcpu.set_sregs(&special)?;
    vcpu.set_regs(&kvm_regs { rip: CODE, rflags: 2, ..kvm_regs::default() })?;
    let begun = Instant::now();
    loop {
        match vcpu.run() {
            Ok(VcpuExit::Hlt) => break,
            Ok(other) => return Ok(Verdict::NotKvm(format!("the probe ended by {other:?}"))),
            Err(error) if error.errno() == libc::EINTR => {}
            Err(error) => return Err(error),
        }
    }
    Ok(if begun.elapsed() > TURN_LIMIT * TURNS {
        Verdict::Interprets("a probe guest was hundreds of times too slow")
    } else {
        Verdict::Native
    })
}

/// Whether a virtual CPU has the MSR of the known hypervisor in software.
fn is_software(vcpu: &VcpuFd) -> bool {
    let entry = kvm_msr_entry { index: SOFTWARE_MSR, ..kvm_msr_entry::default() };
    let Ok(mut msrs) = Msrs::from_entries(&[entry]) else { return false };
    vcpu.get_msrs(&mut msrs) == Ok(1)
        && msrs.as_slice().first().is_some_and(|entry| entry.data == SOFTWARE_MARK)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_kvm_is_told_apart() {
        let directory = tempfile::tempdir().unwrap();
        assert_eq!(probe(&directory.path().join("kvm")), Verdict::Absent);
        let file = directory.path().join("file");
        std::fs::write(&file, "no device").unwrap();
        assert!(matches!(probe(&file), Verdict::NotKvm(_)), "{:?}", probe(&file));
        assert!(matches!(probe(Path::new("/dev/null")), Verdict::NotKvm(_)));
        let denied = guest::KvmError::Device(file, kvm_ioctls::Error::new(libc::EACCES));
        assert_eq!(verdict_of(&denied), Verdict::NotPermitted);
    }

    #[test]
    fn a_device_that_never_answers_does_not_keep_anybody_waiting() {
        let (hold, held) = mpsc::channel::<()>();
        let verdict = bounded(Duration::from_millis(10), move || {
            let _ = held.recv();
            Verdict::Native
        });
        assert_eq!(verdict, Verdict::Hangs);
        drop(hold);
    }

    #[test]
    fn every_verdict_has_a_reason() {
        for verdict in [
            Verdict::Native,
            Verdict::Absent,
            Verdict::NotPermitted,
            Verdict::NotKvm("x".into()),
            Verdict::Interprets("x"),
            Verdict::Hangs,
        ] {
            assert!(verdict.to_string().contains("vm") || verdict.is_usable(), "{verdict}");
        }
    }
}
