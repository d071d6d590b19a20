//! The layouts: exact bytes against the specification, round trips, and any bytes at all.

#![allow(clippy::unwrap_used, reason = "a failure is the result of a test")]

use proptest::collection::vec;
use proptest::prelude::*;
use vfio_user::{
    Capabilities, Command, DeviceInfo, DmaMap, DmaUnmap, Errno, IoEventFd, IrqAction, IrqData, IrqInfo, Migration,
    RegionData, RegionInfo, RegionIoFds, RegionSpan, RegionWrites, Reply, Request, SetIrqs, SparseMmapArea, Version,
};

/// Lays fields out one after the other.
macro_rules! bytes {
    ($($field:expr),* $(,)?) => {{
        let mut bytes: Vec<u8> = Vec::new();
        $(bytes.extend_from_slice(&$field.to_ne_bytes());)*
        bytes
    }};
}

fn encoded(request: &Request<'_>) -> Vec<u8> {
    let mut bytes = Vec::new();
    request.encode(&mut bytes);
    bytes
}

fn encoded_reply(reply: &Reply<'_>) -> Vec<u8> {
    let mut bytes = Vec::new();
    reply.encode(&mut bytes);
    bytes
}

fn decode(command: Command, payload: &[u8]) -> Result<Request<'_>, Errno> {
    Request::decode(command.number(), payload)
}

const AREA: SparseMmapArea = SparseMmapArea { offset: 0x1000, size: 0x2000 };

#[test]
fn requests_have_the_bytes_of_the_specification() {
    let map = DmaMap { readable: true, writeable: true, offset: 1, address: 2, size: 3 };
    let set = |action, data, count| Request::DeviceSetIrqs(SetIrqs { action, data, index: 2, start: 1, count });
    let mut wrs = Vec::new();
    let writes = [
        RegionData { offset: 0x10, region: 4, data: &[1, 2] },
        RegionData { offset: 0x20, region: 5, data: &[1, 2, 3, 4, 5, 6, 7, 8] },
    ];
    let writes = RegionWrites::new(&writes, &mut wrs).unwrap();
    let with_data = |mut bytes: Vec<u8>, data: &[u8]| {
        bytes.extend_from_slice(data);
        bytes
    };
    let table = [
        (Request::DmaMap(map), bytes![32u32, 3u32, 1u64, 2u64, 3u64]),
        (Request::DmaMap(DmaMap { writeable: false, ..map }), bytes![32u32, 1u32, 1u64, 2u64, 3u64]),
        (Request::DmaUnmap(DmaUnmap::Range { address: 5, size: 6 }), bytes![24u32, 0u32, 5u64, 6u64]),
        (Request::DmaUnmap(DmaUnmap::All), bytes![24u32, 2u32, 0u64, 0u64]),
        (Request::DeviceGetInfo, bytes![16u32, 0u32, 0u32, 0u32]),
        (Request::DeviceGetRegionInfo { argsz: 64, index: 7 }, bytes![64u32, 0u32, 7u32, 0u32, 0u64, 0u64]),
        (Request::DeviceGetRegionIoFds { argsz: 96, index: 4 }, bytes![96u32, 0u32, 4u32, 0u32]),
        (Request::DeviceGetIrqInfo { index: 3 }, bytes![16u32, 0u32, 3u32, 0u32]),
        (set(IrqAction::Trigger, IrqData::EventFd, 4), bytes![20u32, 0x24u32, 2u32, 1u32, 4u32]),
        (set(IrqAction::Mask, IrqData::None, 4), bytes![20u32, 0x09u32, 2u32, 1u32, 4u32]),
        (set(IrqAction::Unmask, IrqData::Bool(&[1, 0, 1]), 3), bytes![23u32, 0x12u32, 2u32, 1u32, 3u32, 1u8, 0u8, 1u8]),
        (Request::RegionRead(RegionSpan { offset: 9, region: 7, count: 256 }), bytes![9u64, 7u32, 256u32]),
        (
            Request::RegionWrite(RegionData { offset: 9, region: 7, data: &[4, 5, 6] }),
            with_data(bytes![9u64, 7u32, 3u32], &[4, 5, 6]),
        ),
        (
            Request::RegionWriteMulti(writes),
            with_data(
                with_data(bytes![2u64, 0x10u64, 4u32, 2u32], &[1, 2, 0, 0, 0, 0, 0, 0]),
                &with_data(bytes![0x20u64, 5u32, 8u32], &[1, 2, 3, 4, 5, 6, 7, 8]),
            ),
        ),
        (Request::DeviceReset, vec![]),
    ];
    for (request, bytes) in table {
        assert_eq!(encoded(&request), bytes, "{request:?}");
        assert_eq!(decode(request.command(), &bytes).as_ref(), Ok(&request));
    }
}

