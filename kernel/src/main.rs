//! The default image: an interactive shell over disk and network.
#![cfg_attr(target_os = "none", no_std, no_main)]

janus_kernel::entry!(janus_kernel::services::run);

#[cfg(not(target_os = "none"))]
fn main() {
    eprintln!(
        "this is the guest kernel: build it with `cargo xtask build`, boot it with `cargo xtask run`"
    );
}
