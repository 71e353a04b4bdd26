//! How fast the user network is, with a guest made of smoltcp beside it: `cargo bench -p janus-tests --bench usernet`.
//!
//! Pin it (`taskset -c 1`) for the figure of one CPU, which then runs the guest, the network and the peer on the
//! host's loopback interface. On a busy machine the figure per second of CPU time (all threads, and what the kernel
//! does for them) is the one that means something. Without `--bench` (as `cargo test` runs it) it moves little.

#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "a benchmark ends where something is wrong"
)]
#![expect(dead_code, reason = "the tests use more of the guest")]

#[path = "../usernet/guest.rs"]
mod guest;

use std::io::{Read as _, Write as _};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::thread;
use std::time::Instant;

use janus::usernet::{Config, GATEWAY};

use guest::{Guest, OFFLOADS};

/// What a peer reads or writes at once.
const CHUNK: usize = 256 * 1024;

/// A point in time, on the clock and in CPU time.
struct Start(Instant, f64);

impl Start {
    fn now() -> Self {
        Self(Instant::now(), cpu_seconds())
    }
    /// Gbit/s by the clock and by CPU time.
    fn gigabits(&self, bytes: usize) -> (f64, f64) {
        let bits = bytes as f64 * 8.0 / 1e9;
        (bits / self.0.elapsed().as_secs_f64(), bits / (cpu_seconds() - self.1))
    }
}

/// CPU time of this process so far: user and system ticks of proc_pid_stat(5).
fn cpu_seconds() -> f64 {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap();
    let fields = stat.rsplit_once(')').unwrap().1.split_whitespace();
    fields.skip(11).take(2).map(|ticks| ticks.parse::<f64>().unwrap()).sum::<f64>() / 100.0
}

fn listener() -> (TcpListener, u16) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    (listener, port)
}

fn swallow(mut stream: TcpStream) -> usize {
    let (mut buf, mut total) = (vec![0; CHUNK], 0);
    loop {
        match stream.read(&mut buf).unwrap() {
            0 => return total,
            len => total += len,
        }
    }
}

fn pour(mut stream: TcpStream, total: usize) {
    let buf = vec![7; CHUNK];
    for _ in 0..total / CHUNK {
        stream.write_all(&buf).unwrap();
    }
    stream.shutdown(Shutdown::Write).unwrap();
}

/// The physical limit: the same peer without a guest.
fn plain(total: usize) -> (f64, f64) {
    let (listener, port) = listener();
    let host = thread::spawn(move || swallow(listener.accept().unwrap().0));
    let start = Start::now();
    pour(TcpStream::connect(("127.0.0.1", port)).unwrap(), total);
    assert_eq!(host.join().unwrap(), total);
    start.gigabits(total)
}

fn out(total: usize) -> (f64, f64) {
    let (listener, port) = listener();
    let host = thread::spawn(move || swallow(listener.accept().unwrap().0));
    let mut guest = Guest::new(Config::default(), OFFLOADS);
    let handle = guest.connect((GATEWAY, port), 50_000);
    guest.until("connected", |guest| guest.tcp(handle).may_send().then_some(()));
    let (start, mut sent) = (Start::now(), 0);
    guest.until("everything is sent", |guest| {
        let socket = guest.tcp(handle);
        while sent < total && socket.can_send() {
            sent += socket
                .send(|room| {
                    let len = room.len().min(total - sent);
                    room[..len].fill(7);
                    (len, len)
                })
                .unwrap();
        }
        (sent == total).then_some(())
    });
    guest.tcp(handle).close();
    guest.until("it is through", |guest| (guest.tcp(handle).send_queue() == 0).then_some(()));
    assert_eq!(host.join().unwrap(), total);
    start.gigabits(total)
}

fn inward(total: usize) -> (f64, f64) {
    let (listener, port) = listener();
    let host = thread::spawn(move || pour(listener.accept().unwrap().0, total));
    let mut guest = Guest::new(Config::default(), OFFLOADS);
    let handle = guest.connect((GATEWAY, port), 50_000);
    guest.until("connected", |guest| guest.tcp(handle).may_send().then_some(()));
    let (start, mut got) = (Start::now(), 0);
    guest.until("everything is received", |guest| {
        let socket = guest.tcp(handle);
        while socket.can_recv() {
            got += socket.recv(|data| (data.len(), data.len())).unwrap();
        }
        (!socket.may_recv()).then_some(())
    });
    assert_eq!(got, total);
    host.join().unwrap();
    start.gigabits(total)
}

/// Microseconds for a byte to the published port and back.
fn echo(rounds: usize) -> f64 {
    let config = Config { publish: vec!["0:7".parse().unwrap()], ..Config::default() };
    let mut guest = Guest::new(config, OFFLOADS);
    let (_, address) = guest.net.published()[0];
    let handle = guest.add_tcp();
    guest.tcp(handle).listen(7).unwrap();
    let host = thread::spawn(move || {
        let mut stream = TcpStream::connect(address).unwrap();
        stream.set_nodelay(true).unwrap();
        let start = Instant::now();
        let mut byte = [0; 1];
        for _ in 0..rounds {
            stream.write_all(&[1]).unwrap();
            stream.read_exact(&mut byte).unwrap();
        }
        start.elapsed().as_secs_f64() * 1e6 / rounds as f64
    });
    // Somebody must show that there is a guest.
    let first = guest.connect((GATEWAY, 1), 50_000);
    guest.until("all rounds", |guest| {
        let socket = guest.tcp(handle);
        while socket.can_recv() {
            let mut buf = [0; 64];
            let len = socket.recv_slice(&mut buf).unwrap();
            socket.send_slice(&buf[..len]).unwrap();
        }
        (socket.state() == smoltcp::socket::tcp::State::CloseWait).then_some(())
    });
    guest.sockets.remove(first);
    host.join().unwrap()
}

fn main() {
    let real = std::env::args().any(|argument| argument == "--bench");
    let (total, rounds, runs) = if real { (4 << 30, 20_000, 5) } else { (4 << 20, 10, 1) };
    for _ in 0..runs {
        for (what, run) in
            [("loopback alone", plain as fn(usize) -> (f64, f64)), ("out", out), ("in", inward)]
        {
            let (wall, cpu) = run(total);
            print!("{what} {wall:.1} Gbit/s ({cpu:.1} per CPU second)   ");
        }
        println!("round trip {:.1} us", echo(rounds));
    }
}
