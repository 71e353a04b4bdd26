//! `janus doctor`: what each loader will do with a kernel.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;
use comfy_table::{ContentArrangement, Table, presets::UTF8_HORIZONTAL_ONLY};
use serde_json::{Value, json};

use crate::doctor::{Image, Prediction, Verdict, predict};

/// What no kernel's file is larger than.
const LARGEST: u64 = 4 << 30;

/// Says what each loader will do with a kernel (ELF file or bzImage), why, and what to change.
#[derive(Clone, Debug, Args)]
pub(super) struct DoctorArguments {
    /// The kernel's file.
    image: PathBuf,
    /// Prints JSON instead of the table.
    #[arg(long)]
    json: bool,
}

pub(super) fn run(arguments: &DoctorArguments) -> ExitCode {
    let file = &arguments.image;
    let size = std::fs::metadata(file).map(|metadata| metadata.len());
    let read = match size {
        Ok(size) if size > LARGEST => Err(format!("{size} bytes are too many for a kernel")),
        Ok(_) => std::fs::read(file).map_err(|error| error.to_string()),
        Err(error) => Err(error.to_string()),
    };
    let bytes = match read {
        Ok(bytes) => bytes,
        Err(error) => {
            eprintln!("janus: {}: {error}", file.display());
            return ExitCode::from(2);
        }
    };
    let image = Image::read(&bytes);
    let predictions = predict(&image, &bytes);
    if arguments.json {
        println!("{:#}", as_json(&image, &predictions));
    } else {
        println!("{}: {}\n{}", file.display(), describe(&image), table(&predictions));
    }
    ExitCode::SUCCESS
}

/// The headers that were found, in a line.
fn describe(image: &Image) -> String {
    let mut found = Vec::new();
    if let Some(elf) = &image.elf {
        found.push(format!("ELF, {} bits", elf.bits));
    }
    if let Some(linux) = image.linux {
        found.push(format!(
            "Linux boot protocol {}.{:02}",
            linux.version >> 8,
            linux.version & 0xff
        ));
    }
    if let Some(elf) = image.innermost_elf() {
        let notes: Vec<String> =
            elf.xen_notes().iter().map(|note| format!("{:?}", note.kind)).collect();
        if !notes.is_empty() {
            found.push(format!("{} Xen notes", notes.len()));
        }
    }
    match image.multiboot {
        Some(multiboot) if multiboot.addresses.is_some() => {
            found.push("multiboot 1 with addresses".to_owned());
        }
        Some(_) => found.push("multiboot 1".to_owned()),
        None => {}
    }
    if image.multiboot2.is_some() {
        found.push("multiboot 2".to_owned());
    }
    if found.is_empty() {
        return "no header that a loader knows".to_owned();
    }
    found.join("; ")
}

fn table(predictions: &[Prediction]) -> Table {
    /// Columns where the output is no terminal.
    const COLUMNS: u16 = 160;
    let columns = rustix::termios::tcgetwinsize(std::io::stdout()).map_or(0, |size| size.ws_col);
    let mut table = Table::new();
    table
        .load_style(UTF8_HORIZONTAL_ONLY)
        .set_content_arrangement(ContentArrangement::Dynamic)
        .set_width(if columns == 0 { COLUMNS } else { columns.max(80) })
        .set_header(["loader", "boots?", "how, or why not", "to change", "the rule"]);
    for prediction in predictions {
        table.add_row([
            prediction.loader,
            &prediction.verdict.to_string(),
            &prediction.why,
            prediction.fix,
            prediction.rule,
        ]);
    }
    table
}

/// Schema `janus-doctor`, version 1.
fn as_json(image: &Image, predictions: &[Prediction]) -> Value {
    let verdict = |verdict: Verdict| verdict.to_string();
    let predictions: Vec<Value> = predictions
        .iter()
        .map(|prediction| {
            json!({
                "loader": prediction.loader,
                "boots": verdict(prediction.verdict),
                "why": prediction.why,
                "fix": prediction.fix,
                "rule": prediction.rule,
            })
        })
        .collect();
    json!({
        "schema": "janus-doctor/1",
        "headers": describe(image),
        "predictions": predictions,
    })
}
