//! The default image: an interactive shell over disk and network.
#![cfg_attr(target_os = "none", no_std, no_main)]

use core::time::Duration;

use janus_kernel::power::ExitStatus;
use janus_kernel::{println, time};

async fn shell() -> ExitStatus {
    println!("up after {} us", time::now().as_nanos() / 1000);
    time::sleep(Duration::from_millis(5)).await;
    println!("slept until {} us", time::now().as_nanos() / 1000);
    log::info!("type a line");
    let mut line = [0; 80];
    let count = janus_kernel::console::read(&mut line).await;
    println!("{:?}", line.get(..count));
    ExitStatus::PowerOff(0)
}

janus_kernel::entry!(shell);

#[cfg(not(target_os = "none"))]
fn main() {
    eprintln!(
        "this is the guest kernel: build it with `cargo xtask build`, boot it with `cargo xtask run`"
    );
}
