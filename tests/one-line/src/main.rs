//! The smallest guest: whichever door it came by, it prints one line and ends. The bench starts it to see what a start
//! costs at least; there is no kernel in it.
#![cfg_attr(target_os = "none", no_std, no_main)]

#[cfg(target_os = "none")]
mod guest;

/// There is nothing to see on the host.
#[cfg(not(target_os = "none"))]
fn main() {}
