//! The atomics of [`wakeup`](super::wakeup): the standard library's, or loom's under `cfg(loom)`, so that the models
//! check the code that ships.

#[cfg(loom)]
pub(super) use loom::sync::atomic::{AtomicBool, Ordering, fence};
#[cfg(not(loom))]
pub(super) use std::sync::atomic::{AtomicBool, Ordering, fence};
