use std::collections::HashMap;

use proptest::prelude::*;

use super::*;
use crate::backend::nbd::testing::chunk as chunk_bytes;

struct Table(HashMap<u64, Asked>);

impl Outstanding for Table {
    fn asked(&self, cookie: u64) -> Option<Asked> {
        self.0.get(&cookie).copied()
    }
}

/// Two reads, at cookies 1 and 2, and a write at 3.
fn table() -> Table {
    let read = |offset, len| Asked::Read { offset, len };
    Table(HashMap::from([(1, read(4096, 64)), (2, read(0, 16)), (3, Asked::Other)]))
}

/// An event that owns its data.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Said {
    Data(u64, u32, Vec<u8>),
    Zeroes(u64, u32, u32),
    Error(u64, u32),
    End(u64),
}

/// What pieces of a stream say; data that follows data is one.
fn said<'a>(structured: bool, pieces: impl IntoIterator<Item = &'a [u8]>) -> (Vec<Said>, Option<Violation>) {
    let (mut replies, table, mut all) = (Replies::new(structured), table(), Vec::new());
    for mut piece in pieces {
        loop {
            match replies.next(&mut piece, &table) {
                Ok(None) => break,
                Err(violation) => return (all, Some(violation)),
                Ok(Some(Event::Data { cookie, at, bytes })) => match all.last_mut() {
                    Some(Said::Data(last, start, data)) if *last == cookie && *start + data.len() as u32 == at => {
                        data.extend_from_slice(bytes);
                    }
                    _ => all.push(Said::Data(cookie, at, bytes.to_vec())),
                },
                Ok(Some(Event::Zeroes { cookie, at, len })) => all.push(Said::Zeroes(cookie, at, len)),
                Ok(Some(Event::Error { cookie, error })) => all.push(Said::Error(cookie, error)),
                Ok(Some(Event::End { cookie })) => all.push(Said::End(cookie)),
            }
        }
        assert!(piece.is_empty());
    }
    (all, None)
}

fn simple(cookie: u64, error: u32, data: &[u8]) -> Vec<u8> {
    [&SIMPLE_REPLY_MAGIC.to_be_bytes()[..], &error.to_be_bytes(), &cookie.to_be_bytes(), data].concat()
}

fn data(cookie: u64, flags: u16, offset: u64, bytes: &[u8]) -> Vec<u8> {
    chunk_bytes(cookie, flags, chunk::OFFSET_DATA, &[&offset.to_be_bytes()[..], bytes].concat())
}

fn hole(cookie: u64, flags: u16, offset: u64, len: u32) -> Vec<u8> {
    chunk_bytes(cookie, flags, chunk::OFFSET_HOLE, &[&offset.to_be_bytes()[..], &len.to_be_bytes()].concat())
}

fn error(cookie: u64, flags: u16, kind: u16, error: u32, message: &[u8], more: &[u8]) -> Vec<u8> {
    let len = (message.len() as u16).to_be_bytes();
    chunk_bytes(cookie, flags, kind, &[&error.to_be_bytes()[..], &len, message, more].concat())
}

#[test]
fn simple_replies() {
    let bytes = [simple(2, 0, &[7; 16]), simple(3, 0, &[]), simple(1, 5, &[]), simple(3, 28, &[])].concat();
    let expected = vec![
        Said::Data(2, 0, vec![7; 16]),
        Said::End(2),
        Said::End(3),
        Said::Error(1, 5),
        Said::End(1),
        Said::Error(3, 28),
        Said::End(3),
    ];
    assert_eq!(said(false, [&bytes[..]]), (expected, None));
}

#[test]
fn structured_replies() {
    let bytes = [
        data(1, 0, 4096 + 32, &[1; 32]),
        hole(2, 1, 0, 16),
        simple(3, 0, &[]),
        hole(1, 0, 4096, 8),
        data(1, 0, 4096 + 8, &[2; 24]),
        chunk_bytes(1, 1, chunk::NONE, &[]),
        error(2, 0, 1 << 15 | 2, 5, b"no", &[0; 8]),
        error(2, 1, 1 << 15 | 77, 22, b"", &[]),
    ];
    let expected = vec![
        Said::Data(1, 32, vec![1; 32]),
        Said::Zeroes(2, 0, 16),
        Said::End(2),
        Said::End(3),
        Said::Zeroes(1, 0, 8),
        Said::Data(1, 8, vec![2; 24]),
        Said::End(1),
        Said::Error(2, 5),
        Said::Error(2, 22),
        Said::End(2),
    ];
    assert_eq!(said(true, [&bytes.concat()[..]]), (expected, None));
}

