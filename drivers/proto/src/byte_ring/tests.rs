//! Both ends of a page, honest and lying.
#![cfg(not(loom))]

use std::collections::VecDeque;

use proptest::prelude::*;

use super::*;

fn page() -> Vec<AtomicU32> {
    (0..1024).map(|_| AtomicU32::new(0)).collect()
}

const SMALL: PageLayout = PageLayout {
    to_back: Stream { data: (0, 8), cons: 24, prod: 28 },
    to_front: Stream { data: (8, 16), cons: 32, prod: 36 },
};

#[test]
fn console_bytes_lie_where_the_c_structure_has_them() {
    let page = page();
    let mut front = ByteRing::front(&page[..], CONSOLE).unwrap();
    let mut back = ByteRing::back(&page[..], CONSOLE).unwrap();
    assert_eq!(front.write(b"hello"), Ok(5));
    // `out` at 1024, `out_prod` at 3084.
    assert_eq!(page[256].load(Ordering::Relaxed).to_ne_bytes(), *b"hell");
    assert_eq!(page[771].load(Ordering::Relaxed), 5);
    assert_eq!(back.write(b"ok"), Ok(2));
    assert_eq!(page[0].load(Ordering::Relaxed).to_ne_bytes(), *b"ok\0\0");
    assert_eq!(page[769].load(Ordering::Relaxed), 2);
    let mut buf = [0; 8];
    assert_eq!(back.read(&mut buf), Ok(5));
    assert_eq!(&buf[..5], b"hello");
    assert_eq!(page[770].load(Ordering::Relaxed), 5);
    assert_eq!(front.read(&mut buf), Ok(2));
    assert_eq!(&buf[..2], b"ok");
}

#[test]
fn a_layout_that_does_not_fit_is_refused() {
    let page = page();
    for (words, layout) in [
        (771, CONSOLE),
        (1024, CONSOLE.at(2048)),
        (0, SMALL),
        (1024, SMALL.at(2)),
        (1024, PageLayout { to_front: Stream { data: (8, 12), cons: 32, prod: 36 }, ..SMALL }),
    ] {
        let refused = ByteRing::front(&page[..words], layout).unwrap_err();
        assert_eq!(refused, ByteRingError::TooSmall, "{words} words, {layout:?}");
    }
    assert!(ByteRing::front(&page[..772], CONSOLE).is_ok());
    assert!(ByteRing::front(&page[..], CONSOLE.at(1008)).is_ok());
}

#[test]
fn lying_indices_are_errors_not_panics() {
    for (word, lie) in [(6, 9), (6, 1 << 31), (9, 17), (9, u32::MAX)] {
        let page = page();
        let mut front = ByteRing::front(&page[..], SMALL).unwrap();
        // Word 6: what the other end consumed; word 9: what it produced.
        page[word].store(lie, Ordering::Relaxed);
        let result = if word == 6 { front.write(b"x") } else { front.read(&mut [0; 4]) };
        assert_eq!(result, Err(ByteRingError::Index), "{word} {lie}");
        assert_eq!(ByteRing::front(&page[..], SMALL).unwrap_err(), ByteRingError::Index);
    }
}

proptest! {
    /// Each stream is a bounded queue of bytes, at any index and alignment.
    #[test]
    fn any_chunks_arrive_in_order(
        start: [u32; 2],
        steps in prop::collection::vec((0_u8..4, prop::collection::vec(any::<u8>(), 0..20)), 0..100),
    ) {
        let page = page();
        let layout = SMALL.at(16);
        for (stream, start) in [(layout.to_back, start[0]), (layout.to_front, start[1])] {
            page[stream.cons / 4].store(start, Ordering::Relaxed);
            page[stream.prod / 4].store(start, Ordering::Relaxed);
        }
        let mut front = ByteRing::front(&page[..], layout).unwrap();
        let mut back = ByteRing::back(&page[..], layout).unwrap();
        let mut down = VecDeque::<u8>::new();
        let mut up = VecDeque::<u8>::new();
        for (step, bytes) in steps {
            let mut buf = vec![0; bytes.len()];
            let (size, queue, written, read) = match step {
                0 => (8, &mut down, Some(front.write(&bytes).unwrap()), None),
                1 => (16, &mut up, Some(back.write(&bytes).unwrap()), None),
                2 => (8, &mut down, None, Some(back.read(&mut buf).unwrap())),
                _ => (16, &mut up, None, Some(front.read(&mut buf).unwrap())),
            };
            if let Some(written) = written {
                prop_assert_eq!(written, bytes.len().min(size - queue.len()));
                queue.extend(&bytes[..written]);
            }
            if let Some(read) = read {
                prop_assert_eq!(read, buf.len().min(queue.len()));
                prop_assert!(queue.drain(..read).eq(buf[..read].iter().copied()));
            }
        }
    }

    /// Whatever is in the page, nothing panics.
    #[test]
    fn nonsense_in_the_page_is_survived(
        steps in prop::collection::vec((0_u8..2, 0_usize..10, any::<u32>(), 0_usize..20), 0..100),
    ) {
        let page = page();
        let mut front = ByteRing::front(&page[..], SMALL).unwrap();
        for (step, word, value, len) in steps {
            page[word].store(if len % 2 == 0 { value % 20 } else { value }, Ordering::Relaxed);
            let mut buf = vec![0; len];
            let done = if step == 0 { front.write(&buf) } else { front.read(&mut buf) };
            prop_assert!(done.is_err() || done.is_ok_and(|done| done <= len));
        }
    }
}
