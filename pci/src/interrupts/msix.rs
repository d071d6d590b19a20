//! MSI-X: the vectors, the table, the Pending Bit Array and the message control.
//!
//! A vector's line is in force unless something masks it: MSI-X not in use, the function mask, the
//! client, or the mask bit in the vector's table entry. A client such as QEMU emulates
//! table and capability itself and only installs lines, so what it never wrote here cannot count:
//! a table entry masks only once it was written, and an installed line puts MSI-X in use without the
//! enable bit.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::slot::Line;
use super::vector::Vector;
use crate::state::MsixEntryState;
use crate::sync::{AtomicBool, Ordering};

/// The length of a table entry in bytes.
pub(crate) const ENTRY: usize = 16;

/// The writable bits of an entry: the message address (a multiple of 4), its upper half, the
/// message data, and the mask bit of the vector control.
pub(crate) const ENTRY_WRITABLE: [u8; ENTRY] =
    [0xfc, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 1, 0, 0, 0];

/// Where the mask bit is: the first byte of the vector control.
const VECTOR_CONTROL: usize = 12;
const MASK_BIT: u8 = 1;

#[derive(Clone)]
struct Entry {
    registers: [u8; ENTRY],
    /// The client wrote this entry, so its mask bit means something.
    written: bool,
    /// Masked through `mask`.
    masked: bool,
    line: Option<Arc<Line>>,
}

impl Entry {
    /// An entry comes out of reset masked.
    fn reset_registers() -> [u8; ENTRY] {
        let mut registers = [0; ENTRY];
        registers[VECTOR_CONTROL] = MASK_BIT;
        registers
    }

    fn new() -> Entry {
        Entry { registers: Self::reset_registers(), written: false, masked: false, line: None }
    }

    fn is_masked(&self) -> bool {
        self.masked || (self.written && self.registers[VECTOR_CONTROL] & MASK_BIT != 0)
    }
}

/// What decides which lines are in force. Only the session's side takes its lock.
struct Control {
    enabled: bool,
    function_mask: bool,
    /// A line was installed since MSI-X was last disabled, by the client or by the enable bit.
    armed: bool,
    entries: Vec<Entry>,
}

impl Control {
    fn in_use(&self) -> bool {
        self.enabled || self.armed
    }
}

pub(crate) struct Msix {
    vectors: Vec<Vector>,
    /// A copy of `Control::in_use` for the data path.
    in_use: AtomicBool,
    control: Mutex<Control>,
}

impl Msix {
    pub(crate) fn new(vectors: u16) -> Msix {
        let control = Control {
            enabled: false,
            function_mask: false,
            armed: false,
            entries: vec![Entry::new(); usize::from(vectors)],
        };
        Msix {
            vectors: (0..vectors).map(|_| Vector::new()).collect(),
            in_use: AtomicBool::new(false),
            control: Mutex::new(control),
        }
    }

    pub(crate) fn count(&self) -> usize {
        self.vectors.len()
    }

    pub(crate) fn in_use(&self) -> bool {
        self.in_use.load(Ordering::Acquire)
    }

    /// Signals a vector; one that does not exist is ignored.
    pub(crate) fn signal(&self, vector: usize) {
        if let Some(vector) = self.vectors.get(vector) {
            vector.signal();
        }
    }

    /// Follows the message control register. Clearing the enable bit ends what `install` armed.
    pub(crate) fn set_control(&self, enabled: bool, function_mask: bool) {
        let mut control = self.lock();
        if control.enabled && !enabled {
            control.armed = false;
        }
        control.enabled = enabled;
        control.function_mask = function_mask;
        self.refresh_all(&control);
    }

    pub(crate) fn has_line(&self, vector: usize) -> bool {
        self.lock().entries.get(vector).is_some_and(|entry| entry.line.is_some())
    }

    pub(crate) fn install(&self, vector: usize, line: Option<Arc<Line>>) {
        let mut control = self.lock();
        let arms = line.is_some() && !control.in_use();
        control.armed |= line.is_some();
        if let Some(entry) = control.entries.get_mut(vector) {
            entry.line = line;
        }
        if arms {
            self.refresh_all(&control);
        } else {
            self.refresh(&control, vector);
        }
    }

    pub(crate) fn set_masked(&self, vector: usize, masked: bool) {
        let mut control = self.lock();
        if let Some(entry) = control.entries.get_mut(vector) {
            entry.masked = masked;
        }
        self.refresh(&control, vector);
    }

