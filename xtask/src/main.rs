//! `cargo xtask`: the one entry point for building, running and testing.

mod bench;
mod conformance;
mod console;
mod cpio;
mod disk;
mod grub;
mod guest;
mod image;
mod lab;
mod linux_loader;
mod listing;
mod matrix;
mod packages;
mod paths;
mod process;
mod qemu;
mod results;
mod run;
mod symbols;
mod test;
mod tidy;
mod toolchain;
mod vmm;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Builds, runs and tests the guest kernel; sets up what it needs.
#[derive(Debug, Parser)]
#[command(bin_name = "cargo xtask", disable_help_subcommand = true)]
struct Arguments {
    #[command(subcommand)]
    command: Task,
}

#[derive(Debug, Subcommand)]
enum Task {
    /// Builds the guest image, or the VMM, and prints where it is.
    Build {
        /// The package to build: a guest image's, or `janus` for the VMM.
        #[arg(default_value = guest::DEFAULT_IMAGE)]
        package: String,
    },
    Run(run::RunArguments),
    Test(test::TestArguments),
    /// Runs all tests with every row required, and checks the source's rules: what CI does.
    Ci,
    Bench(bench::BenchArguments),
    Conformance(conformance::ConformanceArguments),
    /// Checks the source's own rules.
    Tidy {
        /// First writes the unsafe ledger of ARCHITECTURE.md from the tree.
        #[arg(long)]
        fix: bool,
    },
    /// Runs a guest in a lab.
    #[command(subcommand)]
    Lab(LabTask),
}

#[derive(Debug, Subcommand)]
enum LabTask {
    /// Real Xen with a Debian dom0, inside QEMU.
    Xen(lab::command::XenArguments),
    Kvm(lab::kvm::KvmArguments),
}

fn tidy(fix: bool) -> anyhow::Result<ExitCode> {
    if fix {
        tidy::fix()?;
    }
    let found = tidy::check()?;
    for line in &found {
        println!("{line}");
    }
    println!("{} findings", found.len());
    Ok(if found.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn main() -> ExitCode {
    let outcome = match Arguments::parse().command {
        Task::Build { package } if package == vmm::PACKAGE => {
            vmm::build().map(|file| println!("{}", file.display())).map(|()| ExitCode::SUCCESS)
        }
        Task::Build { package } => guest::build(&package)
            .map(|elf| println!("{}", elf.display()))
            .map(|()| ExitCode::SUCCESS),
        Task::Run(arguments) => run::run(&arguments),
        Task::Test(arguments) => test::run(&arguments),
        Task::Bench(arguments) => bench::run(&arguments),
        Task::Conformance(arguments) => conformance::run(&arguments),
        Task::Ci => test::ci(),
        Task::Tidy { fix } => tidy(fix),
        Task::Lab(LabTask::Xen(arguments)) => {
            lab::command::xen(&arguments).map(|()| ExitCode::SUCCESS)
        }
        Task::Lab(LabTask::Kvm(arguments)) => lab::kvm::kvm(&arguments),
    };
    match outcome {
        Ok(code) => code,
        Err(error) => {
            eprintln!("janus: {error:#}");
            ExitCode::FAILURE
        }
    }
}
