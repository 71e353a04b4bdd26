//! What the user network costs: datagrams to and fro, datagrams out, bulk TCP both ways.

use std::net::{TcpListener, UdpSocket};
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use serde_json::Value;

use super::super::guests::{InQemu, STREAM, Subject as _};
use super::row::{Goal, Row, Unit};
use super::{Bench, samples};

/// Round trips in a sample.
const TRIPS: u32 = 2000;
/// Samples.
const SAMPLES: u32 = 9;
/// Datagrams that are sent out in a sample.
const FLOOD: u32 = 20_000;
/// The guest's ports.
const ECHO: u16 = 5003;
const SINK: u16 = 5001;
const SOURCE: u16 = 5002;

/// A port that is free now.
fn free_port() -> Result<u16> {
    Ok(TcpListener::bind(("127.0.0.1", 0))?.local_addr()?.port())
}

/// Rows A11 to A13.
pub(super) fn rows(bench: &Bench<'_>) -> Result<Vec<Row>> {
    let [echo, sink, source] = [free_port()?, free_port()?, free_port()?];
    let mut command = bench.janus(&bench.image);
    command.args(["--net", "user", "--memory", "256M"]);
    command.args(["-p", &format!("127.0.0.1:{echo}:{ECHO}/udp")]);
    command.args(["-p", &format!("127.0.0.1:{sink}:{SINK}")]);
    command.args(["-p", &format!("127.0.0.1:{source}:{SOURCE}")]);
    command.stdin(Stdio::piped());
    let mut guest = InQemu::of_command(command, vec![(sink, SINK), (source, SOURCE)])?;
    guest.ready(&["janus: ready", "has the address"])?;
    let trips = round_trips(&mut guest, echo)?;
    let discard = UdpSocket::bind(("127.0.0.1", 0))?;
    let port = discard.local_addr()?.port();
    let mut floods = Vec::new();
    for _ in 0..SAMPLES {
        let line = format!("udp-flood 10.0.2.2 {port} 1400 {FLOOD}");
        floods.extend(samples(&json(&guest.ask(&line, "janus-bench: ")?)?, "ns")?);
    }
    let [inwards, outwards] = streams(&mut guest)?;
    guest.ask("poweroff", "")?;
    let rate = |times: Vec<f64>| times.into_iter().map(|time| 1e9 / time).collect::<Vec<f64>>();
    let native = |name: &str| bench.limit(&[name]);
    let tcp = native("tcp")?;
    Ok(vec![
        Row::new("A11", "64-byte datagram to the guest and back", Unit::Microseconds, trips)
            .beside("loopback, two threads", native("udp")?, Goal::AtMost(1.5)),
        Row::new("A12", "1400-byte datagrams out", Unit::PerSecond, rate(floods)).beside(
            "loopback sends",
            rate(native("udp-send")?),
            Goal::AtLeast(0.8),
        ),
        Row::new("A13", "TCP into the guest, a MiB", Unit::Microseconds, inwards).beside(
            "loopback, two threads",
            tcp.clone(),
            Goal::AtMost(1.1),
        ),
        Row::new("A13", "TCP out of the guest, a MiB", Unit::Microseconds, outwards).beside(
            "loopback, two threads",
            tcp,
            Goal::AtMost(1.1),
        ),
    ])
}

fn json(text: &str) -> Result<Value> {
    serde_json::from_str(text).with_context(|| text.to_owned())
}

/// Nanoseconds of round trips with the guest's echo.
fn round_trips(guest: &mut InQemu, port: u16) -> Result<Vec<f64>> {
    let socket = UdpSocket::bind(("127.0.0.1", 0))?;
    socket.connect(("127.0.0.1", port))?;
    socket.set_read_timeout(Some(Duration::from_secs(5)))?;
    let count = (SAMPLES + 1) * TRIPS;
    guest.ask(&format!("udp-echo {ECHO} {count}"), "echoing on port")?;
    let mut times = Vec::new();
    let mut buffer = [0; 64];
    for sample in 0..=SAMPLES {
        let start = Instant::now();
        for _ in 0..TRIPS {
            socket.send(&buffer)?;
            socket.recv(&mut buffer).context("the guest does not answer")?;
        }
        if sample > 0 {
            times.push(start.elapsed().as_secs_f64() * 1e9 / f64::from(TRIPS));
        }
    }
    Ok(times)
}

/// Nanoseconds a MiB of streams into the guest and out of it.
fn streams(guest: &mut InQemu) -> Result<[Vec<f64>; 2]> {
    let mut times = [Vec::new(), Vec::new()];
    for _ in 0..SAMPLES {
        guest.ask(&format!("tcp-sink {SINK} {STREAM}"), "listening on port")?;
        guest.push(SINK)?;
        times[0].push(per_mib(&guest.answer("janus-bench: ")?)?);
        guest.ask(&format!("tcp-source {SOURCE} {STREAM}"), "listening on port")?;
        guest.pull(SOURCE)?;
        times[1].push(per_mib(&guest.answer("janus-bench: ")?)?);
    }
    Ok(times)
}

fn per_mib(text: &str) -> Result<f64> {
    let line = json(text)?;
    let value = |name: &str| line.get(name).and_then(Value::as_f64).context("not measured");
    Ok(value("us")? * 1e3 / (value("bytes")? / f64::from(1 << 20)))
}