#[test]
fn replies_have_the_bytes_of_the_specification() {
    let info = DeviceInfo { flags: 3, num_regions: 9, num_irqs: 5 };
    let region = RegionInfo { flags: 7, index: 4, size: 0x4000, offset: 0, sparse_mmap: vec![AREA] };
    let plain = RegionInfo { sparse_mmap: vec![], ..region.clone() };
    let sub = IoEventFd { offset: 0x3000, size: 2, fd_index: 1, flags: 1, datamatch: 9 };
    let io_fds = RegionIoFds { index: 4, sub_regions: vec![sub] };
    let span = RegionSpan { offset: 9, region: 7, count: 4 };
    let table = [
        (Reply::Done, vec![]),
        (Reply::DmaUnmap(DmaUnmap::All), bytes![24u32, 2u32, 0u64, 0u64]),
        (Reply::DeviceInfo(info), bytes![16u32, 3u32, 9u32, 5u32]),
        (Reply::RegionInfo { info: &plain, argsz: 32 }, bytes![32u32, 7u32, 4u32, 0u32, 0x4000u64, 0u64]),
        // Too small an argsz: the fixed part, the size that is needed, no offset of what is not there.
        (Reply::RegionInfo { info: &region, argsz: 63 }, bytes![64u32, 15u32, 4u32, 0u32, 0x4000u64, 0u64]),
        (
            Reply::RegionInfo { info: &region, argsz: 64 },
            bytes![
                64u32, 15u32, 4u32, 32u32, 0x4000u64, 0u64, // the region
                1u16, 1u16, 0u32, 1u32, 0u32, // the capability
                0x1000u64, 0x2000u64,
            ],
        ),
        (Reply::RegionIoFds { io_fds: &io_fds, argsz: 55 }, bytes![56u32, 0u32, 4u32, 1u32]),
        (
            Reply::RegionIoFds { io_fds: &io_fds, argsz: 56 },
            bytes![56u32, 0u32, 4u32, 1u32, 0x3000u64, 2u64, 1u32, 0u32, 1u32, 0u32, 9u64],
        ),
        (Reply::IrqInfo(IrqInfo { flags: 9, index: 2, count: 17 }), bytes![16u32, 9u32, 2u32, 17u32]),
        (Reply::RegionRead(RegionData { offset: 9, region: 7, data: &[1, 2] }), bytes![9u64, 7u32, 2u32, 1u8, 2u8]),
        (Reply::RegionWrite(span), bytes![9u64, 7u32, 4u32]),
        (Reply::RegionWriteMulti { wr_cnt: 3 }, bytes![3u64]),
    ];
    for (reply, bytes) in table {
        assert_eq!(encoded_reply(&reply), bytes, "{reply:?}");
    }
    assert_eq!((region.argsz(), plain.argsz(), io_fds.argsz()), (64, 32, 56));
}

/// QEMU's own proposal, and the room it leaves for the reply.
#[test]
fn version_of_qemu() {
    let mut payload = bytes![0u16, 0u16];
    payload.extend_from_slice(
        br#"{"capabilities": {"migration": {"pgsize": 4096, "max_bitmap_size": 268435456}, "max_msg_fds": 16, "max_data_xfer_size": 1048576, "pgsizes": 4096, "max_dma_maps": 65535, "write_multiple": true}}"#,
    );
    payload.push(0);
    let version = Version::decode(&payload).unwrap();
    let capabilities = Capabilities {
        max_msg_fds: Some(16),
        max_data_xfer_size: Some(1 << 20),
        max_dma_maps: Some(65535),
        pgsizes: Some(4096),
        write_multiple: Some(true),
        migration: Some(Migration { pgsize: Some(4096), max_bitmap_size: Some(256 << 20) }),
    };
    assert_eq!(version, Version { major: 0, minor: 0, capabilities: capabilities.clone() });

    let reply =
        Version { capabilities: Capabilities { write_multiple: None, migration: None, ..capabilities }, ..version };
    let bytes = encoded_reply(&Reply::Version(&reply));
    assert!(bytes.len() < payload.len(), "{} bytes", bytes.len());
    assert_eq!(bytes.last(), Some(&0));
    assert_eq!(Version::decode(&bytes), Ok(reply));
}

