//! Client against server, both against nonsense, and lists against a daemon that cuts them.
#![expect(clippy::cast_possible_truncation, reason = "test values are small")]

use proptest::prelude::*;

use super::*;
use crate::addr::DomId;

fn path_strategy() -> impl Strategy<Value = String> {
    "(/[a-zA-Z0-9_@-]{1,12}){1,6}"
}

fn permission() -> impl Strategy<Value = Permission> {
    (0..4u8, any::<u16>()).prop_map(|(access, domain)| Permission {
        access: [Access::None, Access::Read, Access::Write, Access::Both][access as usize],
        domain: DomId(domain),
    })
}

/// Any request, built into owned parts and given to `check`.
fn any_request() -> impl Strategy<Value = (u8, String, Vec<u8>, Vec<Permission>, u32)> {
    (
        0..14u8,
        path_strategy(),
        prop::collection::vec(any::<u8>(), 0..300),
        prop::collection::vec(permission(), 1..6),
        any::<u32>(),
    )
}

fn build<'a>(
    (which, path, value, permissions, number): &'a (u8, String, Vec<u8>, Vec<Permission>, u32),
) -> Request<'a> {
    match which {
        0 => Request::Directory(path),
        1 => Request::DirectoryPart { path, offset: *number },
        2 => Request::Read(path),
        3 => Request::GetPermissions(path),
        4 => Request::Watch { path, token: "token with spaces" },
        5 => Request::Unwatch { path: "@releaseDomain", token: "" },
        6 => Request::TransactionStart,
        7 => Request::Commit,
        8 => Request::Abandon,
        9 => Request::GetDomainPath(DomId(*number as u16)),
        10 => Request::Write { path, value },
        11 => Request::MakeDirectory(path),
        12 => Request::Remove(path),
        _ => Request::SetPermissions { path, permissions: permissions.clone() },
    }
}

proptest! {
    #[test]
    fn every_request_survives_the_wire(parts in any_request()) {
        let request = build(&parts);
        let payload = request.payload();
        prop_assert_eq!(Request::parse(request.kind(), &payload), Ok(request));
    }

    #[test]
    fn parsing_any_bytes_never_panics(kind in 0..30u32, payload in prop::collection::vec(any::<u8>(), 0..200)) {
        let kind = MessageType(kind);
        if let Ok(request) = Request::parse(kind, &payload) {
            // What was understood means the same when written again.
            let again = request.payload();
            prop_assert_eq!(Request::parse(request.kind(), &again), Ok(request.clone()));
        }
        let _ = parse_strings(&payload);
        let _ = parse_permissions(&payload);
        let _ = parse_transaction_id(&payload);
    }

    #[test]
    fn decoder_does_not_care_how_bytes_arrive(
        payloads in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..100), 1..8),
        cuts in prop::collection::vec(1..40usize, 1..80),
    ) {
        let messages: Vec<Message> = payloads.iter().enumerate().map(|(i, payload)| Message {
            kind: MessageType(i as u32 * 7),
            request_id: i as u32,
            transaction: TransactionId(i as u32),
            payload: payload.clone(),
        }).collect();
        let mut bytes = Vec::new();
        for message in &messages {
            message.encode(&mut bytes).unwrap();
        }
        let mut decoder = Decoder::default();
        let mut seen = Vec::new();
        let mut rest = &bytes[..];
        for cut in cuts.iter().cycle() {
            let (now, later) = rest.split_at(rest.len().min(*cut));
            decoder.push(now);
            while let Some(message) = decoder.take().unwrap() {
                seen.push(message);
            }
            rest = later;
            if rest.is_empty() {
                break;
            }
        }
        prop_assert_eq!(seen, messages);
    }

    #[test]
    fn client_survives_any_daemon(chunks in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..60), 0..20)) {
        let mut client = Client::default();
        client.request(TransactionId::NONE, &Request::Read("/a")).unwrap();
        for chunk in &chunks {
            client.received(chunk);
            while let Ok(Some(_)) = client.event() {}
        }
    }

    #[test]
    fn client_survives_plausible_lies(
        lies in prop::collection::vec((0..24u32, 0..4u32, prop::collection::vec(prop::sample::select(vec![0u8, b'1', b'/', b'a']), 0..12)), 0..12),
    ) {
        let mut client = Client::default();
        client.request(TransactionId::NONE, &Request::Read("/a")).unwrap();
        client.watch("/b").unwrap();
        let mut broken = false;
        for (kind, request_id, payload) in lies {
            let mut bytes = Vec::new();
            let transaction = TransactionId::NONE;
            Message { kind: MessageType(kind), request_id, transaction, payload }.encode(&mut bytes).unwrap();
            client.received(&bytes);
            loop {
                match client.event() {
                    Ok(Some(_)) => prop_assert!(!broken, "an event after an error"),
                    Ok(None) => { prop_assert!(!broken); break }
                    Err(_) => { broken = true; break }
                }
            }
        }
        prop_assert_eq!(client.request(TransactionId::NONE, &Request::Read("/a")).is_err(), broken);
    }

    #[test]
    fn long_lists_arrive_whole(names in prop::collection::vec("[a-z]{1,200}", 0..120), changes in prop::collection::vec(any::<bool>(), 0..4)) {
        let mut daemon = CuttingDaemon { names, generation: 7, changes };
        let mut listing = Listing::new("/x");
        let mut asked = 0;
        let list = loop {
            asked += 1;
            prop_assert!(asked < 200);
            let answer = daemon.answer(&listing.request());
            match listing.reply(answer.as_ref().map(|a| &a[..]).map_err(|&e| e)) {
                Ok(ListStep::Again) => {}
                Ok(ListStep::Done(list)) => break list,
                Err(error) => return Err(TestCaseError::fail(format!("{error}"))),
            }
        };
        prop_assert_eq!(list, daemon.names);
    }

    #[test]
    fn listing_ends_whatever_the_daemon_answers(answers in prop::collection::vec(prop::collection::vec(prop::sample::select(vec![0u8, b'1', b'2', b'a']), 0..10), 400)) {
        let mut listing = Listing::new("/x");
        prop_assert_eq!(listing.reply(Err(StoreError::TooBig)), Ok(ListStep::Again));
        for answer in &answers {
            match listing.reply(Ok(answer)) {
                Ok(ListStep::Again) => {}
                Ok(ListStep::Done(_)) | Err(_) => return Ok(()),
            }
        }
    }
}

