//! The two ends against each other in any order of steps, and the frontend against a mad backend.

use proptest::prelude::*;

use super::*;

/// A device as xenstore has it, with both machines and what they believe to own.
struct World {
    front: Front,
    back: Back,
    front_state: XenbusState,
    back_state: XenbusState,
    front_ring: bool,
    back_ring: bool,
    destroyed: bool,
    /// Losses that the frontend reported.
    stops: Vec<Loss>,
}

impl World {
    fn new(handshake: Handshake) -> Self {
        let mut world = Self {
            front: Front::new(handshake),
            back: Back::new(handshake),
            front_state: XenbusState::INITIALISING,
            back_state: XenbusState::INITIALISING,
            front_ring: false,
            back_ring: false,
            destroyed: false,
            stops: Vec::new(),
        };
        let step = world.back.offer();
        world.do_back(step);
        world
    }

    /// One step of the frontend; `false` if it had nothing to do.
    fn run_front(&mut self) -> bool {
        let seen = if self.destroyed { XenbusState::UNKNOWN } else { self.back_state };
        let step = self.front.backend(seen);
        self.do_front(step)
    }

    fn do_front(&mut self, step: FrontStep) -> bool {
        match step {
            FrontStep::Wait => return false,
            FrontStep::Write(state) => {
                assert!(!self.front_ring, "states without a ring are only written without one");
                self.front_state = state;
            }
            FrontStep::Publish => {
                assert!(!self.front_ring, "published twice");
                self.front_ring = true;
                self.front_state = self.front.published();
            }
            FrontStep::Connect => {
                assert!(self.front_ring);
                self.front_state = self.front.connected();
            }
            FrontStep::Stop(loss) => {
                self.stops.push(loss);
                self.front_state = self.front.stopped();
            }
            FrontStep::Release => {
                assert!(self.front_ring, "released twice");
                assert!(!self.back_ring, "released while the backend has it mapped");
                self.front_ring = false;
                self.front.released();
            }
        }
        true
    }

    fn run_back(&mut self) -> bool {
        if self.destroyed {
            return false;
        }
        let step = self.back.frontend(self.front_state);
        self.do_back(step)
    }

    fn do_back(&mut self, step: BackStep) -> bool {
        match step {
            BackStep::Wait => return false,
            BackStep::Write(state) => self.back_state = state,
            BackStep::Offer => self.back_state = XenbusState::INIT_WAIT,
            BackStep::Connect => {
                assert!(self.front_ring, "mapped a ring that is not there");
                self.back_ring = true;
                self.back_state = self.back.connected();
            }
            BackStep::Release => {
                assert!(self.back_ring);
                self.back_ring = false;
                self.back_state = self.back.released();
            }
            BackStep::Destroy => self.destroyed = true,
        }
        true
    }

    fn settle(&mut self) {
        for _ in 0..100 {
            let moved = self.run_back();
            if !self.run_front() && !moved {
                return;
            }
        }
        panic!("the two ends never settle");
    }
}

const HANDSHAKES: [Handshake; 2] = [Handshake::Initialised, Handshake::Connected];

#[test]
fn both_ends_connect() {
    for handshake in HANDSHAKES {
        let mut world = World::new(handshake);
        world.settle();
        assert!(world.front.is_connected() && world.back.is_connected());
        assert!(world.front_ring && world.back_ring);
        assert_eq!(world.front_state, XenbusState::CONNECTED);
    }
}

#[test]
fn a_detached_device_is_let_go_and_destroyed() {
    for handshake in HANDSHAKES {
        let mut world = World::new(handshake);
        world.settle();
        let step = world.back.detach();
        world.do_back(step);
        world.settle();
        assert!(world.destroyed && world.front.is_closed());
        assert!(!world.front_ring && !world.back_ring);
        assert_eq!(world.stops, [Loss::BackendCloses]);
    }
}

#[test]
fn detach_before_connect_is_answered() {
    let mut world = World::new(Handshake::Initialised);
    let step = world.back.detach();
    world.do_back(step);
    world.settle();
    assert!(world.destroyed && world.front.is_closed());
}

#[test]
fn a_vanished_backend_stops_the_device_at_once() {
    let mut world = World::new(Handshake::Initialised);
    world.settle();
    world.destroyed = true;
    world.back_ring = false;
    world.settle();
    assert_eq!(world.stops, [Loss::BackendVanished]);
    assert!(world.front.is_closed() && !world.front_ring);
}

#[test]
fn an_abandoned_device_closes_and_can_come_back() {
    for handshake in HANDSHAKES {
        let mut world = World::new(handshake);
        world.settle();
        let step = world.front.abandon();
        world.do_front(step);
        world.settle();
        assert!(world.front.is_closed() && !world.front_ring && !world.back_ring);
        assert!(!world.run_front(), "it stays closed");
        world.front.reconnect();
        world.settle();
        assert!(world.front.is_connected() && world.back.is_connected());
    }
}

