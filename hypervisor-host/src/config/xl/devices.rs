//! `disk` and `vif`: positional and key=value forms.

use super::Reader;
use crate::config::{Setting, Value, Wrong};

/// Prefixes of the old form `file:/path,xvda,w`, and the format that they mean.
const PREFIXES: [(&str, &str); 8] = [
    ("file:", "raw"),
    ("phy:", "raw"),
    ("raw:", "raw"),
    ("aio:", "raw"),
    ("tap:", ""),
    ("tap2:", ""),
    ("qcow2:", "qcow2"),
    ("vhd:", "vhd"),
];

/// One disk, as it is written.
#[derive(Debug, Default, PartialEq, Eq)]
struct Disk {
    target: String,
    format: Option<String>,
    vdev: Option<String>,
    access: Option<String>,
    /// Options that are left alone.
    others: Vec<String>,
}

/// Reads a disk of xl-disk-configuration(5), in any of its forms.
fn disk(text: &str) -> Result<Disk, String> {
    let mut disk = Disk::default();
    let mut old = false;
    let mut rest = text;
    // The old prefixes may be stacked: `tap:aio:/path`.
    while let Some((prefix, format)) = PREFIXES.iter().find(|(prefix, _)| rest.starts_with(prefix))
    {
        rest = rest.strip_prefix(prefix).unwrap_or(rest);
        old = true;
        if !format.is_empty() {
            disk.format = Some((*format).to_owned());
        }
    }
    let mut has_target = false;
    while !rest.is_empty() {
        // `target=` takes all that is left, commas included.
        if let Some(target) = rest.trim_start().strip_prefix("target=") {
            disk.target = target.to_owned();
            break;
        }
        let (part, after) = rest.split_once(',').unwrap_or((rest, ""));
        rest = after;
        let part = part.trim();
        match part.split_once('=') {
            Some((key, value)) if key.chars().all(|c| c.is_ascii_lowercase() || c == '-') => {
                let value = value.to_owned();
                match key {
                    "format" => disk.format = Some(value),
                    "vdev" => disk.vdev = Some(value),
                    "access" => disk.access = Some(value),
                    "devtype" if value == "disk" => {}
                    "devtype" if value == "cdrom" => disk.access = Some("ro".into()),
                    "devtype" | "backend" | "backendtype" | "script" | "specification" | "colo" => {
                        disk.others.push(part.to_owned());
                    }
                    _ => {
                        return Err(format!(
                            "`{key}=` is no key of a disk: target, format, vdev, access, devtype"
                        ));
                    }
                }
            }
            _ => match part {
                "cdrom" => disk.access = Some("ro".into()),
                "disk" if disk.vdev.is_some() => {}
                "discard" | "no-discard" | "direct-io-safe" => disk.others.push(part.to_owned()),
                _ if !has_target => {
                    disk.target = part.to_owned();
                    has_target = true;
                }
                _ if disk.format.is_none() && !old => disk.format = Some(part.to_owned()),
                _ if disk.vdev.is_none() => disk.vdev = Some(part.to_owned()),
                _ if disk.access.is_none() => disk.access = Some(part.to_owned()),
                _ => return Err(format!("`{part}`: too many words: TARGET, FORMAT, VDEV, ACCESS")),
            },
        }
    }
    if disk.target.is_empty() {
        return Err("a disk without a target: an empty drive cannot be had".into());
    }
    if disk.target.contains(',') {
        return Err(format!("`{}`: a path with a comma cannot be given on", disk.target));
    }
    if disk.format.as_deref() == Some("") {
        disk.format = None;
    }
    // `xvda:cdrom`
    if let Some((vdev, kind)) =
        disk.vdev.clone().and_then(|v| v.split_once(':').map(|(a, b)| (a.to_owned(), b.to_owned())))
    {
        if kind == "cdrom" {
            disk.access = Some("ro".into());
        }
        disk.vdev = Some(vdev);
    }
    Ok(disk)
}

/// A disk as the command line writes it.
fn disk_option(disk: &Disk) -> Result<String, String> {
    let mut words = disk.target.clone();
    match disk.access.as_deref() {
        None | Some("w" | "rw") => {}
        Some("r" | "ro") => words.push_str(",ro"),
        Some("w!") => {
            return Err(
                "access `w!` shares a disk that is written, which breaks it; copy the file".into(),
            );
        }
        Some(access) => return Err(format!("`{access}` is no access of a disk: r, ro, w, rw")),
    }
    if let Some(vdev) = &disk.vdev {
        words.push_str(&format!(",vdev={vdev}"));
    }
    match disk.format.as_deref() {
        None | Some("raw") => {}
        Some(format) => words.push_str(&format!(",format={format}")),
    }
    Ok(words)
}

