//! One session: from gdb's connection to its end.

use std::io;

use gdbstub::common::Signal;
use gdbstub::stub::state_machine::GdbStubStateMachine;
use gdbstub::stub::{DisconnectReason, GdbStub, GdbStubError};

use super::debuggee::{Debuggee, Never, Stop};
use super::link::{Came, Link};

/// How a session ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Over {
    /// gdb left, or its connection broke.
    Left,
    /// gdb asked for the guest's end.
    Kill,
    /// The guest has ended, and gdb was told.
    Ended,
}

/// Serves gdb. The domain is paused once, and is so afterwards unless it has ended.
pub(super) fn serve(link: Link, debuggee: &mut Debuggee) -> Over {
    let bell = std::sync::Arc::clone(&debuggee.bell);
    let run = |debuggee: &mut Debuggee| -> Result<Over, GdbStubError<Never, io::Error>> {
        let mut gdb = GdbStub::new(link).run_state_machine(debuggee)?;
        let mut running = false;
        loop {
            gdb = match gdb {
                GdbStubStateMachine::Idle(mut idle) => {
                    running = false;
                    match idle.borrow_conn().wait(&bell) {
                        Ok(Came::Byte(byte)) => idle.incoming_data(debuggee, byte)?,
                        // Ended while gdb looked at it: there is no way to say so, but to hang up.
                        Ok(Came::Bell)
                            if debuggee.domain.ended().is_some()
                                && debuggee.post_mortem.is_none() =>
                        {
                            return Ok(Over::Ended);
                        }
                        Ok(Came::Bell) => idle.into(),
                        Err(_) => return Ok(Over::Left),
                    }
                }
                GdbStubStateMachine::Running(mut runs) => {
                    running = true;
                    match debuggee.stopped() {
                        Some(reason) => runs.report_stop(debuggee, reason)?,
                        None => match runs.borrow_conn().wait(&bell) {
                            Ok(Came::Byte(byte)) => runs.incoming_data(debuggee, byte)?,
                            Ok(Came::Bell) => runs.into(),
                            Err(_) => {
                                debuggee.halt();
                                return Ok(Over::Left);
                            }
                        },
                    }
                }
                GdbStubStateMachine::CtrlCInterrupt(interrupted) => {
                    if running {
                        debuggee.halt();
                    }
                    interrupted.interrupt_handled(debuggee, Some(Stop::Signal(Signal::SIGINT)))?
                }
                GdbStubStateMachine::Disconnected(over) => {
                    return Ok(match over.get_reason() {
                        DisconnectReason::Kill => Over::Kill,
                        DisconnectReason::Disconnect => Over::Left,
                        DisconnectReason::TargetExited(_)
                        | DisconnectReason::TargetTerminated(_) => Over::Ended,
                    });
                }
            };
        }
    };
    match run(debuggee) {
        Ok(over) => over,
        Err(error) => {
            eprintln!("janus: gdb: {error}\r");
            Over::Left
        }
    }
}
