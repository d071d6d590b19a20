//! The way into the sandbox for threads that are older than it is.

use std::sync::{Arc, OnceLock};

use super::{Sandbox, ThreadKind};

/// A sandbox that will be: stores are opened before there is one, and some of them start threads then.
#[derive(Clone, Debug, Default)]
pub(crate) struct Entrance(Arc<OnceLock<Sandbox>>);

impl Entrance {
    /// Lets in who waits.
    pub(crate) fn open(&self, sandbox: &Sandbox) {
        // Opened once.
        let _same = self.0.set(sandbox.clone());
    }

    /// Puts the calling thread in, as soon as there is a sandbox.
    pub(crate) fn enter_as(&self, kind: ThreadKind) {
        self.0.wait().enter_as(kind);
    }
}
