//! Requests of the control ring: what they change, and with one thing wrong each.

use janus_proto::ring::Front;

use super::*;
use crate::memory::copy_in;
use crate::memory::fake::Pages;
use crate::netback::Cable;

/// Page 0 is the ring, 2 has keys and mappings.
struct World {
    pages: Pages,
    front: Front<<Pages as GrantMapper>::Mapping, CTRL_SLOT_WORDS>,
    control: Control<Pages>,
    card: Arc<Mutex<CardNet>>,
}

impl World {
    fn new() -> Self {
        let pages = Pages::new(4);
        let front = Front::new(pages.page(0)).unwrap();
        let (net, _) = Cable::pair();
        let card = Arc::new(Mutex::new(CardNet::new(Box::new(net))));
        card.lock().unwrap().connect(3, false);
        let control = Control::connect(pages.clone(), GrantRef(0), Arc::clone(&card)).unwrap();
        Self { pages, front, control, card }
    }

    fn ask(&mut self, kind: CtrlType, data: [u32; 3]) -> (CtrlStatus, u32) {
        self.front.push(&NetCtrlRequest { id: 77, kind, data }).unwrap();
        let _ = self.front.publish();
        let _ = self.control.serve().unwrap();
        let answer: NetCtrlResponse = self.front.pop().unwrap().unwrap();
        assert_eq!((answer.id, answer.kind), (77, kind));
        (answer.status, answer.data)
    }
}

const OK: (CtrlStatus, u32) = (CtrlStatus::SUCCESS, 0);
const WRONG: (CtrlStatus, u32) = (CtrlStatus::INVALID_PARAMETER, 0);
const UNKNOWN: (CtrlStatus, u32) = (CtrlStatus::NOT_SUPPORTED, 0);

#[test]
fn what_a_frontend_asks_for_is_set() {
    let mut world = World::new();
    assert_eq!(world.ask(CtrlType::GET_HASH_FLAGS, [0; 3]), UNKNOWN, "no algorithm yet");
    assert_eq!(world.ask(CtrlType::SET_HASH_FLAGS, [2, 0, 0]), WRONG, "no algorithm yet");
    assert_eq!(world.ask(CtrlType::SET_HASH_ALGORITHM, [1, 0, 0]), OK);
    assert_eq!(world.ask(CtrlType::GET_HASH_FLAGS, [0; 3]), (CtrlStatus::SUCCESS, 15));
    assert_eq!(world.ask(CtrlType::SET_HASH_FLAGS, [3, 0, 0]), OK);
    let key: Vec<u8> = (1..=40).collect();
    assert!(copy_in(&world.pages.page(2), 0, &key));
    assert_eq!(world.ask(CtrlType::SET_HASH_KEY, [2, 4, 0]), OK);
    assert_eq!(world.card.lock().unwrap().hash_mut().key[..6], [1, 2, 3, 4, 0, 0]);
    assert_eq!(world.ask(CtrlType::SET_HASH_KEY, [2, 40, 0]), OK);
    assert_eq!(world.card.lock().unwrap().hash_mut().key, key[..]);
    let size = world.ask(CtrlType::GET_HASH_MAPPING_SIZE, [0; 3]);
    assert_eq!(size, (CtrlStatus::SUCCESS, 128));
    assert_eq!(world.ask(CtrlType::SET_HASH_MAPPING_SIZE, [128, 0, 0]), OK);
    let entries: Vec<u32> = (0..128).map(|index| index % 3).collect();
    assert!(copy_in(&world.pages.page(2), 0, entries.as_bytes()));
    assert_eq!(world.ask(CtrlType::SET_HASH_MAPPING, [2, 128, 0]), OK);
    assert_eq!(world.card.lock().unwrap().hash_mut().mapping, entries);
    assert_eq!(world.ask(CtrlType::SET_HASH_MAPPING, [2, 1, 127]), OK);
    assert_eq!(world.card.lock().unwrap().hash_mut().mapping[127], 0);
    assert_eq!(world.ask(CtrlType::SET_HASH_MAPPING_SIZE, [0; 3]), OK);
    assert_eq!(world.ask(CtrlType::SET_HASH_ALGORITHM, [0; 3]), OK);
}

#[test]
fn a_request_with_one_thing_wrong_changes_nothing() {
    let mut world = World::new();
    assert_eq!(world.ask(CtrlType::SET_HASH_ALGORITHM, [1, 0, 0]), OK);
    assert_eq!(world.ask(CtrlType::SET_HASH_MAPPING_SIZE, [16, 0, 0]), OK);
    let before = format!("{:?}", world.card.lock().unwrap().hash_mut());
    assert!(copy_in(&world.pages.page(2), 0, [0_u32, 1, 2, 3].as_bytes()));
    for (kind, data, expected) in [
        (CtrlType(0), [0; 3], UNKNOWN),
        (CtrlType(8), [0; 3], UNKNOWN),
        (CtrlType(u16::MAX), [u32::MAX; 3], UNKNOWN),
        (CtrlType::SET_HASH_ALGORITHM, [2, 0, 0], WRONG),
        (CtrlType::SET_HASH_FLAGS, [16, 0, 0], WRONG),
        (CtrlType::SET_HASH_FLAGS, [u32::MAX, 0, 0], WRONG),
        (CtrlType::SET_HASH_KEY, [2, 41, 0], WRONG),
        (CtrlType::SET_HASH_KEY, [2, u32::MAX, 0], WRONG),
        (CtrlType::SET_HASH_KEY, [9, 40, 0], WRONG),
        (CtrlType::SET_HASH_MAPPING_SIZE, [129, 0, 0], WRONG),
        (CtrlType::SET_HASH_MAPPING_SIZE, [u32::MAX, 0, 0], WRONG),
        // There are three queues.
        (CtrlType::SET_HASH_MAPPING, [2, 4, 0], WRONG),
        (CtrlType::SET_HASH_MAPPING, [2, 1, 16], WRONG),
        (CtrlType::SET_HASH_MAPPING, [2, 3, u32::MAX], WRONG),
        (CtrlType::SET_HASH_MAPPING, [2, 17, 0], WRONG),
        (CtrlType::SET_HASH_MAPPING, [2, u32::MAX, 0], WRONG),
        (CtrlType::SET_HASH_MAPPING, [77, 3, 0], WRONG),
    ] {
        assert_eq!(world.ask(kind, data), expected, "{kind:?} {data:?}");
        let after = format!("{:?}", world.card.lock().unwrap().hash_mut());
        assert_eq!(after, before, "{kind:?} {data:?}");
    }
    world.pages.page(0)[0].store(1000, janus_proto::sync::Ordering::Relaxed);
    assert!(world.control.serve().is_err(), "the ring is overrun");
}
