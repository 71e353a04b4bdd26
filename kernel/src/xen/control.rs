//! What the toolstack asks of the running guest: `control/shutdown` (`xen/docs/misc/xenstore-paths`).
//!
//! The toolstack writes a word; the guest acknowledges by writing the node empty, and obeys.

use alloc::sync::Arc;

use super::xenstore::{XenStore, XenStoreError};
use crate::power::{self, Request};
use crate::task;

const SHUTDOWN: &str = "control/shutdown";
/// What this guest says it can do. Suspend needs every frontend to reconnect, and is not among them.
const FEATURES: [&str; 2] = ["control/feature-poweroff", "control/feature-reboot"];

/// What a word asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Wish {
    /// An orderly end.
    End(Request),
    /// Something this guest does not do.
    Refused,
}

fn wish(word: &[u8]) -> Wish {
    match word {
        b"poweroff" | b"halt" => Wish::End(Request::PowerOff),
        b"reboot" => Wish::End(Request::Reboot),
        _ => Wish::Refused,
    }
}

/// Starts listening.
pub(crate) fn start(store: Arc<XenStore>) {
    drop(task::spawn("shutdown requests", async move {
        if let Err(error) = listen(&store).await {
            log::warn!("requests to shut down are not heard: {error}");
        }
    }));
}

async fn listen(store: &Arc<XenStore>) -> Result<(), XenStoreError> {
    for feature in FEATURES {
        // Toolstacks that know these nodes let the guest write them; the others do not ask.
        if let Err(error) = store.write(feature, b"1").await {
            log::debug!("{feature}: {error}");
        }
    }
    let mut watch = store.watch(SHUTDOWN).await?;
    loop {
        // The watch fires once at the start, so a word that was there before is seen too.
        watch.changed().await?;
        let Some(word) = store.read_if_there(SHUTDOWN).await? else { continue };
        if word.is_empty() {
            continue;
        }
        if let Err(error) = store.write(SHUTDOWN, b"").await {
            log::warn!("{SHUTDOWN} cannot be acknowledged: {error}");
        }
        match wish(&word) {
            Wish::End(request) => {
                log::info!("the toolstack asks for {}", word.escape_ascii());
                power::request(request);
            }
            Wish::Refused => {
                log::warn!(
                    "the toolstack asks for {}, which this guest cannot do",
                    word.escape_ascii()
                );
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_an_orderly_end_is_obeyed() {
        let table: [(&[u8], Wish); 6] = [
            (b"poweroff", Wish::End(Request::PowerOff)),
            (b"halt", Wish::End(Request::PowerOff)),
            (b"reboot", Wish::End(Request::Reboot)),
            (b"suspend", Wish::Refused),
            (b"poweroff\0", Wish::Refused),
            (b"\xff\xfe", Wish::Refused),
        ];
        for (word, expected) in table {
            assert_eq!(wish(word), expected, "{}", word.escape_ascii());
        }
    }
}