    /// Removes every line and every mask of the client's. MSI-X goes out of use unless its enable
    /// bit is set or `keep_armed`: then interrupts become pending until lines are installed again.
    pub(crate) fn remove_lines(&self, keep_armed: bool) {
        let mut control = self.lock();
        control.armed &= keep_armed;
        for entry in &mut control.entries {
            entry.line = None;
            entry.masked = false;
        }
        self.refresh_all(&control);
    }

    /// Clears every pending bit.
    pub(crate) fn clear_pending(&self) {
        for vector in &self.vectors {
            vector.set_pending(false);
        }
    }

    /// Returns table, message control and pending bits to their reset values.
    pub(crate) fn reset(&self) {
        let mut control = self.lock();
        control.enabled = false;
        control.function_mask = false;
        control.armed = control.entries.iter().any(|entry| entry.line.is_some());
        for entry in &mut control.entries {
            entry.registers = Entry::reset_registers();
            entry.written = false;
        }
        self.clear_pending();
        self.refresh_all(&control);
    }

    pub(crate) fn read_table(&self, offset: usize, data: &mut [u8]) {
        let control = self.lock();
        for (at, byte) in (offset..).zip(data) {
            *byte =
                control.entries.get(at / ENTRY).and_then(|entry| entry.registers.get(at % ENTRY)).copied().unwrap_or(0);
        }
    }

    pub(crate) fn write_table(&self, offset: usize, data: &[u8]) {
        let mut control = self.lock();
        for (at, byte) in (offset..).zip(data) {
            if let Some(entry) = control.entries.get_mut(at / ENTRY)
                && let Some((register, writable)) = entry.registers.iter_mut().zip(ENTRY_WRITABLE).nth(at % ENTRY)
            {
                *register = (*register & !writable) | (byte & writable);
                entry.written = true;
            }
        }
        let end = offset.saturating_add(data.len()).div_ceil(ENTRY).min(self.count());
        for vector in offset / ENTRY..end {
            self.refresh(&control, vector);
        }
    }

    /// Reads the Pending Bit Array: vector `n` is bit `n % 8` of byte `n / 8`.
    pub(crate) fn read_pba(&self, offset: usize, data: &mut [u8]) {
        for (at, byte) in (offset..).zip(data) {
            let vectors = self.vectors.chunks(8).nth(at).unwrap_or_default();
            *byte = (0..8).zip(vectors).fold(0, |bits, (bit, vector)| bits | (u8::from(vector.is_pending()) << bit));
        }
    }

    pub(crate) fn export(&self) -> (bool, Vec<MsixEntryState>) {
        let control = self.lock();
        let entries = control.entries.iter().zip(&self.vectors);
        let entries = entries.map(|(entry, vector)| MsixEntryState {
            registers: entry.registers,
            written: entry.written,
            pending: vector.is_pending(),
        });
        (control.armed, entries.collect())
    }

    /// Takes over a state that was checked: as many entries as vectors, no reserved bit set.
    pub(crate) fn import(&self, armed: bool, entries: &[MsixEntryState]) {
        let mut control = self.lock();
        control.armed = armed || control.entries.iter().any(|entry| entry.line.is_some());
        for ((entry, vector), state) in control.entries.iter_mut().zip(&self.vectors).zip(entries) {
            entry.registers = state.registers;
            entry.written = state.written;
            vector.set_pending(state.pending);
        }
        self.refresh_all(&control);
    }

    fn refresh_all(&self, control: &Control) {
        self.in_use.store(control.in_use(), Ordering::Release);
        for vector in 0..self.count() {
            self.refresh(control, vector);
        }
    }

    /// Puts the line in force into the vector's slot. The lock that `control` comes from keeps the
    /// calls to `Vector::install` apart.
    fn refresh(&self, control: &Control, vector: usize) {
        if let (Some(entry), Some(vector)) = (control.entries.get(vector), self.vectors.get(vector)) {
            let masked = !control.in_use() || control.function_mask || entry.is_masked();
            vector.install(entry.line.clone().filter(|_| !masked));
        }
    }

    /// The state behind the lock is whole after every statement, so that a panic elsewhere in the
    /// session, which poisons the lock, leaves nothing to repair.
    fn lock(&self) -> MutexGuard<'_, Control> {
        self.control.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
