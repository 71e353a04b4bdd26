//! What `xl` configurations become.

use super::*;

fn settings(text: &str) -> Vec<(String, Vec<String>)> {
    let (settings, _) = read(text).unwrap();
    let word = |value: Value| match value {
        Value::Text(text) => text,
        Value::Flag(on) => on.to_string(),
    };
    settings.into_iter().map(|s| (s.name, s.values.into_iter().map(word).collect())).collect()
}

fn remarks(text: &str) -> Vec<(usize, String)> {
    read(text).unwrap().1
}

#[test]
fn an_ordinary_guest_becomes_options() {
    let text = r#"
# Example PV Linux guest configuration
name = "web.pvlinux"
type = "pv"
kernel = "/boot/vmlinuz"
ramdisk = "/boot/initrd.gz"
root = "/dev/xvda1 ro"
extra = 'console=hvc0'
memory = 128
maxmem = 512
vcpus = 2
vif = [ 'mac=00:16:3e:00:00:01,bridge=xenbr0', '' ]
disk = [ '/dev/vg/guest-volume,raw,xvda,rw',
         'format=qcow2, vdev=xvdb, access=ro, target=/images/b', ]
on_poweroff = 'destroy'
on_reboot = 'restart'
on_crash = "coredump-restart"
"#;
    let expected = [
        ("name", vec!["web.pvlinux"]),
        ("image", vec!["/boot/vmlinuz"]),
        ("initrd", vec!["/boot/initrd.gz"]),
        ("append", vec!["root=/dev/xvda1 ro console=hvc0"]),
        ("memory", vec!["128M"]),
        ("max-memory", vec!["512M"]),
        ("cpus", vec!["2"]),
        ("net", vec!["user,mac=00:16:3e:00:00:01", "user"]),
        ("disk", vec!["/dev/vg/guest-volume,vdev=xvda", "/images/b,ro,vdev=xvdb,format=qcow2"]),
        ("on-poweroff", vec!["destroy"]),
        ("on-reboot", vec!["restart"]),
        ("on-crash", vec!["restart"]),
    ];
    let found = settings(text);
    let found: Vec<_> = found
        .iter()
        .map(|(name, values)| {
            (name.as_str(), values.iter().map(String::as_str).collect::<Vec<_>>())
        })
        .collect();
    assert_eq!(found, expected);
    let told = remarks(text);
    assert_eq!(told.iter().map(|(line, _)| *line).collect::<Vec<_>>(), [12, 17], "{told:?}");
}

#[test]
fn contradictions_and_other_kinds_of_guest_are_errors() {
    for (wrong, line, part) in [
        ("type='hvm'", 1, "PV"),
        ("\nbuilder='hvm'", 2, "PV"),
        ("type='pv'\nbuilder='hvm'", 2, "contradicts"),
        ("memory=256\nmaxmem=128", 2, "less"),
        ("vcpus=2\nmaxvcpus=1", 2, "less"),
        ("kernel='a'\nbootloader='pygrub'", 2, "contradicts"),
        ("bootloader='pygrub'", 1, "copy the kernel"),
        ("on_crash='explode'", 1, "none of"),
        ("memory='much'", 1, "number"),
        ("name=['a']", 1, "not a list"),
        ("disk=[1]", 1, "texts"),
        ("disk=['/a,raw,xvda,zz']", 1, "access"),
        ("vif=['type=ioemu']", 1, "contradicts"),
        ("vif=['bridge']", 1, "KEY=VALUE"),
    ] {
        let (at, what) = read(wrong).unwrap_err();
        assert!(at == line && what.contains(part), "{wrong:?}: {at}: {what}");
    }
}

#[test]
fn what_is_not_honoured_is_told_once_each_and_what_is_off_is_not() {
    let told = remarks("vnc=1\nsdl=0\npci=[]\nmemry=64\ncpus='0-3'\nextra='a'\ncmdline='b'");
    let lines: Vec<usize> = told.iter().map(|(line, _)| *line).collect();
    assert_eq!(lines, [1, 4, 5, 6], "{told:?}");
    assert!(told[1].1.contains("`memory`"), "{told:?}");
}

#[test]
fn the_limit_alone_is_the_size() {
    assert_eq!(settings("maxmem=64"), [("memory".to_owned(), vec!["64M".to_owned()])]);
}
