//! The built `janus` from the outside: control, configuration, console, gdb, with the built image. `cargo xtask test
//! --level cli` says where both are.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

/// How long anything may take before it counts as hung.
const LIMIT: Duration = Duration::from_secs(60);

fn variable(name: &str) -> PathBuf {
    std::env::var_os(name)
        .unwrap_or_else(|| panic!("{name} is not set: cargo xtask test --level cli"))
        .into()
}

/// A directory of its own for sockets and files.
struct World {
    place: tempfile::TempDir,
}

impl World {
    fn new() -> Self {
        Self { place: tempfile::tempdir().unwrap() }
    }
    fn path(&self, name: &str) -> PathBuf {
        self.place.path().join(name)
    }
    fn write(&self, name: &str, text: &str) -> String {
        std::fs::write(self.path(name), text).unwrap();
        self.path(name).display().to_string()
    }
    fn command(&self, words: &[&str]) -> Command {
        let mut command = Command::new(variable("JANUS_PROGRAM"));
        command.args(words).env("JANUS_RUNTIME_DIR", self.path("run")).stdin(Stdio::null());
        command
    }
    /// Runs to the end; answers output and exit code.
    fn run(&self, words: &[&str]) -> (String, String, i32) {
        let child = self.command(words).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
        let output = output_within(child.unwrap());
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        (text(&output.stdout), text(&output.stderr), output.status.code().unwrap_or(-1))
    }
    /// Runs what must succeed.
    fn ok(&self, words: &[&str]) -> String {
        let (out, errors, code) = self.run(words);
        assert_eq!(code, 0, "{words:?}: {out}{errors}");
        out
    }
    /// A guest in the background.
    fn detach(&self, name: &str, more: &[&str]) {
        let image = image();
        let words =
            ["run", &image, "--engine", "monitor", "--name", name, "--memory", "64M", "--detach"];
        let words: Vec<&str> = words.into_iter().chain(more.iter().copied()).collect();
        assert_eq!(self.ok(&words).trim(), name);
    }
    fn stat(&self, name: &str) -> serde_json::Value {
        serde_json::from_str(&self.ok(&["stat", name, "--json"])).unwrap()
    }
    fn names(&self) -> Vec<String> {
        let list: serde_json::Value = serde_json::from_str(&self.ok(&["ls", "--json"])).unwrap();
        let name = |guest: &serde_json::Value| guest["name"].as_str().unwrap().to_owned();
        list.as_array().unwrap().iter().map(name).collect()
    }
}

impl Drop for World {
    fn drop(&mut self) {
        // What a failed test left.
        for name in ["web", "other"] {
            let _ = self.command(&["kill", name]).stderr(Stdio::null()).status();
        }
    }
}

fn image() -> String {
    variable("JANUS_IMAGE").display().to_string()
}

/// The file that the image was stripped from, which has what gdb wants to know.
fn with_lines() -> PathBuf {
    variable("JANUS_IMAGE").with_extension("")
}

fn output_within(mut child: Child) -> Output {
    let (out, errors) = (child.stdout.take(), child.stderr.take());
    let read = |source: Option<Box<dyn std::io::Read + Send>>| {
        std::thread::spawn(move || {
            let mut bytes = Vec::new();
            if let Some(mut source) = source {
                let _ = source.read_to_end(&mut bytes);
            }
            bytes
        })
    };
    let out = read(out.map(|source| Box::new(source) as _));
    let errors = read(errors.map(|source| Box::new(source) as _));
    let deadline = Instant::now() + LIMIT;
    let status = loop {
        if let Some(status) = child.try_wait().unwrap() {
            break status;
        }
        if Instant::now() > deadline {
            let _ = child.kill();
            panic!("it did not end: {}", String::from_utf8_lossy(&errors.join().unwrap()));
        }
        std::thread::sleep(Duration::from_millis(5));
    };
    Output { status, stdout: out.join().unwrap(), stderr: errors.join().unwrap() }
}

