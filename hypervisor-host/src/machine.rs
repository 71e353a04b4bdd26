//! The machine that guests are given: its memory.

pub mod ram;
pub mod window;
