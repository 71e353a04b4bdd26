//! Event channels in queues. The kernel's own events end with the change, so few words are said.

use alloc::format;
use alloc::string::String;

use janus_kernel::guest_test;
use janus_proto::abi::xen::Hypercall;

use crate::ask::{Page, call, tell};

guest_test! {
    /// Control blocks, the array, priorities, a link.
    fn fifo_of_events(test) {
        let (Some(page), Some(control), Some(array)) = (Page::new(test), Page::new(test), Page::new(test)) else {
            return;
        };
        let mut said = String::new();
        let mut operate = |key: &str, op: u64, words: &[u64]| {
            page.put(words);
            let answer = call(Hypercall::EVENT_CHANNEL_OP, &[op, page.address()]);
            said.push_str(&format!("{key} {answer}; "));
            answer
        };
        // control_gfn, offset and vcpu
        operate("not-ours", 11, &[1, 0]);
        operate("offset-4", 11, &[control.mfn(), 4]);
        operate("offset-4032", 11, &[control.mfn(), 4032]);
        operate("vcpu-9", 11, &[control.mfn(), 9 << 32]);
        operate("priority-before", 13, &[1 | 3 << 32]);
        operate("init", 11, &[control.mfn(), 0]);
        let link_bits = page.word(2) & 0xff;
        operate("init-again", 11, &[control.mfn(), 0]);
        operate("array-not-ours", 12, &[1]);
        operate("array", 12, &[array.mfn()]);
        operate("array-same", 12, &[array.mfn()]);
        operate("ipi", 7, &[0]);
        let port = page.half(1);
        operate("priority-16", 13, &[u64::from(port) | 16 << 32]);
        operate("priority-0", 13, &[u64::from(port)]);
        operate("priority-none", 13, &[900 | 3 << 32]);
        // Masked from the start? Then unmask, and send.
        let before = array.half(port as usize);
        operate("unmask", 9, &[port.into()]);
        operate("send", 4, &[port.into()]);
        let after = array.half(port as usize);
        let head = control.half(2) == port;
        tell("fifo", said.trim_end());
        tell("fifo.link_bits", link_bits);
        tell("fifo.word", format!("{before:#x} {after:#x}"));
        // Other ports may be pending as well, at their own priority.
        tell("fifo.ready", control.half(0) & 1);
        tell("fifo.head", head);
    }
}