#[test]
fn version_with_little_or_broken_json() {
    let decode = |json: &[u8]| {
        let mut payload = bytes![0u16, 1u16];
        payload.extend_from_slice(json);
        Version::decode(&payload)
    };
    let empty = Version { major: 0, minor: 1, capabilities: Capabilities::default() };
    let accepted: [&[u8]; 7] = [
        b"",
        b"{}\0",
        b"{\"capabilities\":{}}\0",
        b"{\"capabilities\":{\"unknown\":[1,{}]},\"other\":null}\0",
        b"{\"capabilities\":{\"twin_socket\":{\"supported\":true}}}\0",
        b"{}\0\0\0\0",
        b"  {\n}\0",
    ];
    for json in accepted {
        assert_eq!(decode(json).as_ref(), Ok(&empty), "{}", json.escape_ascii());
    }
    assert_eq!(encoded(&Request::Version(empty.clone())), bytes![0u16, 1u16]);
    let capabilities = empty.capabilities;
    assert_eq!((capabilities.max_msg_fds(), capabilities.max_data_xfer_size()), (1, 1 << 20));
    assert_eq!((capabilities.max_dma_maps(), capabilities.pgsizes()), (65535, 4096));

    let refused: [&[u8]; 12] = [
        b"{}",
        b"\0",
        b"[]\0",
        b"null\0",
        b"{\"capabilities\":[]}\0",
        b"{\"capabilities\":{\"max_msg_fds\":\"16\"}}\0",
        b"{\"capabilities\":{\"max_msg_fds\":-1}}\0",
        b"{\"capabilities\":{\"write_multiple\":1}}\0",
        b"{\"capabilities\":{\"migration\":7}}\0",
        b"{\"capabilities\":{\"migration\":{\"pgsize\":{}}}}\0",
        b"{\"\xff\":1}\0",
        b"{}{}\0",
    ];
    for json in refused {
        assert_eq!(decode(json), Err(Errno::EINVAL), "{}", json.escape_ascii());
    }
    assert_eq!(Version::decode(&[0, 0, 0]), Err(Errno::EINVAL));
    let mut deep = vec![b'['; 100_000];
    deep.push(0);
    assert_eq!(decode(&deep), Err(Errno::EINVAL));
}

