//! For stores that keep what they are given.

use super::*;

pub(super) fn nothing_written_reads_as_zero<F: KeepsBlocks>() {
    let fixture = F::new(MIB);
    assert!(Rig::of(&fixture).read(0, MIB).iter().all(|byte| *byte == 0));
}

pub(super) fn writes_are_seen_by_later_reads<F: KeepsBlocks>() {
    let fixture = F::new(MIB);
    let mut rig = Rig::of(&fixture);
    // Sectors, blocks, and all; also the very last sector.
    for (offset, len) in [(0, 512), (512, 512), (4096, 4096), (MIB - 512, 512), (512 * 7, 512 * 9), (0, MIB)] {
        for durable in [false, true] {
            let data = pattern(offset + len, len);
            rig.write(offset, &data, durable);
            assert_eq!(rig.read(offset, len), data);
        }
    }
}

pub(super) fn all_queues_see_the_same_blocks<F: KeepsBlocks>() {
    let fixture = F::new(MIB);
    let (mut first, mut second) = (Rig::of(&fixture), Rig::of(&fixture));
    let data = pattern(3, MIB);
    first.write(0, &data, false);
    assert_eq!(second.read(0, MIB), data);
}

pub(super) fn buffers_of_many_pieces<F: KeepsBlocks>() {
    let fixture = F::new(2 * MIB);
    let mut rig = Rig::of(&fixture);
    // More pieces than the kernel takes at once, with gaps; at addresses and of lengths both good and bad.
    for (len, step) in [(512, 1024), (1024, 1536), (520, 1000), (1, 2)] {
        let count = 512 * 3;
        let pieces: Vec<_> = (0..count).map(|n| (n * step, len)).collect();
        let bytes = len * count;
        let data = pattern(len, bytes);
        let buffers = rig.guest.buffers(&pieces);
        assert!(buffers.iovecs().len() > 1024);
        assert_eq!(buffers.copy_from_slice(0, &data) as u64, bytes);
        rig.one(Op::Write { offset: 512, durable: false }, buffers).result.unwrap();
        assert_eq!(rig.read(512, bytes), data);
        let buffers = rig.guest.buffers(&pieces);
        buffers.fill(0);
        rig.one(Op::Read { offset: 512 }, buffers).result.unwrap();
        let mut read = vec![0; bytes as usize];
        rig.guest.buffers(&pieces).copy_to_slice(0, &mut read);
        assert_eq!(read, data);
    }
}

pub(super) fn reads_touch_their_buffers_only<F: KeepsBlocks>() {
    let fixture = F::new(MIB);
    let mut rig = Rig::of(&fixture);
    rig.write(0, &pattern(1, 65536), false);
    for start in [4096, 4096 + 512, 4096 + 13] {
        let around = rig.guest.buffers(&[(0, 65536)]);
        around.fill(0xee);
        let buffers = rig.guest.buffers(&[(start, 8192)]);
        rig.one(Op::Read { offset: 512 }, buffers).result.unwrap();
        let mut bytes = vec![0; 65536];
        around.copy_to_slice(0, &mut bytes);
        let (before, rest) = bytes.split_at(start as usize);
        let (read, after) = rest.split_at(8192);
        assert!(before.iter().chain(after).all(|byte| *byte == 0xee));
        assert_eq!(read, &pattern(1, 65536)[512..512 + 8192]);
    }
}

pub(super) fn zeroes_read_as_zeroes<F: KeepsBlocks>() {
    let fixture = F::new(MIB);
    let mut rig = Rig::of(&fixture);
    let data = pattern(9, MIB);
    for (offset, len) in [(0, MIB), (512, 512), (512 * 7, 512 * 40), (8192, 65536), (MIB - 512, 512)] {
        for (unmap, durable) in [(false, false), (false, true), (true, false), (true, true)] {
            rig.write(0, &data, false);
            rig.one(Op::WriteZeroes { offset, len, unmap, durable }, PinnedBuffers::default()).result.unwrap();
            let mut expected = data.clone();
            expected[offset as usize..(offset + len) as usize].fill(0);
            assert_eq!(rig.read(0, MIB), expected);
        }
    }
}

pub(super) fn discards_leave_the_rest<F: KeepsBlocks>() {
    let fixture = F::new(MIB);
    let mut rig = Rig::of(&fixture);
    let data = pattern(5, MIB);
    for (offset, len) in [(512, 512), (512 * 7, 512 * 40), (8192, 65536), (0, MIB)] {
        rig.write(0, &data, false);
        rig.one(Op::Discard { offset, len }, PinnedBuffers::default()).result.unwrap();
        let read = rig.read(0, MIB);
        let (from, to) = (offset as usize, (offset + len) as usize);
        assert_eq!(read[..from], data[..from]);
        assert_eq!(read[to..], data[to..]);
    }
}

/// A step of the random test: sectors, how its memory is cut, what is done.
#[derive(Clone, Debug)]
struct Action {
    sector: u64,
    sectors: u64,
    cut: Cut,
    kind: u8,
    seed: u64,
}

