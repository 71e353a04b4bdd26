//! On what a guest runs: the monitor, KVM, or QEMU.

use clap::ValueEnum;

use crate::kvm::probe::Verdict;

/// What was asked for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(super) enum EngineArgument {
    /// KVM where it runs guests natively, else the monitor.
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

/// Chooses; `ask` is put only where its answer matters.
pub(super) fn choose(argument: EngineArgument, ask: impl FnOnce() -> Verdict) -> Choice {
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
        EngineArgument::Auto => {
            let verdict = ask();
            let (engine, name) = if verdict.is_usable() {
                (Engine::Kvm, "KVM")
            } else {
                (Engine::Monitor, "the monitor")
            };
            Choice { engine, reason: Some(format!("{name}: {verdict}")) }
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
        for (argument, verdict, engine) in [
            (Auto, Verdict::Native, Engine::Kvm),
            (Auto, Verdict::Absent, Engine::Monitor),
            (Auto, Verdict::NotPermitted, Engine::Monitor),
            (Auto, Verdict::Hangs, Engine::Monitor),
            (Auto, slow(), Engine::Monitor),
            (Monitor, Verdict::Native, Engine::Monitor),
            (Kvm, slow(), Engine::Kvm),
            (Qemu, slow(), Engine::Qemu { kvm: false }),
            (Qemu, Verdict::Native, Engine::Qemu { kvm: true }),
        ] {
            let told = verdict.to_string();
            let choice = choose(argument, || verdict);
            assert_eq!(choice.engine, engine, "{argument:?} {told}");
            let asked = matches!(argument, Auto | Qemu);
            assert_eq!(choice.reason.is_some_and(|reason| reason.contains(&told)), asked);
        }
    }
}
