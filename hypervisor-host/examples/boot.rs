//! Boots a PV image in this process, with console and xenstore and nothing else: `boot IMAGE [COMMAND LINE]`.
//!
//! The shortest way from an image to a running domain, and how the parts of this library fit together. With
//! `JANUS_ENGINE=ptrace` the guest is traced instead of monitored, which any debugger of engines will want. With
//! `JANUS_STORE=PATH` xenstore is served on that socket too: `XENSTORED_PATH=PATH xenstore-ls -s` shows it.

use std::io::{Read as _, Write as _};
use std::process::ExitCode;
use std::sync::Arc;

use janus::engine::Vcpu;
use janus::engine::monitor::Monitor;
use janus::engine::ptrace::{self, PtraceVcpu};
use janus::host::{Host, Identity};
use janus::machine::ram::Ram;
use janus::pv::builder::{self, Config};
use janus::pv::domain::{Domain, EndReason, Ended, Setup};
use janus::pv::mm::Size;
use janus::pv::mm::space::SharedMemory;
use janus::pv::timers;
use janus_proto::abi::xen::sched::ShutdownReason;
use janus_proto::addr::{DomId, Port};

type Failure = Box<dyn std::error::Error>;

/// 64 MiB.
const PAGES: u64 = 64 * 256;
const UUID: [u8; 16] = *b"janus-boot-image";

fn main() -> ExitCode {
    timers::begin();
    match run() {
        Ok(code) => code,
        Err(error) => {
            eprintln!("boot: {error}");
            ExitCode::FAILURE
        }
    }
}

fn engines(ram: &Arc<Ram>, traced: bool) -> Result<Vec<Box<dyn Vcpu>>, Failure> {
    fn boxed<V: Vcpu + 'static>(vcpus: Vec<V>) -> Vec<Box<dyn Vcpu>> {
        vcpus.into_iter().map(|vcpu| Box::new(vcpu) as Box<dyn Vcpu>).collect()
    }
    Ok(if traced {
        boxed(PtraceVcpu::new(ram, 1)?)
    } else {
        boxed(Monitor::new(Arc::clone(ram), 1)?)
    })
}

fn run() -> Result<ExitCode, Failure> {
    let mut arguments = std::env::args().skip(1);
    let image = arguments.next().ok_or("usage: boot IMAGE [COMMAND LINE]")?;
    let command_line = arguments.collect::<Vec<_>>().join(" ");
    let traced = std::env::var("JANUS_ENGINE").as_deref() == Ok("ptrace");
    let hypercall_page = if traced { ptrace::hypercall_page() } else { Monitor::hypercall_page() };
    let built = builder::build(&Config {
        name: &image,
        kernel: &std::fs::read(&image)?,
        module: None,
        command_line: &command_line,
        size: Size { pages: PAGES, max_pages: PAGES, vcpus: 1 },
        store_port: Port(1),
        console_port: Port(2),
        hypercall_page: &hypercall_page,
    })?;
    let memory = SharedMemory::new(built.memory);
    let setup = Setup {
        id: DomId(1),
        uuid: UUID,
        vcpus: 1,
        ram: Arc::clone(memory.ram()),
        shared_info: built.shared_info,
        grant_frames: built.grant_frames,
        console: built.console,
        store: built.store,
    };
    let engines = engines(&setup.ram, traced)?;
    let domain = Domain::new(&setup, memory).map_err(|error| error.message())?;
    let identity = Identity {
        name: "boot".into(),
        uuid: UUID,
        memory_kib: PAGES * 4,
        max_memory_kib: PAGES * 4,
        vcpus: 1,
        rings: (built.console.0, built.store.0),
    };
    let host = Arc::new(Host::new(&domain, &identity, Box::new(std::io::stdout()))?);
    if let Some(path) = std::env::var_os("JANUS_STORE") {
        host.listen_store(path.as_ref())?;
    }
    let typed = Arc::downgrade(&host);
    std::thread::spawn(move || {
        let mut buf = [0; 512];
        while let Ok(count @ 1..) = std::io::stdin().read(&mut buf) {
            let Some(host) = typed.upgrade() else { break };
            host.console().type_bytes(buf.get(..count).unwrap_or_default());
        }
    });
    domain.start(engines, built.registers)?;
    let ended = domain.wait();
    drop(host);
    if std::env::var_os("JANUS_STATS").is_some() {
        report(&domain, &ended);
    }
    Ok(match ended.reason {
        EndReason::Shutdown(ShutdownReason::POWEROFF) => ExitCode::SUCCESS,
        _ => {
            report(&domain, &ended);
            ExitCode::from(6)
        }
    })
}

/// How it ended, and what it did.
fn report(domain: &Domain, ended: &Ended) {
    let mut out = std::io::stderr().lock();
    let _ = writeln!(out, "{:#?}", ended.reason);
    for cpu in ended.report.iter().flat_map(|report| &report.cpus) {
        let _ = writeln!(out, "{cpu:#x?}");
    }
    for call in domain.stats().calls {
        let mean = call.ticks / call.calls.max(1);
        let _ = writeln!(out, "{:8} {:24} {mean:10} ticks", call.calls, call.name());
    }
}