/// Memory of an action: distance from alignment, bytes of a piece.
#[derive(Clone, Copy, Debug)]
struct Cut {
    skew: u64,
    piece: u64,
}

const SECTORS: u64 = 512;

fn actions() -> impl Strategy<Value = Vec<Action>> {
    let skew = prop_oneof![3 => Just(0), 1 => Just(512), 1 => 1u64..512];
    let piece = prop_oneof![Just(1 << 20), Just(4096), Just(512), 100u64..3000];
    let action = (0..SECTORS, 1u64..64, skew, piece, 0u8..8, any::<u64>());
    let action = action.prop_map(|(sector, sectors, skew, piece, kind, seed)| Action {
        sector,
        sectors: sectors.min(SECTORS - sector),
        cut: Cut { skew, piece },
        kind,
        seed,
    });
    prop::collection::vec(action, 1..80)
}

/// Where the `n`th action of a batch has its memory: places that do not touch.
fn pieces(n: u64, cut: Cut, len: u64) -> Vec<(u64, u64)> {
    let start = n * (Guest::LEN / 16) + cut.skew;
    let gap = if len / cut.piece < 400 { 64 } else { 0 };
    (0..len.div_ceil(cut.piece)).map(|k| (start + k * (cut.piece + gap), cut.piece.min(len - k * cut.piece))).collect()
}

/// Random operations, several in flight, against plain bytes.
pub(super) fn behaves_like_an_array_of_bytes<F: KeepsBlocks>() {
    let config = ProptestConfig { cases: 48, failure_persistence: None, ..ProptestConfig::default() };
    proptest!(config, |(actions in actions())| {
        let fixture = F::new(SECTORS * 512);
        let mut rig = Rig::of(&fixture);
        let mut model = vec![0u8; (SECTORS * 512) as usize];
        // By sector: whether what it reads as is known.
        let mut known = vec![true; SECTORS as usize];
        let mut batch: Vec<Action> = Vec::new();
        for action in actions {
            let end = action.sector + action.sectors;
            if batch.len() == 16 || batch.iter().any(|b| b.sector < end && action.sector < b.sector + b.sectors) {
                settle(&mut rig, &mut batch, &model, &known);
            }
            let (from, to) = ((action.sector * 512) as usize, (end * 512) as usize);
            let (offset, len) = (action.sector * 512, action.sectors * 512);
            let durable = action.seed % 4 == 0;
            let mut buffers = PinnedBuffers::default();
            let sectors = action.sector as usize..end as usize;
            let op = match action.kind {
                0..3 => {
                    buffers = rig.guest.buffers(&pieces(batch.len() as u64, action.cut, len));
                    buffers.fill(0x5a);
                    Op::Read { offset }
                }
                3..6 => {
                    let data = pattern(action.seed, len);
                    buffers = rig.guest.buffers(&pieces(batch.len() as u64, action.cut, len));
                    buffers.copy_from_slice(0, &data);
                    model[from..to].copy_from_slice(&data);
                    known[sectors].fill(true);
                    Op::Write { offset, durable }
                }
                6 => {
                    model[from..to].fill(0);
                    known[sectors].fill(true);
                    Op::WriteZeroes { offset, len, unmap: action.seed % 2 == 0, durable }
                }
                _ => {
                    known[sectors].fill(false);
                    Op::Discard { offset, len }
                }
            };
            rig.submit(op, buffers).unwrap();
            if action.seed % 8 == 0 {
                rig.submit(Op::Flush, PinnedBuffers::default()).unwrap();
            }
            if action.seed % 3 == 0 {
                rig.ring.submit().unwrap();
            }
            batch.push(action);
        }
        settle(&mut rig, &mut batch, &model, &known);
        let read = rig.read(0, SECTORS * 512);
        compare(&read, &model, &known);
    });
}

/// Waits for a batch, and compares what its reads have got.
fn settle(rig: &mut Rig, batch: &mut Vec<Action>, model: &[u8], known: &[bool]) {
    for Completion { result, io } in rig.finish() {
        assert!(result.is_ok(), "{io:?}: {result:?}");
    }
    for (n, Action { sector, sectors, cut, kind, .. }) in batch.drain(..).enumerate() {
        if kind < 3 {
            let mut read = vec![0; (sectors * 512) as usize];
            rig.guest.buffers(&pieces(n as u64, cut, sectors * 512)).copy_to_slice(0, &mut read);
            let sectors = sector as usize..(sector + sectors) as usize;
            compare(&read, &model[sectors.start * 512..sectors.end * 512], &known[sectors]);
        }
    }
}

fn compare(read: &[u8], model: &[u8], known: &[bool]) {
    for (sector, known) in known.iter().enumerate() {
        let bytes = sector * 512..(sector + 1) * 512;
        assert!(!known || read[bytes.clone()] == model[bytes], "sector {sector}");
    }
}