/// Answers `DIRECTORY` and `DIRECTORY_PART` as the C daemon does (`send_directory_part`).
struct CuttingDaemon {
    names: Vec<String>,
    generation: u64,
    /// For each part, whether the node changes just before it.
    changes: Vec<bool>,
}

impl CuttingDaemon {
    fn answer(&mut self, request: &Request<'_>) -> Result<Vec<u8>, StoreError> {
        let list = |names: &[String]| -> Vec<u8> {
            names.iter().flat_map(|name| name.bytes().chain([0])).collect()
        };
        match request {
            Request::Directory("/x") => {
                let all = list(&self.names);
                if all.len() > PAYLOAD_MAX { Err(StoreError::TooBig) } else { Ok(all) }
            }
            Request::DirectoryPart { path: "/x", offset } => {
                if self.changes.pop() == Some(true) {
                    self.generation += 1;
                    self.names.push(format!("new{}", self.generation));
                }
                let all = list(&self.names);
                let mut answer = format!("{}\0", self.generation).into_bytes();
                let mut at = *offset as usize;
                if at >= all.len() {
                    answer.push(0);
                    return Ok(answer);
                }
                while at < all.len() {
                    let end = at + all[at..].iter().position(|&b| b == 0).unwrap() + 1;
                    if answer.len() + end - at > PAYLOAD_MAX {
                        return Ok(answer);
                    }
                    answer.extend_from_slice(&all[at..end]);
                    at = end;
                }
                if answer.len() < PAYLOAD_MAX {
                    answer.push(0);
                }
                Ok(answer)
            }
            other => panic!("unexpected request {other:?}"),
        }
    }
}

/// Moves all bytes both ways, `step` at a time.
fn pump(client: &mut Client, server: &mut Server, step: usize) {
    loop {
        let up = client.outgoing().len().min(step);
        server.received(&client.outgoing()[..up]);
        client.sent(up);
        let down = server.outgoing().len().min(step);
        client.received(&server.outgoing()[..down]);
        server.sent(down);
        if up == 0 && down == 0 {
            return;
        }
    }
}

#[test]
fn answers_find_their_requests_out_of_order() {
    for step in [1, 5, 1024] {
        let mut client = Client::default();
        let mut server = Server::default();
        let one = client.request(TransactionId::NONE, &Request::Read("/a")).unwrap();
        let two = client.request(TransactionId(9), &Request::Read("/b")).unwrap();
        pump(&mut client, &mut server, step);
        let first = server.request().unwrap().unwrap();
        let second = server.request().unwrap().unwrap();
        assert_eq!(server.request().unwrap(), None);
        assert_eq!(Request::parse(second.kind, &second.payload), Ok(Request::Read("/b")));
        assert_eq!(second.transaction, TransactionId(9));
        server.reply(&second, b"two".to_vec());
        server.refuse(&first, StoreError::NotFound);
        pump(&mut client, &mut server, step);
        assert_eq!(client.event(), Ok(Some(Event::Reply { id: two, result: Ok(b"two".to_vec()) })));
        let refused = Event::Reply { id: one, result: Err(StoreError::NotFound) };
        assert_eq!(client.event(), Ok(Some(refused)));
        assert_eq!(client.event(), Ok(None));
        assert_eq!(client.pending(), 0);
    }
}

