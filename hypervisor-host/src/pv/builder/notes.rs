//! What a kernel asks of Xen: ELF notes (`xen/include/public/elfnote.h`), or the text of old.

use janus_proto::abi::xen::elfnote::ElfNote;

use super::error::Cause;

/// The owner of Xen's notes.
const OWNER: &[u8] = b"Xen\0";
/// Features by number (`xen/include/public/features.h`, `XENFEAT_*`), as notes name them.
const NAMES: [&str; 6] = [
    "writable_page_tables",
    "writable_descriptor_tables",
    "auto_translated_physmap",
    "supervisor_mode_kernel",
    "pae_pgdir_above_4gb",
    "mmu_pt_update_preserve_ad",
];
/// Of them, those that a 64-bit PV domain has: writes to page tables (they are emulated), and the last two.
const AVAILABLE: u64 = 1 << 0 | 1 << 4 | 1 << 5;

/// Features by number (`XENFEAT_*`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Features {
    /// Those that the kernel can use.
    pub supported: u64,
    /// Those that it needs.
    pub required: u64,
}

/// What the notes say.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Notes {
    /// `ENTRY`; without it the file's entry point.
    pub entry: Option<u64>,
    /// `HYPERCALL_PAGE`, a virtual address.
    pub hypercall_page: Option<u64>,
    /// `VIRT_BASE`: virtual address of the guest's frame 0.
    pub virt_base: u64,
    /// `PADDR_OFFSET`: what the file's physical addresses are too large by.
    pub paddr_offset: u64,
    /// `INIT_P2M`: where the list of frames is wanted.
    pub p2m_base: Option<u64>,
    /// `MOD_START_PFN`: the module need not be mapped.
    pub module_unmapped: bool,
    /// `SUSPEND_CANCEL`: a suspend may be given up.
    pub suspend_cancel: bool,
    /// `FEATURES` and `SUPPORTED_FEATURES`.
    pub features: Features,
    /// Some note, or text, is for a PV start.
    is_pv: bool,
    /// `PHYS32_ENTRY` is there.
    is_pvh: bool,
}

impl Notes {
    /// Refuses what cannot be done.
    pub(super) fn checked(self) -> Result<Self, Cause> {
        if !self.is_pv {
            return Err(if self.is_pvh { Cause::OnlyPvh } else { Cause::NoNotes });
        }
        let missing = self.features.required & !AVAILABLE;
        if missing != 0 {
            let name = NAMES.get(missing.trailing_zeros() as usize).copied();
            return Err(Cause::Unsupported(name.unwrap_or("an unknown feature")));
        }
        Ok(self)
    }

    fn add(&mut self, kind: ElfNote, value: &[u8]) -> Result<(), Cause> {
        match kind {
            ElfNote::ENTRY => {
                self.entry = Some(number(value, "ENTRY")?);
                self.is_pv = true;
            }
            ElfNote::HYPERCALL_PAGE => {
                self.hypercall_page = Some(number(value, "HYPERCALL_PAGE")?);
                self.is_pv = true;
            }
            ElfNote::VIRT_BASE => {
                self.virt_base = base(number(value, "VIRT_BASE")?)?;
                self.is_pv = true;
            }
            ElfNote::PADDR_OFFSET => self.paddr_offset = number(value, "PADDR_OFFSET")?,
            ElfNote::INIT_P2M => self.p2m_base = Some(number(value, "INIT_P2M")?),
            ElfNote::MOD_START_PFN => self.module_unmapped = number(value, "MOD_START_PFN")? != 0,
            ElfNote::SUSPEND_CANCEL => {
                self.suspend_cancel = number(value, "SUSPEND_CANCEL")? != 0;
            }
            ElfNote::SUPPORTED_FEATURES => {
                self.features.supported |= number(value, "SUPPORTED_FEATURES")?;
            }
            ElfNote::FEATURES => self.add_features(text(value, "FEATURES")?)?,
            ElfNote::XEN_VERSION => {
                if text(value, "XEN_VERSION")? != "xen-3.0" {
                    return Err(Cause::Note("XEN_VERSION"));
                }
                self.is_pv = true;
            }
            ElfNote::LOADER => check_loader(text(value, "LOADER")?)?,
            ElfNote::PHYS32_ENTRY => self.is_pvh = true,
            _ => {}
        }
        Ok(())
    }

    /// Names with `|` between them; `!` before those that are needed.
    fn add_features(&mut self, list: &str) -> Result<(), Cause> {
        for name in list.split(['|', ' ']).filter(|name| !name.is_empty()) {
            let required = name.strip_prefix('!');
            match NAMES.iter().position(|known| *known == required.unwrap_or(name)) {
                Some(number) => {
                    self.features.supported |= 1 << number;
                    self.features.required |= u64::from(required.is_some()) << number;
                }
                None if required.is_some() => {
                    return Err(Cause::Unsupported("an unknown feature"));
                }
                None => {}
            }
        }
        Ok(())
    }
}

