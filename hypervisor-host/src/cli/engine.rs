//! On what a guest runs: the monitor, KVM, or QEMU.

use clap::ValueEnum;

use crate::kvm::probe::Verdict;

/// What was asked for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(super) enum EngineArgument {
    /// The monitor for every kernel that it can run; for others KVM where it runs guests natively, else QEMU.
    #[default]
    Auto,
    /// The engine without hardware: Xen PV guests as ordinary processes.
    Monitor,
    /// KVM, with virtio devices.
    Kvm,
    /// QEMU, by KVM where that runs guests natively, else by TCG.
    Qemu,
}

/// What it runs on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Engine {
    Monitor,
    Kvm,
    Qemu { kvm: bool },
}

/// A choice, and the reason for it where nobody asked for just that.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Choice {
    pub(super) engine: Engine,
    pub(super) reason: Option<String>,
}

/// Chooses; what the kernel is for, and what `ask` says of KVM, is looked at only where it matters.
pub(super) fn choose(
    argument: EngineArgument,
    suits_monitor: impl FnOnce() -> bool,
    ask: impl FnOnce() -> Verdict,
) -> Choice {
    let plain = |engine| Choice { engine, reason: None };
    match argument {
        EngineArgument::Monitor => plain(Engine::Monitor),
        EngineArgument::Kvm => plain(Engine::Kvm),
        EngineArgument::Qemu => {
            let verdict = ask();
            let with = if verdict.is_usable() { "KVM" } else { "TCG" };
            Choice {
                engine: Engine::Qemu { kvm: verdict.is_usable() },
                reason: Some(format!("QEMU with {with}: {verdict}")),
            }
        }
        EngineArgument::Auto if suits_monitor() => plain(Engine::Monitor),
        EngineArgument::Auto => {
            let verdict = ask();
            let (engine, name) = if verdict.is_usable() {
                (Engine::Kvm, "KVM")
            } else {
                (Engine::Qemu { kvm: false }, "QEMU with TCG")
            };
            let reason = format!("{name}, as the kernel is none for the monitor: {verdict}");
            Choice { engine, reason: Some(reason) }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_engine_is_what_can_run_the_kernel_here_and_the_reason_is_told() {
        use EngineArgument::{Auto, Kvm, Monitor, Qemu};
        let slow = || Verdict::Interprets("x");
        let tcg = Engine::Qemu { kvm: false };
        for (argument, suits_monitor, verdict, engine) in [
            (Auto, true, Verdict::Native, Engine::Monitor),
            (Auto, false, Verdict::Native, Engine::Kvm),
            (Auto, false, Verdict::Absent, tcg),
            (Auto, false, Verdict::NotPermitted, tcg),
            (Auto, false, Verdict::Hangs, tcg),
            (Auto, false, slow(), tcg),
            (Monitor, false, Verdict::Native, Engine::Monitor),
            (Kvm, true, slow(), Engine::Kvm),
            (Qemu, true, slow(), tcg),
            (Qemu, true, Verdict::Native, Engine::Qemu { kvm: true }),
        ] {
            let told = verdict.to_string();
            let choice = choose(argument, || suits_monitor, || verdict);
            assert_eq!(choice.engine, engine, "{argument:?} {told}");
            let asked = argument == Qemu || argument == Auto && !suits_monitor;
            assert_eq!(choice.reason.is_some_and(|reason| reason.contains(&told)), asked);
        }
    }
}
