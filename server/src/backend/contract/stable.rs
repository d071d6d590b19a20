//! For stores that outlive the process.

use super::*;

pub(super) fn durable_writes_are_stored<F: IsStable>() {
    let fixture = F::new(MIB);
    let mut rig = Rig::of(&fixture);
    let mut expected = vec![0; MIB as usize];
    for (offset, len) in [(0, 512), (4096, 8192), (MIB - 1024, 1024)] {
        let data = pattern(offset, len);
        rig.write(offset, &data, true);
        expected[offset as usize..(offset + len) as usize].copy_from_slice(&data);
        assert_eq!(fixture.stored(), expected);
    }
    let op = Op::WriteZeroes { offset: 4096, len: 4096, unmap: true, durable: true };
    rig.one(op, PinnedBuffers::default()).result.unwrap();
    expected[4096..8192].fill(0);
    assert_eq!(fixture.stored(), expected);
}

pub(super) fn flush_stores_what_was_completed<F: IsStable>() {
    let fixture = F::new(MIB);
    let mut rig = Rig::of(&fixture);
    let data = pattern(77, MIB);
    rig.write(0, &data, false);
    rig.one(Op::Flush, PinnedBuffers::default()).result.unwrap();
    assert_eq!(fixture.stored(), data);
}

pub(super) fn blocks_survive_the_store<F: IsStable>() {
    let fixture = F::new(MIB);
    let data = pattern(78, MIB);
    Rig::of(&fixture).write(0, &data, false);
    // As at the end of a device's service.
    fixture.store().flush().unwrap();
    assert_eq!(fixture.stored(), data);
}
