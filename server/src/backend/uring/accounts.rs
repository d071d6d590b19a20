//! Who has what in the kernel: the clients of a ring, and their completions.

use std::any::Any;
use std::mem;

/// A completion of the kernel's, for a client's slot.
#[derive(Clone, Copy, Debug)]
pub(super) struct Landing {
    pub(super) slot: u16,
    pub(super) result: i32,
}

/// What one client has in the kernel and has got from it.
#[derive(Default)]
struct Account {
    taken: bool,
    /// Entries without completion.
    in_kernel: u32,
    landed: Vec<Landing>,
    /// What the entries lead to, once the client is gone.
    orphan: Option<Box<dyn Any>>,
}

/// What became of clients that were dropped before, to be dropped by the caller when the ring is free again.
pub(super) type Over = Vec<Box<dyn Any>>;

/// The clients of a ring.
pub(super) struct Accounts {
    accounts: Vec<Account>,
    /// Operations that may still make completions.
    operations: u32,
    limit: u32,
    /// Completions that lie in the accounts.
    landed: usize,
}

impl Accounts {
    /// No clients yet; so many operations at a time for all of them together.
    pub(super) fn new(limit: u32) -> Self {
        Self { accounts: Vec::new(), operations: 0, limit, landed: 0 }
    }

    /// A new client's number.
    pub(super) fn open(&mut self) -> u32 {
        let client = self.accounts.iter().position(|account| !account.taken).unwrap_or_else(|| {
            self.accounts.push(Account::default());
            self.accounts.len() - 1
        });
        if let Some(account) = self.accounts.get_mut(client) {
            account.taken = true;
        }
        client as u32
    }

    /// Ends a client that holds `operations` operations. What its entries lead to lies in `held`, which comes back if
    /// the kernel has none of them.
    pub(super) fn close(&mut self, client: u32, operations: u32, held: Box<dyn Any>) -> Option<Box<dyn Any>> {
        let Some(account) = self.accounts.get_mut(client as usize) else {
            return Some(held);
        };
        self.landed -= account.landed.len();
        account.landed.clear();
        self.operations -= operations - account.in_kernel;
        if account.in_kernel == 0 {
            account.taken = false;
            return Some(held);
        }
        account.orphan = Some(held);
        None
    }

    /// Makes room for an operation, if there is any.
    pub(super) fn begin(&mut self) -> bool {
        let room = self.operations < self.limit;
        self.operations += u32::from(room);
        room
    }

    /// Gives an operation's room back.
    pub(super) fn end(&mut self) {
        self.operations -= 1;
    }

    /// An entry goes to the kernel; whether there is such a client.
    pub(super) fn depart(&mut self, client: u32) -> bool {
        let account = self.accounts.get_mut(client as usize);
        account.map(|account| account.in_kernel += 1).is_some()
    }

    /// An entry has completed.
    pub(super) fn land(&mut self, client: u32, landing: Landing, over: &mut Over) {
        let Some(account) = self.accounts.get_mut(client as usize) else { return };
        account.in_kernel -= 1;
        if account.orphan.is_none() {
            account.landed.push(landing);
            self.landed += 1;
            return;
        }
        self.operations -= 1;
        if account.in_kernel == 0 {
            over.extend(account.orphan.take());
            account.taken = false;
        }
    }

    /// Whether completions lie here for a client to take.
    pub(super) fn any_landed(&self) -> bool {
        self.landed > 0
    }

    /// Exchanges `landed`, which is empty, for a client's completions.
    pub(super) fn take(&mut self, client: u32, landed: &mut Vec<Landing>) {
        if let Some(account) = self.accounts.get_mut(client as usize) {
            self.landed -= account.landed.len();
            mem::swap(&mut account.landed, landed);
        }
    }

    /// Whether the kernel has entries of clients that are gone.
    pub(super) fn has_orphans(&self) -> bool {
        self.accounts.iter().any(|account| account.orphan.is_some())
    }

    /// What those entries lead to.
    pub(super) fn orphans(&mut self) -> impl Iterator<Item = Box<dyn Any>> {
        self.accounts.iter_mut().filter_map(|account| account.orphan.take())
    }

    /// Operations that may still make completions, and how many there may be.
    pub(super) fn operations(&self) -> (u32, u32) {
        (self.operations, self.limit)
    }
}
