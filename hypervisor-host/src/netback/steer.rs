//! One network behind the queues of one card: each frame for the guest goes to the queue of its flow, and of multicast
//! frames only those that the guest has asked for.

use std::collections::{BTreeSet, VecDeque};
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::hash::{FlowHash, Hash};
use super::{Accepts, Frame, GroupChange, NetBackend};

/// Frames that wait for a queue which is not being served.
const MOST_WAITING: usize = 256;
/// Multicast groups of a card, as Linux's backend.
const MOST_GROUPS: usize = 64;

type Mac = [u8; 6];
const BROADCAST: Mac = [0xff; 6];

/// A network, and how its frames are shared out.
pub struct CardNet {
    net: Box<dyn NetBackend + Send>,
    /// What was found while another queue was served.
    waiting: Vec<VecDeque<Frame>>,
    /// There is something new in `waiting`.
    stirred: bool,
    hash: Hash,
    /// `None`: the guest gets all multicast.
    groups: Option<BTreeSet<Mac>>,
    dropped: u64,
}

impl fmt::Debug for CardNet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CardNet")
            .field("queues", &self.waiting.len())
            .field("hash", &self.hash)
            .field("groups", &self.groups)
            .field("dropped", &self.dropped)
            .finish_non_exhaustive()
    }
}

impl CardNet {
    /// A network with one queue.
    #[must_use]
    pub fn new(net: Box<dyn NetBackend + Send>) -> Self {
        let (hash, waiting) = (Hash::default(), vec![VecDeque::new()]);
        Self { net, waiting, stirred: false, hash, groups: None, dropped: 0 }
    }

    /// A frontend with so many queues comes, perhaps after another one; with `multicast` it says which groups it wants.
    pub fn connect(&mut self, queues: usize, multicast: bool) {
        self.waiting.clear();
        self.waiting.resize_with(queues.max(1), VecDeque::new);
        self.hash = Hash::default();
        self.groups = multicast.then(BTreeSet::new);
    }

    /// Its queues.
    #[must_use]
    pub fn queue_count(&self) -> usize {
        self.waiting.len()
    }

    /// How flows are hashed.
    pub fn hash_mut(&mut self) -> &mut Hash {
        &mut self.hash
    }

    /// Whether a queue has got frames since the last call, by another one that was served.
    pub fn take_stirred(&mut self) -> bool {
        std::mem::take(&mut self.stirred)
    }

    /// Whether there is something for this queue.
    #[must_use]
    pub fn is_waited_for(&self, queue: usize) -> bool {
        self.waiting.get(queue).is_some_and(|waiting| !waiting.is_empty())
    }

    /// Frames that nobody wanted, or that a queue did not take in time.
    #[must_use]
    pub fn dropped(&self) -> u64 {
        self.dropped
    }

    fn wants(&self, frame: &[u8]) -> bool {
        let Some(groups) = &self.groups else { return true };
        match frame.first_chunk::<6>() {
            Some(to) => to[0] & 1 == 0 || *to == BROADCAST || groups.contains(to),
            None => true,
        }
    }

    fn next(&mut self, queue: usize) -> Option<Frame> {
        if let Some(frame) = self.waiting.get_mut(queue).and_then(VecDeque::pop_front) {
            return Some(frame);
        }
        loop {
            let frame = self.net.receive()?;
            if !self.wants(&frame.bytes) {
                self.dropped += 1;
                self.net.recycle(frame.bytes);
                continue;
            }
            let to = self.hash.queue(&frame.bytes, self.waiting.len());
            if to == queue {
                return Some(frame);
            }
            match self.waiting.get_mut(to).filter(|waiting| waiting.len() < MOST_WAITING) {
                Some(waiting) => {
                    waiting.push_back(frame);
                    self.stirred = true;
                }
                None => {
                    self.dropped += 1;
                    self.net.recycle(frame.bytes);
                }
            }
        }
    }

    fn group(&mut self, change: GroupChange) -> bool {
        let Some(groups) = &mut self.groups else { return false };
        match change {
            GroupChange::Join(group) => {
                let room = groups.len() < MOST_GROUPS || groups.contains(&group);
                if room {
                    groups.insert(group);
                }
                room
            }
            GroupChange::Leave(group) => {
                groups.remove(&group);
                true
            }
        }
    }
}

/// The network as one queue sees it.
#[derive(Clone, Debug)]
pub struct QueueNet {
    card: Arc<Mutex<CardNet>>,
    queue: usize,
}

impl QueueNet {
    /// The view of queue `queue`.
    #[must_use]
    pub fn new(card: &Arc<Mutex<CardNet>>, queue: usize) -> Self {
        Self { card: Arc::clone(card), queue }
    }