fn base(address: u64) -> Result<u64, Cause> {
    if address.is_multiple_of(4096) { Ok(address) } else { Err(Cause::Note("VIRT_BASE")) }
}

fn check_loader(name: &str) -> Result<(), Cause> {
    if name == "generic" { Ok(()) } else { Err(Cause::Unsupported("a loader that is not generic")) }
}

/// A number of 4 or 8 bytes.
fn number(value: &[u8], name: &'static str) -> Result<u64, Cause> {
    if let Ok(bytes) = value.try_into() {
        return Ok(u64::from_le_bytes(bytes));
    }
    let short = value.try_into().map(|bytes| u64::from(u32::from_le_bytes(bytes)));
    short.map_err(|_| Cause::Note(name))
}

/// Text up to its zero byte.
fn text<'a>(value: &'a [u8], name: &'static str) -> Result<&'a str, Cause> {
    let text = value.split(|byte| *byte == 0).next().unwrap_or_default();
    std::str::from_utf8(text).map_err(|_| Cause::Note(name))
}

/// Reads notes; `None`: none of them is Xen's.
pub(super) fn parse(data: &[u8], alignment: u64) -> Result<Option<Notes>, Cause> {
    const HEADER: usize = 12;
    let alignment = if alignment == 8 { 8 } else { 4 };
    let aligned = |end: usize| end.checked_next_multiple_of(alignment);
    let mut notes = None;
    let mut at = 0usize;
    // The tail may be padding.
    while let Some(header) = data.get(at..at.saturating_add(HEADER)) {
        let word = |at: usize| {
            let bytes = header.get(at..at + 4).and_then(|bytes| bytes.try_into().ok());
            bytes.map_or(0, u32::from_le_bytes)
        };
        let (name_size, value_size) = (word(0) as usize, word(4) as usize);
        let name_end = at + HEADER + name_size;
        let name = data.get(at + HEADER..name_end).ok_or(Cause::Truncated("a note's name"))?;
        let value_at = aligned(name_end).ok_or(Cause::Truncated("a note's value"))?;
        let value = value_at.checked_add(value_size).and_then(|end| data.get(value_at..end));
        let value = value.ok_or(Cause::Truncated("a note's value"))?;
        if name == OWNER {
            notes.get_or_insert_with(Notes::default).add(ElfNote(word(8)), value)?;
        }
        at = aligned(value_at + value_size).unwrap_or(usize::MAX);
    }
    Ok(notes)
}

/// Reads the text of the section `__xen_guest`: `NAME=VALUE` with commas between.
pub(super) fn parse_legacy(data: &[u8]) -> Result<Notes, Cause> {
    let list = text(data, "__xen_guest")?;
    let mut notes = Notes { is_pv: true, ..Notes::default() };
    let mut offset_given = false;
    let mut hypercall_frame = None;
    for item in list.split(',').filter(|item| !item.is_empty()) {
        let (name, value) = item.split_once('=').unwrap_or((item, ""));
        match name {
            "LOADER" => check_loader(value)?,
            "XEN_VER" if value != "xen-3.0" => return Err(Cause::Note("XEN_VER")),
            "VIRT_BASE" => notes.virt_base = base(legacy_number(value, "VIRT_BASE")?)?,
            "VIRT_ENTRY" => notes.entry = Some(legacy_number(value, "VIRT_ENTRY")?),
            "ELF_PADDR_OFFSET" => {
                notes.paddr_offset = legacy_number(value, "ELF_PADDR_OFFSET")?;
                offset_given = true;
            }
            "HYPERCALL_PAGE" => {
                hypercall_frame = Some(legacy_number(value, "HYPERCALL_PAGE")?);
            }
            "FEATURES" => notes.add_features(value)?,
            _ => {}
        }
    }
    if !offset_given {
        // As old versions of Xen had it: physical addresses in the file are virtual ones.
        notes.paddr_offset = notes.virt_base;
    }
    if let Some(frame) = hypercall_frame {
        // A frame number here, not an address.
        let address = frame.checked_mul(4096).and_then(|at| at.checked_add(notes.virt_base));
        notes.hypercall_page = Some(address.ok_or(Cause::Note("HYPERCALL_PAGE"))?);
    }
    Ok(notes)
}

/// A number as C writes it.
fn legacy_number(value: &str, name: &'static str) -> Result<u64, Cause> {
    let value = value.trim();
    let parsed = match value.strip_prefix("0x").or_else(|| value.strip_prefix("0X")) {
        Some(hex) => u64::from_str_radix(hex, 16),
        None => value.parse(),
    };
    parsed.map_err(|_| Cause::Note(name))
}
