//! What an NBD server answers: whatever it sends is told from what was asked, wherever the socket cuts it, and nothing is
//! let through that was not asked for.

#![no_main]

use libfuzzer_sys::fuzz_target;
use vfio_user_blk::backend::nbd::{Asked, Event, Outstanding, Replies, Violation};

/// The requests without an answer: reads of a few bytes, so that answers of a few bytes fit, and others.
struct Table;

const COOKIES: u64 = 8;

impl Outstanding for Table {
    fn asked(&self, cookie: u64) -> Option<Asked> {
        match cookie {
            0..4 => Some(Asked::Read { offset: cookie * 64, len: 16 << cookie }),
            4..COOKIES => Some(Asked::Other),
            _ => None,
        }
    }
}

/// What was said, byte by byte where it is data.
#[derive(Debug, PartialEq, Eq)]
enum Said {
    Byte(u64, u32, u8),
    Zeroes(u64, u32, u32),
    Error(u64, u32),
    End(u64),
}

/// Hears a stream, cut into pieces of these lengths.
fn hear(structured: bool, stream: &[u8], mut cut: impl FnMut() -> usize) -> (Vec<Said>, Option<Violation>) {
    let (mut replies, mut said, mut rest) = (Replies::new(structured), Vec::new(), stream);
    while !rest.is_empty() {
        let (mut piece, after) = rest.split_at(cut().clamp(1, rest.len()));
        rest = after;
        loop {
            let event = match replies.next(&mut piece, &Table) {
                Ok(Some(event)) => event,
                Ok(None) => break,
                Err(violation) => return (said, Some(violation)),
            };
            match event {
                Event::Data { cookie, at, bytes } => {
                    check(cookie, at, bytes.len() as u32);
                    said.extend((at..).zip(bytes).map(|(at, byte)| Said::Byte(cookie, at, *byte)));
                }
                Event::Zeroes { cookie, at, len } => {
                    check(cookie, at, len);
                    said.push(Said::Zeroes(cookie, at, len));
                }
                Event::Error { cookie, error } => {
                    assert!(cookie < COOKIES && error != 0);
                    said.push(Said::Error(cookie, error));
                }
                Event::End { cookie } => {
                    assert!(cookie < COOKIES);
                    said.push(Said::End(cookie));
                }
            }
        }
        assert!(piece.is_empty(), "bytes that nobody has taken");
    }
    // What may go straight to memory is within what was asked for too.
    if let Some((cookie, at, left)) = replies.data() {
        check(cookie, at, left);
    }
    (said, None)
}

/// That data was asked for.
fn check(cookie: u64, at: u32, len: u32) {
    let Some(Asked::Read { len: asked, .. }) = Table.asked(cookie) else { panic!("data that nobody has asked for") };
    assert!(len > 0 && at.checked_add(len).is_some_and(|end| end <= asked));
}

fuzz_target!(|data: &[u8]| {
    let Some(([how, seed], stream)) = data.split_first_chunk::<2>().map(|(head, rest)| (*head, rest)) else { return };
    let structured = how % 2 == 1;
    let mut state = u32::from(seed) | 1;
    let cuts = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 27) as usize
    };
    assert_eq!(hear(structured, stream, cuts), hear(structured, stream, || usize::MAX));
});
