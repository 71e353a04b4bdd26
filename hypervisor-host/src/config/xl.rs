//! The configurations of `xl create` (xl.cfg(5), xl-disk-configuration(5), xl-network-configuration(5)), as far as a PV
//! guest of ours can have what they say.
//!
//! What cannot be honoured is a remark, a line each. What contradicts itself, or asks for another kind of guest, is an
//! error.

mod devices;
mod syntax;

use self::syntax::{Assignment, Item};
use super::{Setting, Value, Wrong, nearest};

/// Keys that are understood.
const KNOWN: [&str; 24] = [
    "name",
    "kernel",
    "ramdisk",
    "extra",
    "cmdline",
    "root",
    "memory",
    "maxmem",
    "vcpus",
    "maxvcpus",
    "disk",
    "vif",
    "on_poweroff",
    "on_reboot",
    "on_crash",
    "on_watchdog",
    "on_soft_reset",
    "type",
    "builder",
    "uuid",
    "bootloader",
    "bootloader_args",
    "nomigrate",
    "pci",
];
/// Keys of xl.cfg(5) whose absence changes nothing that a guest could see here: told of, and left alone.
const IGNORED: [&str; 68] = [
    "pool",
    "cpus",
    "cpus_soft",
    "cpu_weight",
    "cap",
    "vnuma",
    "vfb",
    "vtpm",
    "vkb",
    "p9",
    "pvcalls",
    "usbctrl",
    "usbdev",
    "channel",
    "rdm",
    "rdm_mem_boundary",
    "dtdev",
    "ioports",
    "iomem",
    "irqs",
    "max_event_channels",
    "max_grant_frames",
    "max_maptrack_frames",
    "max_grant_version",
    "seclabel",
    "init_seclabel",
    "device_tree",
    "claim_mode",
    "driver_domain",
    "gnttab_frames",
    "localtime",
    "rtc_timeoffset",
    "vuart",
    "vnc",
    "vnclisten",
    "vncdisplay",
    "vncunused",
    "vncpasswd",
    "sdl",
    "opengl",
    "serial",
    "boot",
    "hap",
    "pae",
    "acpi",
    "apic",
    "nx",
    "hpet",
    "viridian",
    "tsc_mode",
    "timer_mode",
    "xen_platform_pci",
    "device_model_version",
    "device_model_override",
    "device_model_args",
    "stdvga",
    "vga",
    "videoram",
    "usb",
    "usbdevice",
    "soundhw",
    "shadow_memory",
    "e820_host",
    "scsi",
    "cpuid",
    "nestedhvm",
    "keymap",
    "spice",
];

fn known() -> impl Iterator<Item = &'static str> {
    KNOWN.into_iter().chain(IGNORED)
}

/// What a file says, by key, and what comes of it.
struct Reader {
    assignments: Vec<Assignment>,
    settings: Vec<Setting>,
    remarks: Vec<(usize, String)>,
}

/// The options that a text sets, and what of it is not honoured.
pub(super) fn read(text: &str) -> Result<(Vec<Setting>, Vec<Wrong>), Wrong> {
    let assignments = syntax::parse(text)?;
    let mut reader = Reader { assignments, settings: Vec::new(), remarks: Vec::new() };
    reader.kind()?;
    reader.boot()?;
    reader.size()?;
    reader.ends()?;
    reader.text_option("name", "name")?;
    reader.text_option("uuid", "uuid")?;
    reader.disks()?;
    reader.cards()?;
    reader.others();
    reader.settings.sort_by_key(|setting| setting.line);
    reader.remarks.sort();
    Ok((reader.settings, reader.remarks))
}

impl Reader {
    fn find(&self, key: &str) -> Option<&Assignment> {
        self.assignments.iter().find(|assignment| assignment.key == key)
    }

    /// A key's text and line; numbers are texts as well.
    fn text(&self, key: &str) -> Result<Option<(String, usize)>, Wrong> {
        let Some(found) = self.find(key) else { return Ok(None) };
        match &found.value {
            Item::Text(text) => Ok(Some((text.clone(), found.line))),
            Item::Number(number) => Ok(Some((number.to_string(), found.line))),
            Item::List(_) => Err((found.line, format!("`{key}` is one value, not a list"))),
        }
    }