/// Waits until something is so.
fn until(what: &str, mut is_so: impl FnMut() -> bool) {
    let deadline = Instant::now() + LIMIT;
    while !is_so() {
        assert!(Instant::now() < deadline, "never: {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn a_guest_in_the_background_is_listed_seen_measured_and_stopped() {
    let world = World::new();
    world.detach("web", &[]);
    assert_eq!(world.names(), ["web"]);
    let (_, errors, code) = world.run(&["run", &image(), "--engine", "monitor", "--name", "web"]);
    assert!(code == 2 && errors.contains("runs already"), "{errors}");
    until("it makes hypercalls", || world.stat("w")["hypercalls"][0]["calls"].as_u64() > Some(0));
    // Two at its console: both see what one types.
    let mut viewers: Vec<Child> = (0..2)
        .map(|_| {
            let mut command = world.command(&["console", "web"]);
            command
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .stderr(Stdio::null())
                .spawn()
                .unwrap()
        })
        .collect();
    viewers[0].stdin.as_mut().unwrap().write_all(b"echo seen-by-all\n").unwrap();
    for viewer in &mut viewers {
        let lines = BufReader::new(viewer.stdout.take().unwrap()).lines();
        // Behind whatever the line editor drew.
        let seen =
            |line: &String| line.trim_end().ends_with("seen-by-all") && !line.contains("echo");
        assert!(lines.map_while(Result::ok).any(|line| seen(&line)));
        let _ = viewer.kill();
        let _ = viewer.wait();
    }
    let pid = world.ok(&["ls"]);
    assert!(pid.contains("NAME") && pid.contains("web"), "{pid}");
    world.ok(&["pause", "web"]);
    let list = world.ok(&["ls", "--json"]);
    assert!(list.contains("\"paused\""), "{list}");
    let before = world.stat("web")["hypercalls"].clone();
    assert_eq!(world.stat("web")["hypercalls"], before, "nothing runs");
    let (_, errors, code) = world.run(&["stop", "web"]);
    assert!(code == 2 && errors.contains("resume it first"), "{errors}");
    world.ok(&["resume", "web"]);
    world.ok(&["memory", "web", "32M"]);
    until("the balloon is full", || world.stat("web")["memory_kib"].as_u64() <= Some(33 * 1024));
    world.ok(&["stop", "web", "--timeout", "30s"]);
    until("it is gone", || world.names().is_empty());
}

#[test]
fn names_of_killed_processes_are_free_again() {
    let world = World::new();
    world.detach("web", &[]);
    world.detach("other", &[]);
    let list: serde_json::Value = serde_json::from_str(&world.ok(&["ls", "--json"])).unwrap();
    let guest = list.as_array().unwrap().iter().find(|guest| guest["name"] == "web").unwrap();
    let pid = guest["pid"].as_u64().unwrap().to_string();
    let killed = Command::new("kill").args(["-9", &pid]).status().unwrap();
    assert!(killed.success());
    // The process takes a moment to go.
    until("the stale socket is removed", || {
        world.names() == ["other"] && !world.path("run/web.sock").exists()
    });
    world.detach("web", &[]);
    world.ok(&["kill", "web"]);
    world.ok(&["kill", "other"]);
    let (_, errors, code) = world.run(&["stat", "web"]);
    assert!(code == 2 && errors.contains("none runs"), "{errors}");
}

#[test]
fn waiting_ends_with_the_guests_code_and_events_tell_the_story() {
    let world = World::new();
    world.detach(
        "web",
        &["--paused", "--exec", "poweroff 3", "--json", world.path("events").to_str().unwrap()],
    );
    let waiting = world.command(&["wait", "web"]).stderr(Stdio::piped()).spawn().unwrap();
    world.ok(&["resume", "web"]);
    let output = output_within(waiting);
    assert_eq!(output.status.code(), Some(3), "{}", String::from_utf8_lossy(&output.stderr));
    let text = std::fs::read_to_string(world.path("events")).unwrap();
    let events: Vec<serde_json::Value> =
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let names: Vec<&str> = events.iter().map(|event| event["event"].as_str().unwrap()).collect();
    assert_eq!((names.first(), names.last()), (Some(&"started"), Some(&"ended")), "{text}");
    assert!(names.contains(&"resumed"), "{text}");
    let last = events.last().unwrap();
    assert_eq!((&last["reason"], &last["code"]), (&"poweroff".into(), &3.into()));
    assert!(events.iter().all(|event| event["version"] == 1));
}

#[test]
fn files_describe_guests() {
    let world = World::new();
    let image = image();
    let disk = world.path("disk.img");
    std::fs::write(&disk, vec![0; 1 << 20]).unwrap();
    let toml = format!(
        "image = '{image}'\nengine = 'monitor'\nmemory = '64M'\nexec = 'block info'\n\
         disk = [{{ file = 'disk.img', ro = true }}]\n"
    );
    let file = world.write("guest.toml", &toml);
    let out = world.ok(&["run", "--config", &file]);
    assert!(out.contains("xvda"), "{out}");
    let file = world.write("wrong.toml", "image = 'x'\nmemry = 64\n");
    let (_, errors, code) = world.run(&["run", "--config", &file]);
    assert!(
        code == 2 && errors.contains(":2: unknown field `memry`; was `memory` meant?"),
        "{errors}"
    );
    let xl = format!(
        "# an xl guest\nname = \"other\"\ntype = \"pv\"\nkernel = '{image}'\nmemory = 64\nvcpus = 1\n\
         extra = \"--exec 'block info; poweroff 5'\"\ndisk = [\n  'format=raw, vdev=xvdb, access=ro, target={}',\n]\n\
         vif = [ 'mac=00:16:3e:00:00:01, bridge=xenbr0' ]\nvnc = 1\non_reboot = 'destroy'\n",
        disk.display()
    );
    let file = world.write("guest.cfg", &xl);
    let (out, errors, code) = world.run(&["run", "--engine", "monitor", "--config", &file]);
    assert!(code == 5 && out.contains("xvdb"), "{code}: {out}{errors}");
    for remark in ["guest.cfg:11: vif", "guest.cfg:12: `vnc` is not honoured"] {
        assert!(errors.contains(remark), "{remark}: {errors}");
    }
    let file = world.write("hvm.cfg", "type = 'hvm'\n");
    let (_, errors, code) = world.run(&["run", "--config", &file]);
    assert!(code == 2 && errors.contains("hvm.cfg:1:"), "{errors}");
}

#[test]
fn ends_follow_their_rules_and_crashes_leave_reports() {
    let world = World::new();
    let image = image();
    let (report, events) = (world.path("crash.json"), world.path("events"));
    let (report_text, events_text) = (report.to_str().unwrap(), events.to_str().unwrap());
    let (_, errors, code) = world.run(&[
        "run",
        &image,
        "--engine",
        "monitor",
        "--memory",
        "64M",
        "--timeout",
        "1500ms",
        "--crash-report",
        report_text,
        "--json",
        events_text,
        "--no-control",
    ]);
    assert!(code == 124 && errors.contains("backtrace:"), "{code}: {errors}");
    let report: serde_json::Value =
        serde_json::from_str(&std::fs::read_to_string(&report).unwrap()).unwrap();
    let named = |place: &serde_json::Value| {
        place["function"].as_str().is_some_and(|name| name.contains("janus"))
    };
    let places = report["cpus"][0]["backtrace"].as_array().unwrap();
    assert!(places.iter().any(named), "{report:#}");
    assert!(places.iter().any(|place| place["line"].is_u64()), "{report:#}");
    let (_, _, code) = world.run(&[
        "run",
        &image,
        "--engine",
        "monitor",
        "--exec",
        "reboot",
        "--on-reboot",
        "destroy",
    ]);
    assert_eq!(code, 7);
}

#[test]
fn gdb_breaks_steps_and_reads() {
    let world = World::new();
    let (image, socket) = (image(), world.path("gdb.sock"));
    let address = format!("unix:{}", socket.display());
    let mut guest = world.command(&[
        "run",
        &image,
        "--engine",
        "monitor",
        "--memory",
        "64M",
        "--exec",
        "uptime",
        "--gdb",
        &address,
        "--timeout",
        "60s",
    ]);
    let guest = guest.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    until("it waits for gdb", || socket.exists());
    let script = [
        "set pagination off",
        "set confirm off",
        &format!("target remote {}", socket.display()),
        "monitor help",
        "break janus_kernel::xen::start::start_services",
        "continue",
        "backtrace",
        "stepi",
        "stepi",
        "stepi",
        "x/4xb $rip",
        "info threads",
        "monitor ports",
        "monitor walk 200000",
        "delete",
        "continue",
    ];
    let mut gdb = Command::new("gdb");
    gdb.args(["-batch", "-nx"]);
    for line in script {
        gdb.args(["-ex", line]);
    }
    let gdb =
        gdb.arg(with_lines()).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let output = output_within(gdb.spawn().expect("gdb is installed"));
    // What a monitor says is an error's text for gdb.
    let text = [output.stdout, output.stderr].map(|out| String::from_utf8_lossy(&out).into_owned());
    let text = text.concat();
    for part in [
        "monitor walk ADDRESS",
        // Where that is inlined into is not ours to say.
        "Breakpoint 1, janus_kernel::xen::",
        "janus_kernel::xen::start::start_services ()",
        "in janus_kernel::xen::start::start_pv",
        "port 1:",
        "L4 table in frame",
        "vCPU 0",
        "exited normally",
    ] {
        assert!(text.contains(part), "{part} is not in:\n{text}");
    }
    let output = output_within(guest);
    assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(String::from_utf8_lossy(&output.stdout).contains("janus-report: {\"exit\":0}"));
    assert!(!Path::new(&socket).exists());
}