#[test]
fn a_backend_of_a_former_life_is_made_to_start_over() {
    for handshake in HANDSHAKES {
        let mut world = World::new(handshake);
        world.settle();
        // The guest restarts: its ring is gone without a word, its state is written by discovery.
        world.front = Front::new(handshake);
        world.front_ring = false;
        world.back_ring = false;
        world.back.phase = BackPhase::Connected;
        world.run_front();
        assert_eq!(world.front_state, XenbusState::CLOSED);
        world.back_ring = true;
        world.settle();
        assert!(world.front.is_connected() && world.back.is_connected());
    }
}

#[test]
fn a_backend_that_starts_over_gets_a_new_ring() {
    let mut world = World::new(Handshake::Initialised);
    world.settle();
    world.back = Back::new(Handshake::Initialised);
    world.back_ring = false;
    let step = world.back.offer();
    world.do_back(step);
    world.front_state = XenbusState::UNKNOWN;
    world.run_front();
    world.settle();
    assert_eq!(world.stops, [Loss::BackendReset]);
    assert!(world.front.is_connected() && world.back.is_connected());
}

#[test]
fn patience_ends() {
    let mut front = Front::new(Handshake::Initialised);
    assert_eq!(front.backend(XenbusState::INIT_WAIT), FrontStep::Publish);
    front.published();
    assert_eq!(front.backend(XenbusState::CONNECTED), FrontStep::Connect);
    front.connected();
    assert_eq!(front.lose_patience(), FrontStep::Wait);
    assert_eq!(front.backend(XenbusState::CLOSING), FrontStep::Stop(Loss::BackendCloses));
    assert_eq!(front.stopped(), XenbusState::CLOSED);
    assert_eq!(front.backend(XenbusState::CLOSING), FrontStep::Wait);
    assert!(front.is_draining());
    assert_eq!(front.lose_patience(), FrontStep::Release);
    front.released();
    assert!(front.is_closed());
}

#[test]
fn states_are_read_leniently_and_never_guessed() {
    assert_eq!(XenbusState::parse(b"4"), XenbusState::CONNECTED);
    assert_eq!(XenbusState::parse(b" 5\n"), XenbusState::CLOSING);
    for nonsense in [&b""[..], b"four", b"-1", b"4294967296", b"\xff\xfe", b"4 4"] {
        assert_eq!(XenbusState::parse(nonsense), XenbusState::UNKNOWN);
    }
    assert_eq!(format!("{}", XenbusState::INIT_WAIT), "2");
    assert_eq!(format!("{:?}", XenbusState(77)), "XenbusState(0x4d)");
}

proptest! {
    #[test]
    fn any_interleaving_connects(order in prop::collection::vec(any::<bool>(), 0..40), direct in any::<bool>()) {
        let mut world = World::new(HANDSHAKES[usize::from(direct)]);
        for front in order {
            if front { world.run_front(); } else { world.run_back(); }
        }
        world.settle();
        prop_assert!(world.front.is_connected() && world.back.is_connected());
    }

    #[test]
    fn detach_in_any_interleaving_frees_everything(
        before in prop::collection::vec(any::<bool>(), 0..12),
        after in prop::collection::vec(any::<bool>(), 0..12),
        direct in any::<bool>(),
    ) {
        let mut world = World::new(HANDSHAKES[usize::from(direct)]);
        for front in before {
            if front { world.run_front(); } else { world.run_back(); }
        }
        let step = world.back.detach();
        world.do_back(step);
        for front in after {
            if front { world.run_front(); } else { world.run_back(); }
        }
        world.settle();
        prop_assert!(world.destroyed);
        prop_assert!(!world.front_ring && !world.back_ring);
    }

    #[test]
    fn a_mad_backend_never_confuses_the_frontend(
        states in prop::collection::vec(0..12u32, 0..60),
        acts in prop::collection::vec(0..8u8, 60),
    ) {
        let mut front = Front::new(Handshake::Initialised);
        let (mut ring, mut stopped) = (false, false);
        for (state, act) in states.into_iter().zip(acts) {
            let mut step = match act {
                0 => front.abandon(),
                1 => front.lose_patience(),
                2 => { front.reconnect(); FrontStep::Wait }
                _ => front.backend(XenbusState(state)),
            };
            // Do every step, sometimes failing at `Publish`.
            for _ in 0..8 {
                match step {
                    FrontStep::Wait => break,
                    FrontStep::Write(_) => prop_assert!(!ring),
                    FrontStep::Publish => {
                        prop_assert!(!ring);
                        ring = true;
                        stopped = false;
                        if act == 7 {
                            step = front.abandon();
                            prop_assert_eq!(step, FrontStep::Stop(Loss::Abandoned));
                            continue;
                        }
                        front.published();
                    }
                    FrontStep::Connect => { prop_assert!(ring && !stopped); front.connected(); }
                    FrontStep::Stop(_) => { prop_assert!(ring && !stopped); stopped = true; front.stopped(); }
                    FrontStep::Release => { prop_assert!(ring && stopped); ring = false; front.released(); }
                }
                step = front.backend(XenbusState(state));
            }
            prop_assert_eq!(step, FrontStep::Wait, "it settles");
            prop_assert_eq!(front.is_connected(), ring && !stopped && front.is_connected());
        }
    }
}
