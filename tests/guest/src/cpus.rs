//! Several CPUs: the machines of these tests have two (`tests/matrix.toml`).
// UNSAFETY: gives a page another frame, to see all CPUs notice.
#![expect(unsafe_code, reason = "maps pages")]

use alloc::sync::Arc;
use alloc::vec::Vec;
use core::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use core::time::Duration;

use janus_kernel::mm::{frames, paging};
use janus_kernel::net::icmp::Ping;
use janus_kernel::percpu::{self, CpuId};
use janus_kernel::sync::{IrqMutex, Notify};
use janus_kernel::test::Test;
use janus_kernel::{devices, guest_test, platform, smp, task, time};
use janus_proto::addr::Pfn;

/// How long anything here may take that another CPU has to do.
const PATIENCE: Duration = Duration::from_secs(10);

/// Both CPUs, up.
fn start(test: &mut Test) -> bool {
    let online = task::block_on(smp::start());
    test.equal("CPUs in use", online, 2);
    online == 2
}

fn this_cpu() -> u32 {
    percpu::current().id().0
}

/// Runs the same on both CPUs at once; `None`: one of them did not end it.
fn on_both<T: Send + 'static>(
    test: &mut Test,
    work: impl Fn(u32) -> T + Send + Sync + 'static,
) -> Option<Vec<T>> {
    let work = Arc::new(work);
    let handles: Vec<_> = (0..2)
        .filter_map(|cpu| {
            let work = Arc::clone(&work);
            task::spawn_on(cpu, "on-both", async move { work(this_cpu()) })
        })
        .collect();
    let all = async {
        let mut results = Vec::new();
        for handle in handles {
            results.push(handle.await);
        }
        results
    };
    let results = task::block_on(time::timeout(PATIENCE, all)).ok();
    test.check(results.is_some(), "a CPU did not do its work");
    results.filter(|results| results.len() == 2)
}

/// Waits, as long as that makes sense.
fn wait_for(word: &AtomicU64, value: u64) {
    let start = time::now();
    while word.load(Ordering::SeqCst) < value && start.elapsed() < PATIENCE {
        platform::relax();
    }
}

fn pointer(frame: Pfn) -> *mut u64 {
    core::ptr::with_exposed_provenance_mut(usize::try_from(frame.start().0).unwrap_or(0))
}