    fn number(&self, key: &str) -> Result<Option<(u64, usize)>, Wrong> {
        let Some((text, line)) = self.text(key)? else { return Ok(None) };
        match text.trim().parse() {
            Ok(number) => Ok(Some((number, line))),
            Err(_) => Err((line, format!("`{key}` is a number, not `{text}`"))),
        }
    }

    /// The texts of a list; one text is a list of one.
    fn list(&self, key: &str) -> Result<Vec<(String, usize)>, Wrong> {
        let Some(found) = self.find(key) else { return Ok(Vec::new()) };
        let items = match &found.value {
            Item::List(items) => items.clone(),
            single => vec![(single.clone(), found.line)],
        };
        let text = |(item, line)| match item {
            Item::Text(text) => Ok((text, line)),
            _ => Err((line, format!("`{key}` is a list of texts, such as [ 'a', 'b' ]"))),
        };
        items.into_iter().map(text).collect()
    }

    fn set(&mut self, name: &str, value: impl Into<String>, line: usize) {
        self.settings.push(Setting {
            name: name.into(),
            values: vec![Value::Text(value.into())],
            line,
        });
    }

    fn remark(&mut self, line: usize, text: impl Into<String>) {
        self.remarks.push((line, text.into()));
    }

    fn text_option(&mut self, key: &str, option: &str) -> Result<(), Wrong> {
        if let Some((value, line)) = self.text(key)? {
            self.set(option, value, line);
        }
        Ok(())
    }

    /// `type` and `builder`: PV or nothing.
    fn kind(&mut self) -> Result<(), Wrong> {
        let (kind, builder) = (self.text("type")?, self.text("builder")?);
        let only = "janus runs PV guests here (type=\"pv\")";
        if let Some((kind, line)) = &kind {
            match kind.as_str() {
                "pv" => {}
                "hvm" | "pvh" => {
                    return Err((
                        *line,
                        format!("type=\"{kind}\" asks for another kind of guest: {only}"),
                    ));
                }
                _ => return Err((*line, format!("type=\"{kind}\" is no kind of guest: {only}"))),
            }
        }
        if let Some((builder, line)) = builder {
            match builder.as_str() {
                "generic" | "linux" => {}
                "hvm" if kind.is_some() => {
                    return Err((
                        line,
                        "builder=\"hvm\" contradicts type=\"pv\": leave one out".into(),
                    ));
                }
                _ => {
                    return Err((
                        line,
                        format!("builder=\"{builder}\" asks for another kind of guest: {only}"),
                    ));
                }
            }
        }
        Ok(())
    }

    /// The kernel, its RAM disk and its command line.
    fn boot(&mut self) -> Result<(), Wrong> {
        match (self.text("kernel")?, self.text("bootloader")?) {
            (Some((kernel, line)), loader) => {
                self.set("image", kernel, line);
                if let Some((_, line)) = loader {
                    return Err((line, "`bootloader` contradicts `kernel`: leave one out".into()));
                }
            }
            (None, Some((loader, line))) => {
                return Err((
                    line,
                    format!(
                        "bootloader=\"{loader}\" cannot be run here: copy the kernel out of the disk and name it with kernel="
                    ),
                ));
            }
            (None, None) => {}
        }
        self.text_option("ramdisk", "initrd")?;
        let (line_of, root, extra) =
            (self.text("cmdline")?, self.text("root")?, self.text("extra")?);
        let (words, line) = match (line_of, root, extra) {
            (Some((words, line)), root, extra) => {
                for (key, (_, line)) in [("root", root), ("extra", extra)]
                    .into_iter()
                    .filter_map(|(k, v)| Some((k, v?)))
                {
                    self.remark(line, format!("`{key}` is not used: `cmdline` comes in its place"));
                }
                (words, line)
            }
            (None, Some((root, line)), extra) => {
                let extra = extra.map(|(extra, _)| extra).unwrap_or_default();
                (format!("root={root} {extra}").trim_end().to_owned(), line)
            }
            (None, None, Some(extra)) => extra,
            (None, None, None) => return Ok(()),
        };
        self.set("append", words, line);
        Ok(())
    }

