//! Sockets on the loopback interface: what the host's own network costs on this CPU.

use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::thread;

use super::batches;

/// Bytes of a TCP write, as the guests' bench does.
const BUFFER: usize = 1 << 20;
/// The end of an echo.
const STOP: &[u8] = b"stop";

fn told(error: std::io::Error) -> String {
    format!("loopback: {error}")
}

fn udp_pair() -> std::io::Result<[UdpSocket; 2]> {
    let sockets = [UdpSocket::bind(("127.0.0.1", 0))?, UdpSocket::bind(("127.0.0.1", 0))?];
    let [one, other] = &sockets;
    one.connect(other.local_addr()?)?;
    other.connect(one.local_addr()?)?;
    Ok(sockets)
}

/// A datagram of 64 bytes to another thread and back.
pub(super) fn udp() -> Result<Vec<f64>, String> {
    let [here, there] = udp_pair().map_err(told)?;
    let echo = thread::spawn(move || -> std::io::Result<()> {
        let mut buffer = [0; 64];
        loop {
            let count = there.recv(&mut buffer)?;
            let data = buffer.get(..count).unwrap_or_default();
            if data == STOP {
                return Ok(());
            }
            there.send(data)?;
        }
    });
    let mut failure = None;
    let mut buffer = [0; 64];
    let samples = batches(1000, || {
        let trip = here.send(&buffer).and_then(|_| here.recv(&mut buffer));
        failure = trip.err().or(failure.take());
    });
    here.send(STOP).map_err(told)?;
    echo.join().map_err(|_| "the echo ended badly")?.map_err(told)?;
    failure.map_or(Ok(samples), |error| Err(told(error)))
}

/// A datagram of 1400 bytes to nobody who listens.
pub(super) fn udp_send() -> Result<Vec<f64>, String> {
    let [here, _there] = udp_pair().map_err(told)?;
    let buffer = [0; 1400];
    let mut failure = None;
    let samples = batches(2000, || failure = here.send(&buffer).err().or(failure.take()));
    failure.map_or(Ok(samples), |error| Err(told(error)))
}

/// A MiB through TCP to another thread.
pub(super) fn tcp() -> Result<Vec<f64>, String> {
    let listener = TcpListener::bind(("127.0.0.1", 0)).map_err(told)?;
    let mut here = TcpStream::connect(listener.local_addr().map_err(told)?).map_err(told)?;
    let (mut there, _) = listener.accept().map_err(told)?;
    let sink = thread::spawn(move || -> std::io::Result<()> {
        let mut buffer = vec![0; BUFFER];
        while there.read(&mut buffer)? > 0 {}
        Ok(())
    });
    let buffer = vec![0; BUFFER];
    let mut failure = None;
    let samples = batches(64, || failure = here.write_all(&buffer).err().or(failure.take()));
    drop(here);
    sink.join().map_err(|_| "the sink ended badly")?.map_err(told)?;
    failure.map_or(Ok(samples), |error| Err(told(error)))
}
