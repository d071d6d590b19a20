//! For all stores.

use super::*;

pub(super) fn info_is_consistent<F: Fixture>() {
    for capacity in [512, 4096 + 512, MIB] {
        let fixture = F::new(capacity);
        let info = fixture.store().info();
        assert_eq!(info.capacity, capacity);
        assert!(info.block_size.is_power_of_two() && info.block_size >= 512);
        assert!(info.physical_block_size.is_power_of_two() && info.physical_block_size >= info.block_size);
        assert_eq!(info.optimal_io_size % info.block_size, 0);
        assert_eq!(info.capacity % u64::from(info.block_size), 0);
        assert!(!info.read_only);
    }
}

pub(super) fn each_comes_back_once<F: Fixture>() {
    let fixture = F::new(MIB);
    let mut rig = Rig::of(&fixture);
    for _ in 0..20 {
        for (op, buffers) in one_of_each(&mut rig.guest) {
            rig.submit(op, buffers).unwrap();
        }
        let done = rig.finish();
        assert_eq!(done.len(), 12);
        assert!(done.iter().all(|done| done.result.is_ok()), "{done:?}");
    }
    assert!(rig.reap().is_empty());
}

pub(super) fn tokens_belong_to_their_backend<F: Fixture>() {
    let fixture = F::new(MIB);
    let mut first = Rig::of(&fixture);
    let backend = fixture.store().attach(&first.ring, 0).unwrap();
    let mut second = Rig { backend, ring: Rc::clone(&first.ring), ..Rig::of(&fixture) };
    for round in 0..20 {
        for n in 0..16 {
            let buffers = first.guest.buffers(&[(0, 512)]);
            first.submit(Op::Read { offset: n * 512 }, buffers).unwrap();
            let buffers = second.guest.buffers(&[(0, 512)]);
            second.submit(Op::Read { offset: (n + 16) * 512 }, buffers).unwrap();
        }
        // Either may find the other's completions.
        if round % 2 == 0 {
            second.ring.submit().unwrap();
        }
        assert_eq!(first.finish().len(), 16);
        assert_eq!(second.finish().len(), 16);
    }
}

/// What was committed needs no more calls than those that look for it; a worker with much to do never waits.
pub(super) fn looking_is_enough<F: Fixture>() {
    let fixture = F::new(MIB);
    let mut rig = Rig::of(&fixture);
    // Some of them take the kernel more than one turn.
    for n in 0..4 {
        let pieces: Vec<_> = (0..1200).map(|k| (n * MIB + k * 600, 512)).collect();
        let buffers = rig.guest.buffers(&pieces);
        rig.submit(Op::Read { offset: n * 512 }, buffers).unwrap();
        rig.submit(Op::Flush, PinnedBuffers::default()).unwrap();
    }
    rig.ring.submit().unwrap();
    rig.look_until_done();
}

pub(super) fn full_gives_the_operation_back<F: Fixture>() {
    let fixture = F::new(MIB);
    let mut rig = Rig::of(&fixture);
    for _ in 0..2 {
        let mut refused = None;
        let mut taken = 0;
        // A queue has no more than 2^15 entries (virtio 1.3 §2.7): who takes as many need never be full.
        while refused.is_none() && taken < 1 << 15 {
            let offset = taken % 2048 * 512;
            let buffers = rig.guest.buffers(&[(offset, 512)]);
            match rig.submit(Op::Read { offset }, buffers) {
                Ok(()) => taken += 1,
                Err(Full(io)) => refused = Some(io),
            }
        }
        assert!(taken >= 256, "fewer than a usual queue has");
        assert_eq!(rig.finish().len() as u64, taken);
        if let Some(refused) = refused {
            let Io { op, buffers, .. } = *refused;
            assert_eq!(op, Op::Read { offset: taken % 2048 * 512 });
            assert_eq!(buffers.len(), 512);
            rig.one(op, buffers).result.unwrap();
        }
    }
}

pub(super) fn dropped_in_flight_lets_go_of_memory_in_the_end<F: Fixture>() {
    for committed in [false, true] {
        let fixture = F::new(MIB);
        let mut rig = Rig::of(&fixture);
        for n in 0..100 {
            let buffers = rig.guest.buffers(&[(n * 4096, 4096)]);
            rig.submit(Op::Read { offset: n * 4096 }, buffers).unwrap();
        }
        if committed {
            rig.ring.submit().unwrap();
        }
        let Rig { ring, backend, guest, performed, .. } = rig;
        let release = guest.release();
        drop(performed);
        drop(backend);
        drop(ring);
        assert!(release.wait(Instant::now()));
    }
}
