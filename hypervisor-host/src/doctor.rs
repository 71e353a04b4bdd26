//! What each loader will do with a kernel's file, said before any of them is tried.
//!
//! [`image`] finds every header that some loader looks for, [`loaders`] holds the loaders' rules as code, one function
//! each, with the place where each rule is written; [`payload`] unpacks what a bzImage carries, since Xen's toolstack
//! reads the notes in there. Nothing here runs a guest.

pub mod image;
pub mod loaders;
pub mod payload;
#[cfg(test)]
mod tests;

pub use image::Image;
pub use loaders::{Prediction, Verdict, predict};
