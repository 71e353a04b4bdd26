//! The entropy device (virtio 1.2, 5.4).

use std::fs::File;
use std::io::{self, Read};
use std::sync::{Mutex, PoisonError};

use janus_proto::abi::virtio::DeviceId;
use janus_proto::virtqueue::QueueError;

use super::Model;
use super::queue::{Chain, Queue};

/// Entries of its queue.
const SIZE: [u16; 1] = [64];
/// Bytes given for one request: a driver that asks for more gets these, and asks again.
const MOST: usize = 4096;

/// Where randomness comes from.
pub type Source = Box<dyn Read + Send>;

/// An entropy device.
pub struct Rng {
    source: Mutex<Source>,
}

impl std::fmt::Debug for Rng {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Rng")
    }
}

impl Rng {
    /// One that gives what the host's kernel gives.
    ///
    /// # Errors
    /// The host has no `/dev/urandom`.
    pub fn new() -> io::Result<Self> {
        Ok(Self::from_source(Box::new(File::open("/dev/urandom")?)))
    }

    /// One that gives what a source gives, which does not wait.
    #[must_use]
    pub fn from_source(source: Source) -> Self {
        Self { source: Mutex::new(source) }
    }

    fn fill(&self, chain: &Chain) -> u32 {
        let mut bytes = [0; MOST];
        let wanted = usize::try_from(chain.writable()).unwrap_or(MOST).min(MOST);
        let mut source = self.source.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(bytes) = bytes.get_mut(..wanted) else { return 0 };
        // A source that fails gives nothing, and the driver sees that.
        let given = source.read_exact(bytes).is_ok() && chain.write(0, bytes).is_ok();
        if given { u32::try_from(wanted).unwrap_or(0) } else { 0 }
    }
}

impl Model for Rng {
    fn id(&self) -> DeviceId {
        DeviceId::ENTROPY
    }
    fn queues(&self) -> &[u16] {
        &SIZE
    }
    fn serve(&self, _index: u16, queue: &mut Queue) -> Result<(), QueueError> {
        queue.each(|chain| self.fill(chain))
    }
}
