//! The machine that guests are given: its memory.

pub(crate) mod contents;
mod list;
pub mod ram;
pub mod window;
