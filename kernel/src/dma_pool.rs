//! Page runs kept for reuse: no allocation and no zeroing on the way of a request or a frame.

use alloc::sync::Arc;
use alloc::vec::Vec;
use core::fmt;
use core::ops::{Deref, DerefMut};

use janus_front::dma::{DmaBuf, FrameSource};
use janus_proto::addr::PAGE_SIZE;

use crate::sync::IrqMutex;

/// A stock of [`DmaBuf`]s of a few lengths.
pub struct DmaPool {
    frames: &'static dyn FrameSource,
    stock: IrqMutex<Stock>,
}

struct Stock {
    /// One stack of buffers for each length that was asked for, in pages.
    lengths: Vec<(usize, Vec<DmaBuf>)>,
    pages: usize,
    max_pages: usize,
}

impl fmt::Debug for DmaPool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "DmaPool({} pages in stock)", self.stock.lock().pages)
    }
}

impl DmaPool {
    /// An empty pool that keeps at most `max_pages` unused pages.
    #[must_use]
    pub fn new(frames: &'static dyn FrameSource, max_pages: usize) -> Arc<Self> {
        let stock = Stock { lengths: Vec::new(), pages: 0, max_pages };
        Arc::new(Self { frames, stock: IrqMutex::new(stock) })
    }
    /// A buffer of at least `len` bytes with any contents; `None` when memory is short.
    #[must_use]
    pub fn take(&self, len: usize) -> Option<DmaBuf> {
        let pages = len.div_ceil(PAGE_SIZE).max(1);
        {
            let mut stock = self.stock.lock();
            let stack = stock.lengths.iter_mut().find(|(p, _)| *p == pages);
            if let Some(buf) = stack.and_then(|(_, stack)| stack.pop()) {
                stock.pages -= pages;
                return Some(buf);
            }
        }
        DmaBuf::new(self.frames, len).or_else(|| {
            self.clear();
            DmaBuf::new(self.frames, len)
        })
    }
    /// Takes a buffer into the stock, or frees it when that is full.
    pub fn put(&self, buf: DmaBuf) {
        let pages = buf.pages();
        let mut stock = self.stock.lock();
        if stock.pages + pages > stock.max_pages {
            return;
        }
        stock.pages += pages;
        match stock.lengths.iter_mut().find(|(p, _)| *p == pages) {
            Some((_, stack)) => stack.push(buf),
            None => stock.lengths.push((pages, alloc::vec![buf])),
        }
    }
    /// Frees the stock.
    pub fn clear(&self) {
        let lengths = {
            let mut stock = self.stock.lock();
            stock.pages = 0;
            core::mem::take(&mut stock.lengths)
        };
        drop(lengths);
    }
}

/// The first `len` bytes of a buffer that returns to its pool when dropped.
pub struct PooledBuf {
    /// `None` once taken out.
    buf: Option<DmaBuf>,
    len: usize,
    pool: Arc<DmaPool>,
}

impl PooledBuf {
    /// A buffer of `len` bytes with any contents; `None` when memory is short.
    #[must_use]
    pub fn new(pool: &Arc<DmaPool>, len: usize) -> Option<Self> {
        Some(Self::from_dma(pool, pool.take(len)?, len))
    }
    /// A buffer that is already here; `len` is cut to its length.
    #[must_use]
    pub fn from_dma(pool: &Arc<DmaPool>, buf: DmaBuf, len: usize) -> Self {
        let len = len.min(buf.len());
        Self { buf: Some(buf), len, pool: Arc::clone(pool) }
    }
    /// The pages, out of the pool's hands.
    #[must_use]
    pub fn into_dma(mut self) -> Option<DmaBuf> {
        self.buf.take()
    }
    /// Shows fewer bytes.
    pub fn truncate(&mut self, len: usize) {
        self.len = self.len.min(len);
    }
}

impl Deref for PooledBuf {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        self.buf.as_ref().and_then(|buf| buf.get(..self.len)).unwrap_or_default()
    }
}

impl DerefMut for PooledBuf {
    fn deref_mut(&mut self) -> &mut [u8] {
        self.buf.as_mut().and_then(|buf| buf.get_mut(..self.len)).unwrap_or_default()
    }
}

impl Drop for PooledBuf {
    fn drop(&mut self) {
        if let Some(buf) = self.buf.take() {
            self.pool.put(buf);
        }
    }
}

impl fmt::Debug for PooledBuf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PooledBuf({} bytes)", self.len)
    }
}
