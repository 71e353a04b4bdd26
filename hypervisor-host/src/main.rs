//! The program `janus`; all of it is in the library.

use std::process::ExitCode;

fn main() -> ExitCode {
    janus::cli::main()
}