#[test]
fn broken_requests_are_refused() {
    use Command::*;
    let huge = u64::MAX;
    let mut many = bytes![201u64];
    many.resize(8 + 201 * 24, 0);
    let table = [
        (DmaMap, bytes![31u32, 3u32, 0u64, 0u64, 4096u64]),
        (DmaMap, bytes![32u32, 3u32, 0u64, 0u64, 0u64]),
        (DmaMap, bytes![32u32, 3u32, 0u64, huge, 4096u64]),
        (DmaMap, bytes![32u32, 3u32, huge, 0u64, 4096u64]),
        (DmaMap, bytes![32u32, 3u32, 0u64, 0u64, 4096u32]),
        (DmaUnmap, bytes![23u32, 0u32, 0u64, 0u64]),
        (DmaUnmap, bytes![24u32, 2u32, 4096u64, 0u64]),
        (DeviceGetInfo, bytes![15u32, 0u32, 0u32, 0u32]),
        (DeviceGetInfo, bytes![16u32, 0u32, 0u32]),
        (DeviceGetRegionInfo, bytes![31u32, 0u32, 0u32, 0u32, 0u64, 0u64]),
        (DeviceGetRegionInfo, bytes![32u32, 0u32, 0u32, 0u32]),
        (DeviceGetRegionIoFds, bytes![15u32, 0u32, 0u32, 0u32]),
        (DeviceGetIrqInfo, bytes![15u32, 0u32, 0u32, 0u32]),
        (DeviceSetIrqs, bytes![19u32, 0x24u32, 0u32, 0u32, 1u32]),
        (DeviceSetIrqs, bytes![20u32, 0x20u32, 0u32, 0u32, 1u32]),
        (DeviceSetIrqs, bytes![20u32, 0x04u32, 0u32, 0u32, 1u32]),
        (DeviceSetIrqs, bytes![20u32, 0x25u32, 0u32, 0u32, 1u32]),
        (DeviceSetIrqs, bytes![20u32, 0x34u32, 0u32, 0u32, 1u32]),
        (DeviceSetIrqs, bytes![20u32, 0x64u32, 0u32, 0u32, 1u32]),
        (DeviceSetIrqs, bytes![20u32, 0x24u32, 0u32, u32::MAX, 1u32]),
        (DeviceSetIrqs, bytes![22u32, 0x22u32, 0u32, 0u32, 3u32, 1u8, 1u8]),
        (RegionRead, bytes![huge, 0u32, 1u32]),
        (RegionRead, bytes![0u64, 0u32]),
        (RegionWrite, bytes![0u64, 0u32, 3u32, 0u16]),
        (RegionWrite, bytes![0u64, 0u32, 1u32, 0u16]),
        (RegionWrite, bytes![huge, 0u32, 2u32, 0u16]),
        (RegionWriteMulti, bytes![1u64, 0u64, 0u32, 9u32, 0u64]),
        (RegionWriteMulti, bytes![2u64, 0u64, 0u32, 8u32, 0u64]),
        (RegionWriteMulti, bytes![1u64, 0u64, 0u32, 8u32, 0u32]),
        (RegionWriteMulti, bytes![huge]),
        (RegionWriteMulti, many),
    ];
    for (command, payload) in table {
        assert_eq!(decode(command, &payload), Err(Errno::EINVAL), "{command:?} {payload:?}");
    }
    let dirty_bitmap = bytes![24u32, 1u32, 0u64, 0u64];
    assert_eq!(decode(DmaUnmap, &dirty_bitmap), Err(Errno::ENOTSUP));
    for number in [0, 11, 12, 14, 16, 17, 18, 19, u16::MAX] {
        assert_eq!(Request::decode(number, &[0; 64]), Err(Errno::ENOTSUP), "{number}");
    }
}

/// Newer clients set more bits and send more bytes.
#[test]
fn unknown_dma_map_flags_and_longer_structures_are_accepted() {
    let expected = DmaMap { readable: true, writeable: true, offset: 0, address: 0, size: 4096 };
    let payload = bytes![40u32, 0xffu32, 0u64, 0u64, 4096u64, 7u64];
    assert_eq!(decode(Command::DmaMap, &payload), Ok(Request::DmaMap(expected)));
}

#[test]
fn at_most_200_writes_of_8_bytes() {
    let write = RegionData { offset: 0, region: 0, data: &[0; 8] };
    let mut buffer = Vec::new();
    assert!(RegionWrites::new(&[write; 200], &mut buffer).is_ok());
    assert_eq!(RegionWrites::new(&[write; 201], &mut buffer), Err(Errno::E2BIG));
    let long = RegionData { data: &[0; 9], ..write };
    assert_eq!(RegionWrites::new(&[long], &mut buffer), Err(Errno::E2BIG));
}

#[test]
fn broken_capability_chains_are_refused() {
    let reply = |cap_offset: u32, next: u32, nr_areas: u32| {
        bytes![
            64u32, 15u32, 4u32, cap_offset, 0u64, 0u64, // the region
            2u16, 1u16, next, 0u32, 0u32, // a capability of another kind
            1u16, 1u16, 0u32, nr_areas, 0u32, 1u64, 2u64, // the areas
        ]
    };
    let decode = |payload: &[u8]| RegionInfo::decode(payload).map(|(info, _)| info.sparse_mmap);
    let area = SparseMmapArea { offset: 1, size: 2 };
    assert_eq!(decode(&reply(32, 48, 1)), Ok(vec![area]));
    assert_eq!(decode(&reply(32, 0, 1)), Ok(vec![]));
    for (cap_offset, next, nr_areas) in [(32, 32, 1), (32, 4000, 1), (u32::MAX, 0, 1), (48, 0, 2), (48, 0, u32::MAX)] {
        assert_eq!(decode(&reply(cap_offset, next, nr_areas)), Err(Errno::EINVAL));
    }
}

