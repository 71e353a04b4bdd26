//! The hypervisor's own console: what a guest says before it has one, or when it has none any more.

use janus_proto::abi::xen::{ConsoleIo, Errno};

use super::cpu::Cpu;
use super::hypercall::{Answer, low32};

/// Bytes taken from the guest at a time.
const CHUNK: usize = 128;
const CHUNK_U32: u32 = 128;

pub(crate) fn console_io(cpu: &mut Cpu, [command, count, buffer, ..]: [u64; 6]) -> Answer {
    let (command, count) = (low32(command), low32(count));
    // The count is an `int` that must not be negative.
    if i32::try_from(count).is_err() {
        return Answer::err(Errno::E2BIG);
    }
    Answer::from(match ConsoleIo(command) {
        ConsoleIo::WRITE => write(cpu, count, buffer),
        ConsoleIo::READ => read(cpu, count, buffer),
        _ => Err(Errno::ENOSYS),
    })
}

fn write(cpu: &Cpu, count: u32, buffer: u64) -> Result<u64, Errno> {
    let mut done = 0;
    let mut chunk = [0; CHUNK];
    while done < count && !cpu.domain.is_ending() {
        let part = (count - done).min(CHUNK_U32);
        let Some(bytes) = chunk.get_mut(..part as usize) else { break };
        cpu.read_bytes(buffer.wrapping_add(done.into()), bytes)?;
        cpu.domain.debug_console(bytes);
        done += part;
    }
    Ok(0)
}

fn read(cpu: &Cpu, count: u32, buffer: u64) -> Result<u64, Errno> {
    let bytes = cpu.domain.debug_input(count as usize);
    cpu.write(buffer, bytes.as_slice())?;
    Ok(bytes.len() as u64)
}
