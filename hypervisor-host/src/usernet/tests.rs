//! The network as a guest sees it: frames in, frames out, against real sockets of this machine.