/// The entries may be larger than ours, and none may be smaller.
#[test]
fn sub_regions_of_other_sizes() {
    let entry = bytes![0x3000u64, 2u64, 1u32, 0u32, 1u32, 0u32, 9u64];
    let mut grown = bytes![64u32, 0u32, 4u32, 1u32];
    grown.extend(entry.iter().chain(&[0xff; 8]));
    let (io_fds, argsz) = RegionIoFds::decode(&grown).unwrap();
    assert_eq!((io_fds.sub_regions.len(), argsz), (1, 64));
    assert_eq!(io_fds.sub_regions[0].datamatch, 9);

    let mut small = bytes![56u32, 0u32, 4u32, 2u32];
    small.extend(&entry);
    assert_eq!(RegionIoFds::decode(&small), Err(Errno::EINVAL));
    let mut ioregionfd = bytes![56u32, 0u32, 4u32, 1u32];
    ioregionfd.extend(bytes![0u64, 0u64, 0u32, 1u32, 0u32, 0u32, 0u64]);
    assert_eq!(RegionIoFds::decode(&ioregionfd), Err(Errno::ENOTSUP));
}

fn capabilities() -> impl Strategy<Value = Capabilities> {
    let migration =
        any::<(Option<u64>, Option<u64>)>().prop_map(|(pgsize, max_bitmap_size)| Migration { pgsize, max_bitmap_size });
    (any::<[Option<u64>; 4]>(), any::<Option<bool>>(), proptest::option::of(migration)).prop_map(
        |([fds, xfer, maps, pgsizes], write_multiple, migration)| Capabilities {
            max_msg_fds: fds,
            max_data_xfer_size: xfer,
            max_dma_maps: maps,
            pgsizes,
            write_multiple,
            migration,
        },
    )
}

fn assert_round_trip(request: &Request<'_>) {
    let bytes = encoded(request);
    assert_eq!(Request::decode(request.command().number(), &bytes).as_ref(), Ok(request));
}