#[test]
fn watch_events_carry_the_token_until_unwatched() {
    let mut client = Client::default();
    let mut server = Server::default();
    let (_, token) = client.watch("device").unwrap();
    pump(&mut client, &mut server, 64);
    let asked = server.request().unwrap().unwrap();
    let text = token.to_string();
    assert_eq!(
        Request::parse(asked.kind, &asked.payload),
        Ok(Request::Watch { path: "device", token: &text })
    );
    // An event may overtake the answer.
    server.changed("device/vbd", &text).unwrap();
    server.reply_ok(&asked);
    pump(&mut client, &mut server, 64);
    let path = String::from("device/vbd");
    assert_eq!(client.event(), Ok(Some(Event::Changed { token, path })));
    assert!(
        matches!(client.event(), Ok(Some(Event::Reply { result: Ok(ok), .. })) if ok == b"OK\0")
    );
    client.unwatch("device", token).unwrap();
    server.changed("device/vif", &text).unwrap();
    server.changed("device/vif", "no number").unwrap();
    pump(&mut client, &mut server, 64);
    assert_eq!(client.event(), Ok(None));
    assert_eq!(client.strays(), 2);
}

#[test]
fn a_daemon_that_breaks_the_protocol_breaks_the_connection() {
    let answer = |kind, request_id, payload: &[u8]| {
        let mut client = Client::default();
        client.request(TransactionId::NONE, &Request::Read("/a")).unwrap();
        let mut bytes = Vec::new();
        let transaction = TransactionId::NONE;
        let payload = payload.to_vec();
        Message { kind, request_id, transaction, payload }.encode(&mut bytes).unwrap();
        client.received(&bytes);
        let result = client.event();
        assert_eq!(client.event(), result, "the error stays");
        let left = client.pending();
        assert_eq!(client.reset().len(), left);
        assert_eq!(client.pending(), 0);
        assert_eq!(client.event(), Ok(None), "reset mends it");
        result
    };
    assert_eq!(answer(MessageType::READ, 2, b""), Err(WireError::UnexpectedReply(2)));
    assert_eq!(
        answer(MessageType::WRITE, 1, b""),
        Err(WireError::WrongReplyType { asked: MessageType::READ, came: MessageType::WRITE })
    );
    let malformed = WireError::Malformed(MessageType::WATCH_EVENT);
    assert_eq!(answer(MessageType::WATCH_EVENT, 0, b"no end"), Err(malformed));
    assert_eq!(answer(MessageType::WATCH_EVENT, 0, b"path\0no end"), Err(malformed));
}

#[test]
fn an_oversized_length_is_refused_before_its_bytes_come() {
    let mut decoder = Decoder::default();
    let header = [2u32, 1, 0, PAYLOAD_MAX as u32 + 1];
    decoder.push(&header.map(u32::to_le_bytes).concat());
    assert_eq!(decoder.take(), Err(WireError::PayloadTooLong(4097)));
    decoder.push(&[0; 64]);
    assert_eq!(decoder.take(), Err(WireError::PayloadTooLong(4097)));
}

#[test]
fn a_client_refuses_what_the_daemon_would_misread() {
    let mut client = Client::default();
    let mut refused = |request: Request<'_>| client.request(TransactionId::NONE, &request);
    for path in ["", "a\0b", "/a/", "//a", "/a b", "@releaseDomain\0"] {
        assert_eq!(refused(Request::Read(path)), Err(ClientError::InvalidPath), "{path:?}");
    }
    assert_eq!(
        refused(Request::Watch { path: "@x\0y", token: "t" }),
        Err(ClientError::InvalidPath)
    );
    let value = [1; PAYLOAD_MAX - 2];
    assert_eq!(
        refused(Request::Write { path: "/a", value: &value }),
        Err(ClientError::TooLong(4097))
    );
    let value = [1; PAYLOAD_MAX - 3];
    assert!(refused(Request::Write { path: "/a", value: &value }).is_ok());
}

#[test]
fn error_names_are_those_of_the_header() {
    for &error in StoreError::ALL {
        assert_eq!(StoreError::from_name(error.name().as_bytes()), error);
    }
    assert_eq!(StoreError::ALL.len(), 16);
    assert_eq!(StoreError::from_name(b"EWOULDBLOCK"), StoreError::Unknown);
}

#[test]
fn transaction_ids_are_decimal_and_never_zero() {
    assert_eq!(parse_transaction_id(b"12\0"), Ok(TransactionId(12)));
    let malformed = Err(WireError::Malformed(MessageType::TRANSACTION_START));
    for bad in [&b"0\0"[..], b"12", b"", b"\0", b"-1\0", b"+1\0", b"4294967296\0", b"1x\0"] {
        assert_eq!(parse_transaction_id(bad), malformed, "{bad:?}");
    }
}

#[test]
fn a_part_that_says_nothing_is_an_error_and_no_loop() {
    let mut listing = Listing::new("/x");
    assert_eq!(listing.reply(Err(StoreError::TooBig)), Ok(ListStep::Again));
    assert_eq!(listing.reply(Ok(b"1\0")), Err(StoreError::Io));
    let mut listing = Listing::new("/x");
    assert_eq!(listing.reply(Err(StoreError::NotFound)), Err(StoreError::NotFound));
}
