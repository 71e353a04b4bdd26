//! The header of a request/response ring (`xen/include/public/io/ring.h`): word indices into the shared memory.
//!
//! The protocol over it is in `crate::ring`.

/// Word index of `req_prod`: requests the front has published.
pub const REQ_PROD: usize = 0;
/// Word index of `req_event`: the back wants a notification when `req_prod` passes it.
pub const REQ_EVENT: usize = 1;
/// Word index of `rsp_prod`: responses the back has published.
pub const RSP_PROD: usize = 2;
/// Word index of `rsp_event`: the front wants a notification when `rsp_prod` passes it.
pub const RSP_EVENT: usize = 3;
/// Words before the first slot.
pub const HEADER_WORDS: usize = 16;
