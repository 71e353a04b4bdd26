//! What a Linux guest runs in `cargo xtask bench`: the same commands on its console, the same answers as Janus.
//!
//! It serves the file system mounted on `/mnt` over HTTP by `sendfile(2)`, the cheapest way Linux has, and
//! obeys `bench DISK seq|random BYTES DEPTH SECONDS` (O_DIRECT; `io_submit(2)` beyond depth 1) and `poweroff`;
//! `tcp-sink PORT BYTES` and `tcp-source PORT BYTES` move bytes over one connection. Started with arguments, it measures
//! the machine itself instead (`native.rs`).

mod disk;
mod http;
mod native;
mod stream;
mod uptime;

use std::io::BufRead as _;

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if !arguments.is_empty() {
        std::process::exit(native::run(&arguments));
    }
    if let Err(error) = http::start(80) {
        println!("peer: no HTTP server: {error}");
    }
    // Since the kernel's clock began, which is a little later than its first instruction.
    println!("peer: ready after {:.3} ms", uptime::milliseconds());
    for line in std::io::stdin().lock().lines() {
        let Ok(line) = line else { break };
        let words: Vec<&str> = line.split_whitespace().collect();
        match *words {
            [] => {}
            ["poweroff"] => break,
            ["tcp-sink", port, bytes] | ["tcp-source", port, bytes] => {
                let (Ok(port), Ok(bytes)) = (port.parse(), bytes.parse()) else {
                    println!("peer: not numbers: {line}");
                    continue;
                };
                let inwards = words.first() == Some(&"tcp-sink");
                match stream::run(port, bytes, inwards) {
                    Ok((bytes, us)) => println!(
                        "janus-bench: {{\"tcp\":\"{}\",\"bytes\":{bytes},\"us\":{us}}}",
                        if inwards { "in" } else { "out" }
                    ),
                    Err(error) => println!("peer: {line}: {error}"),
                }
            }
            ["bench", device, pattern, size, depth, seconds] => {
                let numbers = (size.parse(), depth.parse(), seconds.parse());
                let (Ok(size), Ok(depth), Ok(seconds)) = numbers else {
                    println!("peer: not numbers: {line}");
                    continue;
                };
                match disk::bench(device, pattern == "random", size, depth, seconds) {
                    Ok((requests, us)) => println!(
                        "janus-bench: {{\"disk\":\"{device}\",\"random\":{},\"size\":{size},\"depth\":{depth},\
                         \"requests\":{requests},\"us\":{us}}}",
                        pattern == "random"
                    ),
                    Err(error) => println!("peer: {device}: {error}"),
                }
            }
            _ => println!("peer: unknown command: {line}"),
        }
    }
}
