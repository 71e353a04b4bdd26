//! The shell on the console: keys in, lines run, until the machine ends.

use alloc::string::String;

use super::editor::{Editor, Event};
use super::{ConsoleOutput, Session, complete};
use crate::console;

/// The prompt.
const PROMPT: &str = "janus> ";

/// Reads and runs lines from the console for ever.
pub async fn run() -> ! {
    let mut output = ConsoleOutput;
    let mut session = Session::new(&mut output);
    let mut editor = Editor::new(PROMPT);
    let mut echo = String::new();
    editor.redraw(&mut echo);
    loop {
        session.write_bytes(echo.as_bytes());
        echo.clear();
        let mut keys = [0; 64];
        let len = console::read(&mut keys).await;
        for &key in keys.get(..len).unwrap_or_default() {
            match editor.key(key, &mut echo) {
                Event::None => {}
                Event::Line(line) => {
                    session.write_bytes(echo.as_bytes());
                    echo.clear();
                    session.run_line(&line).await;
                    editor.redraw(&mut echo);
                }
                Event::Interrupt => editor.redraw(&mut echo),
                Event::EndOfInput => {
                    echo.push_str("`poweroff` ends the machine\r\n");
                    editor.redraw(&mut echo);
                }
                Event::Complete(line) => editor.complete(&complete(&line).await, &mut echo),
            }
        }
    }
}