impl Reader {
    pub(super) fn disks(&mut self) -> Result<(), Wrong> {
        let mut values = Vec::new();
        let mut first = None;
        for (text, line) in self.list("disk")? {
            let disk = disk(&text).map_err(|what| (line, format!("disk '{text}': {what}")))?;
            let option =
                disk_option(&disk).map_err(|what| (line, format!("disk '{text}': {what}")))?;
            for other in &disk.others {
                self.remark(line, format!("disk '{text}': `{other}` is not honoured"));
            }
            values.push(Value::Text(option));
            first.get_or_insert(line);
        }
        if let Some(line) = first {
            self.settings.push(Setting { name: "disk".into(), values, line });
        }
        Ok(())
    }

    /// Every card is on a network that needs no rights, unless its interface is named.
    pub(super) fn cards(&mut self) -> Result<(), Wrong> {
        let mut values = Vec::new();
        let mut first = None;
        for (text, line) in self.list("vif")? {
            let (mut kind, mut mac) = ("user".to_owned(), None);
            for word in text.split(',').map(str::trim).filter(|word| !word.is_empty()) {
                let wrong = || (line, format!("vif '{text}': `{word}` is not KEY=VALUE"));
                let (key, value) = word.split_once('=').ok_or_else(wrong)?;
                match key.trim() {
                    "mac" => mac = Some(value.trim().to_owned()),
                    "vifname" => kind = format!("tap:{}", value.trim()),
                    "type" if value == "ioemu" => {
                        return Err((
                            line,
                            format!("vif '{text}': type=ioemu contradicts a PV guest"),
                        ));
                    }
                    "type" => {}
                    "bridge" => {}
                    key @ ("script" | "ip" | "rate" | "model" | "backend" | "gatewaydev"
                    | "devid" | "mtu" | "trusted") => {
                        self.remark(line, format!("vif '{text}': `{key}` is not honoured"));
                    }
                    key => {
                        self.remark(
                            line,
                            format!("vif '{text}': `{key}` is no key of a vif, and is ignored"),
                        );
                    }
                }
            }
            if kind == "user" && text.contains("bridge=") {
                self.remark(line, format!(
                    "vif '{text}': on a network of its own instead of the bridge, which needs root; vifname=TAP names an interface that exists"
                ));
            }
            let mac = mac.map(|mac| format!(",mac={mac}")).unwrap_or_default();
            values.push(Value::Text(format!("{kind}{mac}")));
            first.get_or_insert(line);
        }
        if let Some(line) = first {
            self.settings.push(Setting { name: "net".into(), values, line });
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn disks_are_read_in_every_form() {
        for (text, option) in [
            ("/img,raw,xvda,rw", "/img,vdev=xvda"),
            ("/img,,hda,ro", "/img,ro,vdev=hda"),
            ("file:/img,xvda,w", "/img,vdev=xvda"),
            ("phy:/dev/vg/x,sda1,r", "/dev/vg/x,ro,vdev=sda1"),
            ("tap:aio:/img,xvda,w", "/img,vdev=xvda"),
            ("format=raw, vdev=xvdb, access=ro, target=/img", "/img,ro,vdev=xvdb"),
            ("/img,qcow2,xvdc", "/img,vdev=xvdc,format=qcow2"),
            ("vdev=xvdc,format=qcow2,target=/img", "/img,vdev=xvdc,format=qcow2"),
            ("/img,raw,hdc:cdrom,r", "/img,ro,vdev=hdc"),
            ("/cd.iso,devtype=cdrom,vdev=hdc", "/cd.iso,ro,vdev=hdc"),
            ("/img", "/img"),
        ] {
            let read = disk(text).and_then(|disk| disk_option(&disk));
            assert_eq!(read.as_deref(), Ok(option), "{text}");
        }
        for wrong in [
            "",
            "vdev=xvda",
            "/a,raw,xvda,x",
            "/a,raw,xvda,rw,more",
            "/a,colour=red",
            "/a,raw,xvda,w!",
            "target=/a,b",
        ] {
            assert!(disk(wrong).and_then(|disk| disk_option(&disk)).is_err(), "{wrong}");
        }
    }
}