    fn lock(&self) -> MutexGuard<'_, CardNet> {
        self.card.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl NetBackend for QueueNet {
    fn send(&mut self, frame: Frame) {
        self.lock().net.send(frame);
    }
    fn receive(&mut self) -> Option<Frame> {
        self.lock().next(self.queue)
    }
    fn connected(&mut self, accepts: Accepts) {
        self.lock().net.connected(accepts);
    }
    fn buffer(&mut self) -> Vec<u8> {
        self.lock().net.buffer()
    }
    fn recycle(&mut self, bytes: Vec<u8>) {
        self.lock().net.recycle(bytes);
    }
    fn group(&mut self, change: GroupChange) -> bool {
        self.lock().group(change)
    }
    fn hash(&mut self, frame: &Frame) -> Option<FlowHash> {
        self.lock().hash.of(&frame.bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::netback::Cable;

    fn frame(to: Mac, port: u8) -> Frame {
        let mut bytes = vec![0; 60];
        bytes[..6].copy_from_slice(&to);
        bytes[12] = 8;
        bytes[14] = 0x45;
        bytes[23] = 6;
        bytes[35] = port;
        Frame { bytes, ..Frame::default() }
    }

    #[test]
    fn each_flow_has_one_queue_and_stays_in_order() {
        let (near, mut wire) = Cable::pair();
        let card = Arc::new(Mutex::new(CardNet::new(Box::new(near))));
        card.lock().unwrap().connect(3, false);
        for round in 0..4_u8 {
            for port in 0..20 {
                let mut sent = frame([0; 6], port);
                sent.bytes[59] = round;
                wire.send(sent);
            }
        }
        let mut seen = BTreeSet::new();
        let mut queues: Vec<_> = (0..3).map(|queue| QueueNet::new(&card, queue)).collect();
        for (index, queue) in queues.iter_mut().enumerate() {
            let mut rounds = [0; 20];
            while let Some(frame) = queue.receive() {
                let port = usize::from(frame.bytes[35]);
                assert_eq!(frame.bytes[59], rounds[port], "port {port} is out of order");
                rounds[port] += 1;
            }
            for (port, rounds) in rounds.iter().enumerate().filter(|(_, rounds)| **rounds > 0) {
                assert_eq!(*rounds, 4);
                assert!(seen.insert(port), "port {port} is on two queues");
            }
            assert_eq!(index == 0, card.lock().unwrap().take_stirred());
        }
        assert_eq!(seen.len(), 20);
    }

    #[test]
    fn a_queue_that_nobody_serves_is_bounded() {
        let (near, mut wire) = Cable::pair();
        let card = Arc::new(Mutex::new(CardNet::new(Box::new(near))));
        card.lock().unwrap().connect(2, false);
        let other = (0..).find(|port| Hash::default().queue(&frame([0; 6], *port).bytes, 2) == 1);
        for _ in 0..1000 {
            wire.send(frame([0; 6], other.unwrap()));
        }
        assert!(QueueNet::new(&card, 0).receive().is_none());
        assert_eq!(card.lock().unwrap().dropped(), 1000 - MOST_WAITING as u64);
        assert!(card.lock().unwrap().is_waited_for(1) && !card.lock().unwrap().is_waited_for(0));
    }

    #[test]
    fn multicast_is_filtered_by_the_groups_of_the_guest() {
        let (near, mut wire) = Cable::pair();
        let card = Arc::new(Mutex::new(CardNet::new(Box::new(near))));
        let mut queue = QueueNet::new(&card, 0);
        let (group, other) = ([1, 0, 0x5e, 0, 0, 1], [1, 0, 0x5e, 0, 0, 2]);
        let mut got = |queue: &mut QueueNet| -> Vec<Mac> {
            for to in [[0; 6], BROADCAST, group, other] {
                wire.send(frame(to, 1));
            }
            std::iter::from_fn(|| queue.receive())
                .map(|frame| *frame.bytes.first_chunk().unwrap())
                .collect()
        };
        assert_eq!(got(&mut queue).len(), 4, "nobody asked for a filter");
        assert!(!queue.group(GroupChange::Join(group)));
        card.lock().unwrap().connect(1, true);
        assert_eq!(got(&mut queue), [[0; 6], BROADCAST]);
        assert!(queue.group(GroupChange::Join(group)));
        assert_eq!(got(&mut queue), [[0; 6], BROADCAST, group]);
        assert!(queue.group(GroupChange::Leave(group)));
        assert_eq!(got(&mut queue), [[0; 6], BROADCAST]);
        for index in 0..64 {
            assert!(queue.group(GroupChange::Join([1, 1, 1, 1, 1, index])));
        }
        assert!(!queue.group(GroupChange::Join([1, 1, 1, 1, 1, 64])), "there is a limit");
        assert!(queue.group(GroupChange::Join([1, 1, 1, 1, 1, 63])));
    }
}
