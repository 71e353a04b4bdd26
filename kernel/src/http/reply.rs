//! What the server answers: heads, media types, error pages and directory listings.

use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;
use core::fmt::Write;

use crate::fs::volume::File;
use crate::fs::{DirEntry, NodeKind};

/// The contents of an answer.
#[derive(Debug)]
pub enum Body {
    /// Text made here.
    Text(String),
    /// `len` bytes of a file from `start` on.
    File {
        /// The file.
        file: File,
        /// First byte.
        start: u64,
        /// Bytes.
        len: u64,
    },
}

/// An answer.
#[derive(Debug)]
pub struct Reply {
    /// Status code.
    pub status: u16,
    /// `Content-Type`.
    pub media_type: &'static str,
    /// Further header fields.
    pub headers: Vec<(&'static str, String)>,
    /// The contents.
    pub body: Body,
}

const HTML: &str = "text/html; charset=utf-8";

impl Reply {
    /// An answer without further header fields.
    #[must_use]
    pub fn new(status: u16, media_type: &'static str, body: Body) -> Self {
        Self { status, media_type, headers: Vec::new(), body }
    }
    /// A short page that says what went wrong.
    #[must_use]
    pub fn error(status: u16) -> Self {
        let reason = super::reason(status);
        let page =
            format!("<!doctype html><title>{status} {reason}</title><h1>{status} {reason}</h1>\n");
        Self::new(status, HTML, Body::Text(page))
    }
    /// Adds a header field; the value has no line ends.
    #[must_use]
    pub fn with_header(mut self, name: &'static str, value: String) -> Self {
        self.headers.push((name, value));
        self
    }
    /// The head, with its empty line.
    #[must_use]
    pub fn head(&self, keep_alive: bool) -> String {
        let len = match &self.body {
            Body::Text(text) => text.len() as u64,
            Body::File { len, .. } => *len,
        };
        let reason = super::reason(self.status);
        let connection = if keep_alive { "keep-alive" } else { "close" };
        let mut head = format!(
            "HTTP/1.1 {} {reason}\r\nServer: janus\r\nContent-Type: {}\r\nContent-Length: {len}\r\n\
             Connection: {connection}\r\n",
            self.status, self.media_type
        );
        for (name, value) in &self.headers {
            // Writing to a String cannot fail.
            let _ = write!(head, "{name}: {value}\r\n");
        }
        head.push_str("\r\n");
        head
    }
}

/// The media type of a file, by its name's ending.
#[must_use]
pub fn media_type(path: &str) -> &'static str {
    let ending =
        path.rsplit('/').next().and_then(|name| name.rsplit_once('.')).map_or("", |(_, e)| e);
    const TYPES: &[(&str, &str)] = &[
        ("html", HTML),
        ("htm", HTML),
        ("css", "text/css; charset=utf-8"),
        ("js", "text/javascript; charset=utf-8"),
        ("mjs", "text/javascript; charset=utf-8"),
        ("txt", "text/plain; charset=utf-8"),
        ("md", "text/markdown; charset=utf-8"),
        ("csv", "text/csv; charset=utf-8"),
        ("xml", "application/xml"),
        ("json", "application/json"),
        ("pdf", "application/pdf"),
        ("wasm", "application/wasm"),
        ("gz", "application/gzip"),
        ("tar", "application/x-tar"),
        ("zip", "application/zip"),
        ("svg", "image/svg+xml"),
        ("png", "image/png"),
        ("jpg", "image/jpeg"),
        ("jpeg", "image/jpeg"),
        ("gif", "image/gif"),
        ("webp", "image/webp"),
        ("ico", "image/x-icon"),
        ("mp3", "audio/mpeg"),
        ("mp4", "video/mp4"),
        ("woff2", "font/woff2"),
    ];
    TYPES
        .iter()
        .find(|(known, _)| known.eq_ignore_ascii_case(ending))
        .map_or("application/octet-stream", |(_, media_type)| media_type)
}

/// A page that lists a directory; `path` ends in a slash.
#[must_use]
pub fn directory(path: &str, entries: &[DirEntry]) -> Reply {
    let title = html_escape(path);
    let mut page = format!(
        "<!doctype html><html><head><title>{title}</title></head><body><h1>{title}</h1><table>\n"
    );
    if path != "/" {
        page.push_str("<tr><td><a href=\"../\">../</a></td><td></td></tr>\n");
    }
    for entry in entries {
        let slash = if entry.metadata.kind == NodeKind::Directory { "/" } else { "" };
        let (link, name) = (percent_encode(&entry.name), html_escape(&entry.name));
        let size = match entry.metadata.kind {
            NodeKind::File => format!("{}", entry.metadata.size),
            _ => String::new(),
        };
        // Writing to a String cannot fail. `./` keeps a name with a colon from being read as a scheme.
        let _ = writeln!(
            page,
            "<tr><td><a href=\"./{link}{slash}\">{name}{slash}</a></td><td>{size}</td></tr>"
        );
    }
    page.push_str("</table></body></html>\n");
    Reply::new(200, HTML, Body::Text(page))
}

/// Text as it may stand in HTML, quoted attributes included.
fn html_escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            '\'' => escaped.push_str("&#39;"),
            c => escaped.push(c),
        }
    }
    escaped
}

/// A path as it may stand in a link or a `Location` (RFC 3986, 2.3).
#[must_use]
pub fn percent_encode(path: &str) -> String {
    let mut encoded = String::with_capacity(path.len());
    for byte in path.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~/".contains(&byte) {
            encoded.push(char::from(byte));
        } else {
            // Writing to a String cannot fail.
            let _ = write!(encoded, "%{byte:02X}");
        }
    }
    encoded
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fs::Metadata;

    #[test]
    fn names_cannot_break_out_of_a_listing() {
        let name = String::from("\"><script>&'\r\nX: y");
        let metadata = Metadata { kind: NodeKind::File, size: 5 };
        let reply = directory("/<x>/", &[DirEntry { name, metadata }]);
        let Body::Text(page) = &reply.body else { panic!("a page") };
        assert!(!page.contains("<script>") && !page.contains("<x>"), "{page}");
        assert!(page.contains("%0D%0AX%3A%20y"), "{page}");
    }

    #[test]
    fn the_head_states_length_type_and_connection() {
        let head = Reply::error(404).head(true);
        assert!(head.starts_with("HTTP/1.1 404 Not Found\r\n"), "{head}");
        let page = "<!doctype html><title>404 Not Found</title><h1>404 Not Found</h1>\n";
        assert!(head.contains(&format!("Content-Length: {}\r\n", page.len())), "{head}");
        assert!(
            head.contains("Connection: keep-alive\r\n") && head.ends_with("\r\n\r\n"),
            "{head}"
        );
    }

    #[test]
    fn media_types_go_by_the_ending_of_the_last_name() {
        assert_eq!(media_type("/a.b/INDEX.HTML"), HTML);
        assert_eq!(media_type("/a.html/b"), "application/octet-stream");
        assert_eq!(media_type("/x.tar.gz"), "application/gzip");
    }
}