    /// Memory and CPUs.
    fn size(&mut self) -> Result<(), Wrong> {
        for (now, most, option, option_most, unit) in [
            ("memory", "maxmem", "memory", "max-memory", "M"),
            ("vcpus", "maxvcpus", "cpus", "", ""),
        ] {
            let (now_at, most_at) = (self.number(now)?, self.number(most)?);
            if let (Some((value, _)), Some((limit, line))) = (now_at, most_at)
                && limit < value
            {
                return Err((
                    line,
                    format!("{most}={limit} contradicts {now}={value}: it is less"),
                ));
            }
            if let Some((value, line)) = now_at.or(most_at) {
                self.set(option, format!("{value}{unit}"), line);
            }
            if let (Some((value, _)), Some((limit, line))) = (now_at, most_at)
                && limit > value
            {
                if option_most.is_empty() {
                    self.remark(
                        line,
                        format!(
                            "`{most}` is not honoured: CPUs are not added later; there are {value}"
                        ),
                    );
                } else {
                    self.set(option_most, format!("{limit}{unit}"), line);
                }
            }
        }
        Ok(())
    }

    /// What follows an end.
    fn ends(&mut self) -> Result<(), Wrong> {
        for (key, option) in
            [("on_poweroff", "on-poweroff"), ("on_reboot", "on-reboot"), ("on_crash", "on-crash")]
        {
            let Some((action, line)) = self.text(key)? else { continue };
            let ours = match action.as_str() {
                "destroy" | "restart" | "preserve" => action.as_str(),
                "rename-restart" => {
                    self.remark(
                        line,
                        format!(
                            "{key}=\"rename-restart\": it restarts, and the old one is not kept"
                        ),
                    );
                    "restart"
                }
                "coredump-destroy" | "coredump-restart" => {
                    self.remark(line, format!("{key}=\"{action}\": no core is written; --crash-report FILE writes a report"));
                    action.strip_prefix("coredump-").unwrap_or("destroy")
                }
                _ => {
                    return Err((
                        line,
                        format!(
                            "{key}=\"{action}\" is none of destroy, restart, rename-restart, preserve, coredump-destroy, coredump-restart"
                        ),
                    ));
                }
            };
            self.set(option, ours, line);
        }
        for key in ["on_watchdog", "on_soft_reset"] {
            if let Some((action, line)) = self.text(key)? {
                self.remark(
                    line,
                    format!("{key}=\"{action}\" is not honoured: a watchdog's end is a crash"),
                );
            }
        }
        Ok(())
    }

    /// The other keys: each a line, unless it is switched off.
    fn others(&mut self) {
        let mut remarks = Vec::new();
        for assignment in &self.assignments {
            let Assignment { key, value, line } = assignment;
            let off = match value {
                Item::Number(number) => *number == 0,
                Item::Text(text) => text.is_empty(),
                Item::List(list) => list.is_empty(),
            };
            if off && known().any(|known| known == key) {
                continue;
            }
            if key == "pci" {
                remarks.push((
                    *line,
                    "`pci` is not honoured: a process has no devices to pass on".into(),
                ));
            } else if IGNORED.contains(&key.as_str()) {
                remarks.push((*line, format!("`{key}` is not honoured")));
            } else if !KNOWN.contains(&key.as_str()) {
                let meant = nearest(key, known());
                let meant =
                    meant.map(|meant| format!("; was `{meant}` meant?")).unwrap_or_default();
                remarks.push((
                    *line,
                    format!("`{key}` is no key of xl.cfg, and is ignored as xl does{meant}"),
                ));
            }
        }
        self.remarks.append(&mut remarks);
    }
}

#[cfg(test)]
mod tests;