guest_test! {
    /// A task runs on the CPU it was put on, and one that waits behind a long one is taken over by an idle CPU.
    fn cpus_share_their_tasks(test) {
        static TAKEN_BY: AtomicU32 = AtomicU32::new(u32::MAX);
        if !start(test) {
            return;
        }
        let Some(ran_on) = on_both(test, |cpu| cpu) else { return };
        test.equal("tasks ran on", ran_on, alloc::vec![0, 1]);
        // Spins until the other has run, which it can only do elsewhere.
        let long = task::spawn("long", async {
            let start = time::now();
            while start.elapsed() < Duration::from_millis(2) {}
            drop(task::spawn("waiting", async { TAKEN_BY.store(this_cpu(), Ordering::Relaxed) }));
            while TAKEN_BY.load(Ordering::Relaxed) == u32::MAX && start.elapsed() < PATIENCE {}
            this_cpu()
        });
        let long_ran_on = task::block_on(long);
        let waiting_ran_on = TAKEN_BY.load(Ordering::Relaxed);
        test.check(
            waiting_ran_on < 2 && waiting_ran_on != long_ran_on,
            format_args!("the long task ran on CPU {long_ran_on}, the waiting one on {waiting_ran_on}"),
        );
    }

    /// Two tasks on two CPUs wake each other, and a CPU that waits is blocked meanwhile.
    fn cpus_wake_each_other(test) {
        const ROUNDS: u64 = 300;
        static PING: Notify = Notify::new();
        static PONG: Notify = Notify::new();
        if !start(test) {
            return;
        }
        let idles = || smp::list().iter().map(|cpu| cpu.statistics.idles).sum::<u64>();
        let before = idles();
        let Some(other) = task::spawn_on(1, "pong", async {
            for _ in 0..ROUNDS {
                PING.notified().await;
                PONG.notify();
            }
            this_cpu()
        }) else {
            test.error("no second CPU");
            return;
        };
        let start = time::now();
        let all = async {
            for _ in 0..ROUNDS {
                PING.notify();
                PONG.notified().await;
            }
            other.await
        };
        let Ok(cpu) = task::block_on(time::timeout(PATIENCE, all)) else {
            test.check(false, "a wake-up was lost");
            return;
        };
        let took = start.elapsed();
        test.equal("CPU of the other task", cpu, 1);
        let waits = idles() - before;
        // Each round lets both wait once; that some waits are over before they begin is luck of the machine.
        test.check(waits >= ROUNDS / 4, format_args!("{waits} waits in {ROUNDS} rounds"));
        test.note(format_args!("{} ns a round, {waits} waits", took.as_nanos() / u128::from(ROUNDS)));
    }

    /// What a lock protects is changed by one CPU at a time, in tasks and with interrupts coming in.
    fn cpus_count_exactly_under_a_lock(test) {
        const EACH: u64 = 50_000;
        static COUNTER: IrqMutex<u64> = IrqMutex::new(0);
        if !start(test) {
            return;
        }
        let counted = on_both(test, |_| {
            let mut held = Vec::new();
            for round in 0..EACH {
                *COUNTER.lock() += 1;
                // The heap has locks of its own, and its objects wander between the CPUs.
                if round % 64 == 0 {
                    held.push(alloc::vec![round; 1 + usize::try_from(round).unwrap_or(0) % 300]);
                    if held.len() > 40 {
                        held.swap_remove(usize::try_from(round).unwrap_or(0) % 40);
                    }
                }
            }
            held.iter().all(|list| list.iter().all(|value| Some(value) == list.first()))
        });
        test.equal("whole heap objects", counted, Some(alloc::vec![true, true]));
        test.equal("count", *COUNTER.lock(), 2 * EACH);
    }

    /// A time that one CPU has seen is not in the future of another.
    fn cpus_agree_on_the_time(test) {
        static LATEST_NS: AtomicU64 = AtomicU64::new(0);
        if !start(test) {
            return;
        }
        let backwards = on_both(test, |_| {
            let mut worst = 0;
            for _ in 0..20_000 {
                let seen = LATEST_NS.load(Ordering::SeqCst);
                let now = time::now().as_nanos();
                worst = worst.max(seen.saturating_sub(now));
                LATEST_NS.fetch_max(now, Ordering::SeqCst);
            }
            worst
        });
        test.equal("nanoseconds that time went back", backwards, Some(alloc::vec![0, 0]));
    }

    /// When a page has got another frame, no CPU sees the old one any more.
    fn cpus_forget_what_is_no_longer_mapped(test) {
        const ROUNDS: u64 = 20;
        static MAPPED: AtomicU64 = AtomicU64::new(0);
        static LOOKED: AtomicU64 = AtomicU64::new(0);
        if !start(test) {
            return;
        }
        let (Some(page), Some(even), Some(odd)) =
            (frames::allocate(1), frames::allocate(1), frames::allocate(1))
        else {
            test.error("no memory");
            return;
        };
        for (value, frame) in [even, odd].into_iter().enumerate() {
            // SAFETY: a frame just taken, mapped at its own address.
            unsafe { pointer(frame).write_volatile(value as u64) };
        }
        let results = on_both(test, move |cpu| {
            let mut wrong = 0;
            for round in 1..=ROUNDS {
                if cpu == 0 {
                    let frame = if round % 2 == 0 { even } else { odd };
                    // SAFETY: only this test looks at the page, and it expects this.
                    let mapped = unsafe { paging::map(pointer(page).addr(), frame, 1, paging::Flags::WRITE) };
                    wrong += u64::from(mapped.is_err());
                    MAPPED.store(round, Ordering::SeqCst);
                    wait_for(&LOOKED, round);
                } else {
                    wait_for(&MAPPED, round);
                    // SAFETY: mapped all the time, to one frame or the other.
                    let value = unsafe { pointer(page).read_volatile() };
                    wrong += u64::from(value != round % 2);
                    LOOKED.store(round, Ordering::SeqCst);
                }
            }
            wrong
        });
        test.equal("refused mappings, and looks at the old frame", results, Some(alloc::vec![0, 0]));
        test.equal("looks", LOOKED.load(Ordering::SeqCst), ROUNDS);
        // SAFETY: as above; the page gets its own frame back.
        let restored = unsafe { paging::map(pointer(page).addr(), page, 1, paging::Flags::WRITE) };
        test.check(restored.is_ok(), "the page did not get its frame back");
    }

    /// Disk and network serve tasks on both CPUs at once.
    fn cpus_share_the_devices(test) {
        if !start(test) {
            return;
        }
        if task::block_on(time::timeout(PATIENCE, devices::settled())).is_err() {
            test.error("the devices did not settle");
        }
        let Some(disk) = devices::blocks().into_iter().next() else {
            test.error("there is no disk");
            return;
        };
        let net = devices::nets().into_iter().next();
        if let Some(net) = &net {
            net.use_dhcp();
        }
        let handles: Vec<_> = (0..4_u8)
            .filter_map(|number| {
                let disk = Arc::clone(&disk);
                task::spawn_on(usize::from(number % 2), "disk-user", async move {
                    let start = (1 << 20) * u64::from(1 + number);
                    let mut whole = true;
                    for round in 0..40_u8 {
                        let offset = start + u64::from(round) * 8192;
                        let data = alloc::vec![number ^ round; 8192];
                        let mut back = alloc::vec![0; 8192];
                        // Other tests of the same disk expect what was there.
                        let mut before = back.clone();
                        whole &= disk.read_into(offset, &mut before).await.is_ok();
                        whole &= disk.write_from(offset, &data).await.is_ok();
                        whole &= disk.read_into(offset, &mut back).await.is_ok();
                        whole &= back == data;
                        whole &= disk.write_from(offset, &before).await.is_ok();
                    }
                    (this_cpu(), whole)
                })
            })
            .collect();
        let pings = net.as_ref().and_then(|net| {
            let net = Arc::clone(net);
            task::spawn_on(1, "pings", async move {
                net.configured().await.ok()?;
                let gateway = net.status().gateway?;
                let mut ping = Ping::new(&net, gateway).ok()?;
                for _ in 0..5 {
                    ping.send(1000, Duration::from_secs(3)).await.ok()?;
                }
                Some(this_cpu())
            })
        });
        let all = async {
            let mut results = Vec::new();
            for handle in handles {
                results.push(handle.await);
            }
            (results, match pings {
                Some(pings) => pings.await,
                None => None,
            })
        };
        let results = task::block_on(time::timeout(PATIENCE, all)).ok();
        let disks = alloc::vec![(0, true), (1, true), (0, true), (1, true)];
        test.equal("CPU and success of each", results, Some((disks, Some(1))));
    }

    /// A CPU that is stopped leaves its tasks to the first one, and runs tasks again when it is back.
    fn cpus_go_down_and_come_back(test) {
        static ROUNDS: AtomicU64 = AtomicU64::new(0);
        static END: AtomicBool = AtomicBool::new(false);
        if !start(test) {
            return;
        }
        // Spawned by a task of the second CPU, they begin there, and may move.
        let spawner = task::spawn_on(1, "spawner", async {
            let moving = || {
                task::spawn("moving", async {
                    let mut seen = Vec::new();
                    while !END.load(Ordering::Relaxed) {
                        seen.push(this_cpu());
                        ROUNDS.fetch_add(1, Ordering::Relaxed);
                        time::sleep(Duration::from_millis(1)).await;
                    }
                    seen
                })
            };
            [moving(), moving()]
        });
        let Some(spawner) = spawner else {
            test.error("no second CPU");
            return;
        };
        let moving = task::block_on(async {
            let moving = spawner.await;
            while ROUNDS.load(Ordering::Relaxed) < 2 {
                time::sleep(Duration::from_millis(1)).await;
            }
            moving
        });
        let result = task::block_on(async {
            for _ in 0..2 {
                smp::stop(CpuId(1)).await?;
                test.equal("CPUs in use", smp::online(), 1);
                let before = ROUNDS.load(Ordering::Relaxed);
                // However slow the machine is: they go on at some time.
                let stopped = time::now();
                while ROUNDS.load(Ordering::Relaxed) == before && stopped.elapsed() < PATIENCE {
                    time::sleep(Duration::from_millis(1)).await;
                }
                test.check(ROUNDS.load(Ordering::Relaxed) > before, "the tasks stand still");
                test.equal("CPUs in use again", smp::start().await, 2);
            }
            END.store(true, Ordering::Relaxed);
            let mut seen = Vec::new();
            for handle in moving {
                seen.extend(handle.await);
            }
            Ok::<_, smp::CpuError>(seen)
        });
        let Some(seen) = test.ok("stopping", result) else { return };
        test.check(seen.contains(&0) && seen.contains(&1), format_args!("tasks ran on {seen:?}"));
        let works = on_both(test, |cpu| cpu);
        test.equal("CPUs that work", works, Some(alloc::vec![0, 1]));
        test.equal("stopping the first", task::block_on(smp::stop(CpuId(0))), Err(smp::CpuError::Busy));
        test.equal("stopping none", task::block_on(smp::stop(CpuId(7))), Err(smp::CpuError::NoSuchCpu));
    }

    /// A failure on one CPU is reported whole, and the machine ends, whatever the others do.
    fn cpus_that_fail_stop_the_others(test) {
        if !start(test) {
            return;
        }
        let failing = task::spawn_on(1, "failing", async {
            let start = time::now();
            // The other one is busy by then.
            while start.elapsed() < Duration::from_millis(20) {}
            panic!("on purpose, on the second CPU");
        });
        let _masked = janus_kernel::sync::IrqGuard::new();
        let start = time::now();
        while start.elapsed() < PATIENCE {}
        test.check(false, format_args!("the machine did not end: {}", failing.is_some()));
    }
}
