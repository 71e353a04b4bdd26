//! The program `janus`; all of it is in the library.

#[cfg(target_env = "musl")]
mod allocator;

use std::process::ExitCode;

fn main() -> ExitCode {
    janus::cli::main()
}
