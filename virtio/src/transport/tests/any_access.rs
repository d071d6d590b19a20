//! Any access in any order.

use proptest::prelude::*;

use super::*;

/// An access, most often one that a driver might make.
fn access() -> impl Strategy<Value = (Region, u64, Vec<u8>)> {
    let register = prop::sample::select(fields::FIELDS.to_vec());
    let small = prop_oneof![Just(0u64), Just(1), Just(3), Just(11), Just(15), any::<u64>()];
    prop_oneof![
        8 => (register, small).prop_map(|((_, bytes), value)| {
            (Region::Bar2, bytes.start as u64, value.to_le_bytes()[..bytes.len()].to_vec())
        }),
        2 => (0..4u16).prop_map(|queue| (Region::Bar2, NOTIFY + 4 * u64::from(queue), queue.to_le_bytes().to_vec())),
        1 => any::<bool>().prop_map(|on| (Region::Config, COMMAND, vec![if on { 6 } else { 2 }, 0])),
        1 => (0u64..0x4100, prop::collection::vec(any::<u8>(), 0..100)).prop_map(|(at, data)| (Region::Bar2, at, data)),
        1 => (0u64..0x2100, prop::collection::vec(any::<u8>(), 0..100)).prop_map(|(at, data)| (Region::Bar0, at, data)),
        1 => (0u64..0x110, prop::collection::vec(any::<u8>(), 0..20)).prop_map(|(at, data)| (Region::Config, at, data)),
        1 => (PCI_CFG + 4..PCI_CFG + 20, 0u8..6).prop_map(|(at, value)| (Region::Config, at, vec![value])),
    ]
}

proptest! {
    /// Whatever is read and written: no panic, an error exactly when out of bounds, and the effects
    /// are those of a device in the state that they presuppose.
    #[test]
    fn any_access(
        negotiated: bool,
        accesses in prop::collection::vec((access(), any::<bool>()), 1..200),
    ) {
        let (mut pci, _) = if negotiated { running() } else { function() };
        for ((region, offset, mut data), done) in accesses {
            let within = offset + data.len() as u64 <= pci.regions()[region.index()];
            let ran = pci.is_running();
            let before = status(&mut pci);
            let effect = pci.write(region, offset, &data);
            prop_assert_eq!(effect.is_ok(), within);
            match effect.unwrap_or(Effect::None) {
                Effect::None => {}
                Effect::Kick(queue) => prop_assert!(ran && pci.queue(queue).unwrap().enabled),
                Effect::Start => prop_assert!(!ran && pci.is_running()),
                Effect::Stop => prop_assert!(!pci.is_running()),
                Effect::StartQueue(queue) => prop_assert!(pci.is_running() && pci.queue(queue).unwrap().enabled),
                Effect::StopQueue(queue) => {
                    prop_assert!(!pci.queue(queue).unwrap().enabled);
                    if done {
                        pci.queue_stopped(queue);
                    }
                }
                Effect::Reset => {
                    prop_assert_ne!(before, 0);
                    prop_assert_eq!(status(&mut pci), before);
                    if done {
                        pci.reset_done();
                        prop_assert_eq!(status(&mut pci), 0);
                    }
                }
            }
            prop_assert_eq!(pci.read(region, offset, &mut data).is_ok(), within);
            for queue in 0..QUEUES {
                let setup = pci.queue(queue).unwrap();
                prop_assert!(setup.size.is_power_of_two() && setup.size <= 256);
                prop_assert!(!setup.enabled || pci.driver_features() & VERSION_1 != 0);
            }
            // What a driver leads to can be exported and imported.
            let (mut other, _) = function();
            prop_assert_eq!(other.import(&pci.export()), Ok(()));
        }
    }
}
