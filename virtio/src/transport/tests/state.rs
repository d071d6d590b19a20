//! Export and import.

use super::*;

#[test]
fn state_survives_export_and_import() {
    let (mut pci, _) = running();
    let _ = write(&mut pci, CONFIG_MSIX_VECTOR, 3u16);
    pci.interrupts().assert_intx(1);
    pci.config_changed();
    let text = serde_json::to_string(&pci.export()).unwrap();
    let (mut other, log) = function();
    other.import(&serde_json::from_str(&text).unwrap()).unwrap();
    assert_eq!(other.export(), pci.export());
    assert!(other.is_running());
    assert_eq!(other.queue(0), pci.queue(0));
    assert_eq!(log.lock().unwrap().acked, [VERSION_1 | RING_RESET | FLUSH]);
    assert_eq!(write(&mut other, NOTIFY, 0u16), Effect::Kick(0));
    assert_eq!(read(&mut other, ISR, 1), 3);
}

#[test]
fn import_finishes_the_resets_that_were_asked_for() {
    let (mut pci, _) = running();
    let _ = write(&mut pci, QUEUE_SELECT, 0u16);
    assert_eq!(write(&mut pci, QUEUE_RESET, 1u16), Effect::StopQueue(0));
    let (mut other, _) = function();
    other.import(&pci.export()).unwrap();
    assert_eq!(read(&mut other, QUEUE_RESET, 2), 0);
    assert!(!other.queue(0).unwrap().enabled && other.queue(1).unwrap().enabled);
    assert_eq!(write(&mut pci, DEVICE_STATUS, 0u8), Effect::Reset);
    other.import(&pci.export()).unwrap();
    assert_eq!((status(&mut other), other.driver_features()), (0, 0));
}

#[test]
fn states_that_are_refused_whole() {
    let (pci, _) = running();
    let good = pci.export();
    let offered = VERSION_1 | RING_RESET | 1 << 28 | 1 << 29 | FLUSH;
    type Break = fn(&mut TransportState);
    let table: &[(Break, ImportError)] = &[
        (|state| state.version = 0, ImportError::Version { got: 0 }),
        (|state| state.function.version = 0, ImportError::Function(pci::ImportError::Version { got: 0 })),
        (|state| state.driver_features = [0, 0, 0, 0], ImportError::Features { got: 0, offered }),
        (|state| state.driver_features = [0, 1, 0, 1], ImportError::Features { got: VERSION_1, offered }),
        (|state| state.device_status = 0x10, ImportError::Status { status: 0x10 }),
        (|state| state.device_status = 7, ImportError::Status { status: 7 }),
        (|state| state.device_status = 0x4b, ImportError::Status { status: 0x4b }),
        (|state| state.queues.truncate(2), ImportError::Queues { got: 2, expected: 3 }),
        (|state| state.config_msix_vector = 4, ImportError::Vector { vector: 4 }),
        (|state| state.queues[1].msix_vector = 5, ImportError::Vector { vector: 5 }),
        (|state| state.queues[1].size = 100, ImportError::Queue { queue: 1 }),
        (|state| state.queues[1].size = 0, ImportError::Queue { queue: 1 }),
        (|state| state.queues[1].size = 512, ImportError::Queue { queue: 1 }),
        (|state| state.queues[2].resetting = true, ImportError::Queue { queue: 2 }),
        (|state| state.device_status = 3, ImportError::Queue { queue: 0 }),
        (
            |state| {
                state.device_status = 0;
                state.resetting = true;
            },
            ImportError::Status { status: 0 },
        ),
    ];
    for (break_it, error) in table {
        let (mut other, _) = function();
        let before = other.export();
        let mut state = good.clone();
        break_it(&mut state);
        assert_eq!(other.import(&state), Err(error.clone()));
        assert_eq!(other.export(), before, "{error}");
    }
}