proptest! {
    #[test]
    fn version_round_trips(major: u16, minor: u16, capabilities in capabilities()) {
        assert_round_trip(&Request::Version(Version { major, minor, capabilities }));
    }

    #[test]
    fn dma_round_trips(
        readable: bool,
        writeable: bool,
        offset in 0..=u64::MAX / 2,
        address in 0..=u64::MAX / 2,
        size in 1..=u64::MAX / 2,
    ) {
        assert_round_trip(&Request::DmaMap(DmaMap { readable, writeable, offset, address, size }));
        assert_round_trip(&Request::DmaUnmap(DmaUnmap::Range { address, size }));
    }

    #[test]
    fn set_irqs_round_trips(
        action in prop_oneof![
            Just(IrqAction::Mask), Just(IrqAction::Unmask), Just(IrqAction::Trigger)
        ],
        index: u32,
        start in 0..u32::MAX / 2,
        count in 0..u32::MAX / 2,
        bools in vec(any::<u8>(), 0..100),
    ) {
        let set = SetIrqs { action, data: IrqData::None, index, start, count };
        assert_round_trip(&Request::DeviceSetIrqs(set));
        assert_round_trip(&Request::DeviceSetIrqs(SetIrqs { data: IrqData::EventFd, ..set }));
        let (data, count) = (IrqData::Bool(&bools), bools.len() as u32);
        assert_round_trip(&Request::DeviceSetIrqs(SetIrqs { data, count, ..set }));
    }

    #[test]
    fn queries_and_accesses_round_trip(
        argsz in 32u32..,
        index: u32,
        offset in 0..=u64::MAX / 2,
        data in vec(any::<u8>(), 0..100),
    ) {
        assert_round_trip(&Request::DeviceGetRegionInfo { argsz, index });
        assert_round_trip(&Request::DeviceGetRegionIoFds { argsz, index });
        assert_round_trip(&Request::DeviceGetIrqInfo { index });
        let write = RegionData { offset, region: index, data: &data };
        assert_round_trip(&Request::RegionRead(write.span()));
        assert_round_trip(&Request::RegionWrite(write));
        let read = encoded_reply(&Reply::RegionRead(write));
        prop_assert_eq!(RegionData::decode(&read), Ok(write));
        let written = encoded_reply(&Reply::RegionWrite(write.span()));
        prop_assert_eq!(RegionSpan::decode(&written), Ok(write.span()));
    }

    #[test]
    fn write_multi_round_trips(
        writes in vec((0..=u64::MAX / 2, any::<u32>(), vec(any::<u8>(), 0..=8)), 0..=200)
    ) {
        let writes: Vec<RegionData<'_>> = writes
            .iter()
            .map(|(offset, region, data)| RegionData { offset: *offset, region: *region, data })
            .collect();
        let mut buffer = Vec::new();
        let multi = RegionWrites::new(&writes, &mut buffer).unwrap();
        assert_round_trip(&Request::RegionWriteMulti(multi));
        prop_assert_eq!(multi.iter().collect::<Vec<_>>(), writes);
    }

    #[test]
    fn infos_round_trip(flags: u32, a: u32, b: u32, size: u64, areas: Vec<(u64, u64)>) {
        let device = DeviceInfo { flags, num_regions: a, num_irqs: b };
        let bytes = encoded_reply(&Reply::DeviceInfo(device));
        prop_assert_eq!(DeviceInfo::decode(&bytes), Ok(device));
        let irq = IrqInfo { flags, index: a, count: b };
        prop_assert_eq!(IrqInfo::decode(&encoded_reply(&Reply::IrqInfo(irq))), Ok(irq));

        let sparse_mmap: Vec<SparseMmapArea> =
            areas.iter().map(|(offset, size)| SparseMmapArea { offset: *offset, size: *size }).collect();
        let info = RegionInfo { flags: flags & !8, index: a, size, offset: size, sparse_mmap };
        let argsz = info.argsz();
        let bytes = encoded_reply(&Reply::RegionInfo { info: &info, argsz });
        prop_assert_eq!(bytes.len() as u32, argsz);
        prop_assert_eq!(RegionInfo::decode(&bytes), Ok((info.clone(), argsz)));
        let short = encoded_reply(&Reply::RegionInfo { info: &info, argsz: argsz - 1 });
        prop_assert_eq!(short.len(), 32);
        prop_assert_eq!(RegionInfo::decode(&short).unwrap().1, argsz);

        let sub_regions = areas
            .iter()
            .map(|(offset, datamatch)| IoEventFd {
                offset: *offset, size, fd_index: b, flags, datamatch: *datamatch,
            })
            .collect();
        let io_fds = RegionIoFds { index: a, sub_regions };
        let argsz = io_fds.argsz();
        let bytes = encoded_reply(&Reply::RegionIoFds { io_fds: &io_fds, argsz });
        prop_assert_eq!(RegionIoFds::decode(&bytes), Ok((io_fds, argsz)));
    }

    #[test]
    fn any_bytes_decode_without_panic(command in 0u16..20, payload in vec(any::<u8>(), 0..128)) {
        if let Ok(Request::RegionWriteMulti(writes)) = Request::decode(command, &payload) {
            prop_assert_eq!(writes.iter().count(), (payload.len() - 8) / 24);
        }
        let _ = (Version::decode(&payload), DmaUnmap::decode(&payload));
        let _ = (DeviceInfo::decode(&payload), IrqInfo::decode(&payload));
        let _ = (RegionInfo::decode(&payload), RegionIoFds::decode(&payload));
        let _ = (RegionSpan::decode(&payload), RegionData::decode(&payload).is_ok());
    }

    /// A good payload with one field changed goes deeper than random bytes do.
    #[test]
    fn a_broken_field_decodes_without_panic(
        at in 0usize..64,
        value in prop_oneof![Just(0u32), Just(1), Just(u32::MAX), any::<u32>()],
        cut in 0usize..=64,
    ) {
        let info = RegionInfo { flags: 7, index: 4, size: 1, offset: 0, sparse_mmap: vec![AREA] };
        let mut bytes = encoded_reply(&Reply::RegionInfo { info: &info, argsz: 64 });
        bytes[at / 4 * 4..][..4].copy_from_slice(&value.to_ne_bytes());
        let _ = RegionInfo::decode(&bytes[..cut]);

        let sub = IoEventFd { offset: 0, size: 2, fd_index: 0, flags: 0, datamatch: 0 };
        let io_fds = RegionIoFds { index: 4, sub_regions: vec![sub; 2] };
        let mut bytes = encoded_reply(&Reply::RegionIoFds { io_fds: &io_fds, argsz: 96 });
        bytes[at / 4 * 4..][..4].copy_from_slice(&value.to_ne_bytes());
        let _ = RegionIoFds::decode(&bytes[..cut]);
    }
}
