//! Things by number, where a number is not used again for another thing.

use std::fmt;

/// What a [`Token`] names.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub(super) enum Kind {
    Wake,
    Tcp,
    Datagram,
    TcpListener,
    UdpListener,
}

/// Names a thing to the timers, the ready list and epoll.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct Token {
    pub(super) kind: Kind,
    pub(super) key: Key,
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}({}.{})", self.kind, self.key.index, self.key.generation)
    }
}

/// Bits of a generation in a number.
const GENERATION_BITS: u32 = 24;

impl Token {
    /// As a number for epoll.
    pub(super) fn to_u64(self) -> u64 {
        let generation = self.key.generation & ((1 << GENERATION_BITS) - 1);
        (self.kind as u64) << 56 | u64::from(generation) << 32 | u64::from(self.key.index)
    }

    /// What [`Self::to_u64`] made.
    pub(super) fn from_u64(number: u64) -> Option<Self> {
        let [kind, high, mid, low, index @ ..] = number.to_be_bytes();
        let kind = match kind {
            0 => Kind::Wake,
            1 => Kind::Tcp,
            2 => Kind::Datagram,
            3 => Kind::TcpListener,
            4 => Kind::UdpListener,
            _ => return None,
        };
        let generation = u32::from_be_bytes([0, high, mid, low]);
        Some(Self { kind, key: Key { index: u32::from_be_bytes(index), generation } })
    }
}

/// A place in a [`Slab`] and which of its tenants.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct Key {
    pub(super) index: u32,
    pub(super) generation: u32,
}

/// Things by key.
#[derive(Debug)]
pub(super) struct Slab<T> {
    slots: Vec<(u32, Option<T>)>,
    free: Vec<u32>,
    max: usize,
}

impl<T> Slab<T> {
    /// For at most `max` things.
    pub(super) fn new(max: usize) -> Self {
        Self { slots: Vec::new(), free: Vec::new(), max }
    }

    pub(super) fn len(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    pub(super) fn is_full(&self) -> bool {
        self.len() >= self.max
    }

    /// Adds what is made with its own key; gives it back when there is no room.
    pub(super) fn insert(&mut self, thing: T) -> Result<Key, T> {
        if self.is_full() {
            return Err(thing);
        }
        let index = self.free.pop().unwrap_or_else(|| {
            self.slots.push((0, None));
            u32::try_from(self.slots.len() - 1).unwrap_or(u32::MAX)
        });
        match self.slots.get_mut(index as usize) {
            Some((generation, slot)) => {
                *slot = Some(thing);
                Ok(Key { index, generation: *generation })
            }
            None => Err(thing),
        }
    }

    pub(super) fn get_mut(&mut self, key: Key) -> Option<&mut T> {
        match self.slots.get_mut(key.index as usize) {
            Some((generation, thing)) if *generation == key.generation => thing.as_mut(),
            _ => None,
        }
    }

    pub(super) fn remove(&mut self, key: Key) -> Option<T> {
        let (generation, slot) = self.slots.get_mut(key.index as usize)?;
        if *generation != key.generation {
            return None;
        }
        let thing = slot.take()?;
        *generation = (*generation + 1) & ((1 << GENERATION_BITS) - 1);
        self.free.push(key.index);
        Some(thing)
    }

    /// All keys in use.
    pub(super) fn keys(&self) -> Vec<Key> {
        let used = (0_u32..).zip(&self.slots).filter(|(_, (_, thing))| thing.is_some());
        used.map(|(index, (generation, _))| Key { index, generation: *generation }).collect()
    }
}