#[test]
fn what_comes_next_is_known_as_soon_as_it_can_be() {
    let bytes = data(1, 1, 4096 + 10, &[1; 20]);
    let (mut replies, table) = (Replies::new(true), table());
    let (header, rest) = bytes.split_at(28);
    assert_eq!(replies.next(&mut &header[..], &table), Ok(None));
    assert_eq!(replies.data(), Some((1, 10, 20)));
    replies.skip(5);
    assert_eq!(replies.data(), Some((1, 15, 15)));
    let mut input = &rest[5..7];
    assert_eq!(replies.next(&mut input, &table), Ok(Some(Event::Data { cookie: 1, at: 15, bytes: &[1, 1] })));
    replies.skip(13);
    assert_eq!(replies.data(), None);
    assert!(!replies.is_between_replies());
    assert_eq!(replies.next(&mut &[][..], &table), Ok(Some(Event::End { cookie: 1 })));
    assert!(replies.is_between_replies());
}

#[test]
fn lies_are_told_from_replies() {
    let long = vec![0; MAX_ERROR_LEN as usize + 1];
    for (bytes, violation) in [
        (vec![1, 2, 3, 4], Violation::Magic(0x0102_0304)),
        (simple(4, 0, &[]), Violation::Cookie(4)),
        (simple(2, 0, &[0; 16]), Violation::Simple),
        (simple(3, 108, &[]), Violation::ShuttingDown),
        (chunk_bytes(4, 1, chunk::NONE, &[]), Violation::Cookie(4)),
        (chunk_bytes(1, 0, chunk::NONE, &[]), Violation::Length { kind: 0, len: 0 }),
        (chunk_bytes(1, 1, chunk::NONE, &[0]), Violation::Length { kind: 0, len: 1 }),
        (chunk_bytes(1, 1, 5, &[0; 12]), Violation::Chunk { kind: 5 }),
        (chunk_bytes(1, 1, 77, &[]), Violation::Chunk { kind: 77 }),
        (data(3, 1, 0, &[1]), Violation::Chunk { kind: 1 }),
        (hole(3, 1, 0, 1), Violation::Chunk { kind: 2 }),
        (data(1, 1, 4096, &[]), Violation::Length { kind: 1, len: 8 }),
        (data(1, 1, 4096, &[0; 65]), Violation::Range { offset: 4096, len: 65 }),
        (data(1, 1, 4095, &[0]), Violation::Range { offset: 4095, len: 1 }),
        (data(1, 1, 4160, &[0]), Violation::Range { offset: 4160, len: 1 }),
        (data(1, 1, u64::MAX, &[0]), Violation::Range { offset: u64::MAX, len: 1 }),
        (hole(1, 1, 4096, 0), Violation::Range { offset: 4096, len: 0 }),
        (hole(1, 1, 4097, u32::MAX), Violation::Range { offset: 4097, len: u32::MAX.into() }),
        (error(1, 1, 1 << 15 | 1, 0, b"", &[]), Violation::NoError),
        (error(1, 1, 1 << 15 | 1, 108, b"", &[]), Violation::ShuttingDown),
        (chunk_bytes(1, 1, 1 << 15 | 1, &[0; 5]), Violation::Length { kind: 1 << 15 | 1, len: 5 }),
        (chunk_bytes(1, 1, 1 << 15 | 1, &long), Violation::Length { kind: 1 << 15 | 1, len: long.len() as u32 }),
        (chunk_bytes(1, 1, 1 << 15 | 1, &[0, 0, 0, 5, 0, 1]), Violation::Length { kind: 1 << 15 | 1, len: 6 }),
    ] {
        assert_eq!(said(true, [&bytes[..]]).1, Some(violation), "{bytes:x?}");
    }
    assert_eq!(said(false, [&chunk_bytes(1, 1, 0, &[])[..]]).1, Some(Violation::Structured));
}

fn part() -> impl Strategy<Value = Vec<u8>> {
    prop_oneof![
        (0_u32..16, 1_u32..48).prop_map(|(at, len)| data(
            1,
            (at % 2) as u16,
            4096 + u64::from(at),
            &vec![at as u8; len as usize]
        )),
        (0_u32..16).prop_map(|len| hole(2, 1, 0, len + 1)),
        Just(simple(3, 0, &[])),
        (0_u32..40).prop_map(|code| simple(1, code + 1, &[])),
        (0_usize..40).prop_map(|len| error(1, 1, 1 << 15 | 1, 5, &vec![b'x'; len], &[])),
        Just(chunk_bytes(1, 1, 0, &[])),
        prop::collection::vec(any::<u8>(), 1..30),
    ]
}

proptest! {
    /// Wherever a stream is cut, it says the same.
    #[test]
    fn cuts_change_nothing(parts in prop::collection::vec(part(), 1..12), cuts in prop::collection::vec(1_usize..40, 1..100)) {
        let bytes = parts.concat();
        let (mut rest, mut pieces) = (&bytes[..], Vec::new());
        for cut in cuts.iter().cycle() {
            if rest.is_empty() {
                break;
            }
            let (piece, after) = rest.split_at((*cut).min(rest.len()));
            pieces.push(piece);
            rest = after;
        }
        for structured in [false, true] {
            prop_assert_eq!(said(structured, pieces.iter().copied()), said(structured, [&bytes[..]]));
        }
    }
}
