//! A whole session: a client that mostly keeps to the rules, and a guest that mostly does, against the server as it is
//! shipped.
//!
//! An input is a list of [`Step`](step::Step)s, most of which do a whole thing right: bring the device up, add a request, kick.
//! The rest break one thing each. So nearly any bytes get past the handshake and into the rings.
//!
//! What must hold, whatever the client does:
//! - Nothing panics and nothing takes longer than [`LIMIT`].
//! - Each command that waits for an answer gets exactly one, in order, and no other message comes.
//! - The session goes on, unless its memory goes.
//! - A neighbour on the same worker is served meanwhile.
//! - A reset repairs what the guest did.
//! - When the client has gone, so have its descriptors and its memory.

#![no_main]

mod guest;
mod peer;
mod step;
mod world;

use std::cell::RefCell;
use std::time::Duration;

use libfuzzer_sys::arbitrary::{Arbitrary, Result, Unstructured};
use libfuzzer_sys::{Corpus, fuzz_target};

use guest::Guest;
use peer::Peer;
use step::Step;
use world::{Disk, World};

/// How long anything may take: far longer than it does on a busy machine.
const LIMIT: Duration = Duration::from_secs(60);
/// The most steps of an input.
const MAX_STEPS: usize = 48;

thread_local! {
    /// The fuzzer calls from one thread. The server stays: to start one takes longer than a session does.
    static WORLD: RefCell<Option<World>> = const { RefCell::new(None) };
}

fuzz_target!(|data: &[u8]| -> Corpus {
    WORLD.with_borrow_mut(|world| {
        let world = world.get_or_insert_with(World::new);
        match session(world, &mut Unstructured::new(data)) {
            Ok(()) => Corpus::Keep,
            Err(_) => Corpus::Reject,
        }
    })
});

fn session(world: &mut World, input: &mut Unstructured<'_>) -> Result<()> {
    let first: u8 = input.arbitrary()?;
    let disk = if first & 1 == 0 { Disk::Null } else { Disk::ReadOnly };
    let (handshake, recovers) = (first & 0x0e != 0, first & 0x30 == 0);
    world.memory.clear();
    let mut peer = Peer::connect(&world.socket(disk));
    let mut guest = Guest::new(world.features(disk), world.msix_capability);
    if handshake {
        peer.version(&client::Client::proposal());
    }
    for _ in 0..MAX_STEPS {
        if input.is_empty() {
            break;
        }
        let step = Step::arbitrary(input)?;
        if std::env::var_os("SESSION_STEPS").is_some() {
            eprintln!("{step:?}");
        }
        guest.take(&step, &mut peer, world);
    }
    peer.in_step();
    if recovers && handshake {
        guest.recover(&mut peer, world);
    }
    match first >> 6 {
        1 => peer.half_a_message(),
        2 => guest.pull_the_rug(&mut peer, world),
        _ => {}
    }
    drop(peer);
    drop(guest);
    world.settle();
    world.nothing_is_left();
    Ok(())
}
