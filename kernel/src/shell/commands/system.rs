//! The machine: platform, devices, interrupts, tasks, memory, log.

use alloc::boxed::Box;
use alloc::string::String;
use core::fmt::Write;

use super::{Command, Size};
use crate::percpu::CpuId;
use crate::shell::{Session, Status};
use crate::{devices, irq, logger, mm, platform, smp, task, virtio};

pub(super) const COMMANDS: &[Command] = &[
    Command {
        name: "devices",
        arguments: "",
        help: "lists the platform and the devices found",
        run: |session, _| {
            Box::pin(async move {
                let _ = writeln!(session, "platform  {}", platform::current().name());
                for disk in devices::blocks() {
                    let _ =
                        writeln!(session, "disk      {} ({})", disk.name(), Size(disk.capacity()));
                }
                for net in devices::nets() {
                    let _ = writeln!(session, "network   {}", net.name());
                }
                for device in virtio::list() {
                    let virtio::Listed { name, place, interrupts, notifications } = device;
                    let _ = writeln!(
                        session,
                        "virtio    {name} at {place}: {interrupts} interrupts, {notifications} notifications"
                    );
                }
                Status::SUCCESS
            })
        },
    },
    Command {
        name: "log",
        arguments: "",
        help: "prints the kernel's log, oldest first",
        run: |session, _| {
            Box::pin(async move {
                session.write_bytes(logger::recent().as_bytes());
                Status::SUCCESS
            })
        },
    },
    Command {
        name: "events",
        arguments: "",
        help: "lists interrupts and event channels in use, with counts",
        run: |session, _| {
            Box::pin(async move {
                let (sources, spurious) = irq::list();
                for source in sources {
                    let name = alloc::format!("{:?}", source.source);
                    let _ = writeln!(session, "{name:<20} {:>10}  {}", source.count, source.name);
                }
                let _ = writeln!(session, "{:<20} {spurious:>10}", "without a handler");
                Status::SUCCESS
            })
        },
    },
    Command {
        name: "cpus",
        arguments: "[stop NUMBER]",
        help: "starts the CPUs that do not run yet, and lists them; or stops one",
        run: |session, arguments| Box::pin(cpus(session, arguments)),
    },
    Command {
        name: "tasks",
        arguments: "",
        help: "lists the tasks, with how often each ran",
        run: |session, _| {
            Box::pin(async move {
                for status in task::tasks() {
                    let _ = write!(session, "{:>10}  {}", status.polls, status.name);
                    match status.cpu.filter(|_| smp::several()) {
                        Some(CpuId(id)) => drop(writeln!(session, " on CPU {id}")),
                        None => drop(writeln!(session)),
                    }
                }
                Status::SUCCESS
            })
        },
    },
    Command {
        name: "memory",
        arguments: "",
        help: "prints how much memory there is, and what uses it",
        run: |session, _| Box::pin(async move { memory(session) }),
    },
];

async fn cpus(session: &mut Session<'_>, arguments: &[String]) -> Status {
    match arguments {
        [] => drop(smp::start().await),
        [word, number] if word == "stop" => {
            let Ok(number) = number.parse() else { return Status::USAGE };
            if let Err(error) = smp::stop(CpuId(number)).await {
                let _ = writeln!(session, "cpus: {number}: {error}");
                return Status::FAILURE;
            }
        }
        _ => return Status::USAGE,
    }
    for cpu in smp::list() {
        let CpuId(id) = cpu.id;
        let state = if cpu.online { "runs" } else { "stopped" };
        let task::CpuStatistics { polls, idles, idle, .. } = cpu.statistics;
        let ms = idle.as_millis();
        let _ = writeln!(
            session,
            "CPU {id:<3} {state:<7} {polls:>10} task switches, {idles} waits of {ms} ms together"
        );
    }
    Status::SUCCESS
}

fn memory(session: &mut Session<'_>) -> Status {
    let frames = mm::frames::statistics();
    let heap = mm::heap::statistics();
    let pages = |count: usize| Size(count as u64 * 4096);
    let _ = writeln!(
        session,
        "pages     {:>10} of {:>10} free",
        pages(frames.free),
        pages(frames.total)
    );
    let _ = writeln!(session, "heap      {:>10} in slabs", Size(heap.slab_bytes as u64));
    for (size, count) in
        mm::heap::class_sizes().iter().zip(heap.objects).filter(|(_, count)| *count > 0)
    {
        let _ = writeln!(session, "          {count:>10} objects of up to {size} B");
    }
    let (used, arena) = (Size(heap.arena_used as u64), Size(heap.arena_bytes as u64));
    let _ = writeln!(session, "          {used:>10} of {arena:>10} in large objects");
    let files = crate::fs::file_cache::statistics();
    let _ = writeln!(
        session,
        "files     {:>10} cached; pieces: {} found, {} read",
        Size(files.bytes as u64),
        files.hits,
        files.misses
    );
    Status::SUCCESS
}
