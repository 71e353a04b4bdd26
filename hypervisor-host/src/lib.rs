//! The host side of Janus: the back halves of the Xen devices, as a library.
