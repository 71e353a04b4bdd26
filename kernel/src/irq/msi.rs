//! Message-signalled interrupts: the message that makes a device interrupt the first CPU.
//!
//! Ref: PCI 3.0, 6.8; Intel SDM volume 3, 11.11. Where the message goes (MSI capability, MSI-X table)
//! is the business of whoever drives the bus.

use super::{Handler, IrqError, Registration, Source, apic, register_vector};
use crate::percpu;

/// What a device writes, and where, to interrupt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Message {
    /// The address that the device writes to.
    pub address: u64,
    /// The value that it writes.
    pub data: u32,
}

impl Message {
    /// An edge-triggered interrupt `vector` for the CPU with APIC id `target`.
    ///
    /// `None`: the id needs more than the eight bits that a message has.
    #[must_use]
    pub const fn new(target: u32, vector: u8) -> Option<Self> {
        if target > 0xff {
            return None;
        }
        Some(Self { address: 0xfee0_0000 | (target as u64) << 12, data: vector as u32 })
    }
}

/// Handles the interrupts of one message on the first CPU, which always runs; answers the message to give to the device.
///
/// # Errors
/// No vector is left, or no local APIC is in use.
pub fn register_msi(
    name: &'static str,
    handler: Handler,
) -> Result<(Registration, Message), IrqError> {
    if !apic::is_on() {
        return Err(IrqError::NotHere);
    }
    let registration = register_vector(name, handler)?;
    let Source::Vector(vector) = registration.source() else { return Err(IrqError::NoVector) };
    let message = Message::new(percpu::first().apic_id(), vector).ok_or(IrqError::NotHere)?;
    Ok((registration, message))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_names_cpu_and_vector() {
        let message = Message::new(3, 0x41).unwrap();
        assert_eq!((message.address, message.data), (0xfee0_3000, 0x41));
        assert_eq!(Message::new(256, 0x41), None);
    }
}
