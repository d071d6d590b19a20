//! The event index (virtio 1.3 §2.7.7.2, §2.7.10, §2.8.10).

use super::Position;

/// Whether a side that moves its index from `old` to `new` passes `event`, the index behind which the other side
/// wants to hear of it: whether entry `event` is among the entries `old..new`.
///
/// All three count modulo 2^16; `old` is the index at the last decision, whatever that was. `old == new` passes nothing:
/// a move by exactly 2^16 cannot be told from none, which is why decisions come at least once a queue's size.
#[inline(always)]
pub fn passed(event: u16, new: u16, old: u16) -> bool {
    new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
}

/// The same for a packed ring of `size` descriptors: whether a side that moves from `old` to `new`, at most the whole ring
/// further, passes `event`. An `event` outside the ring is passed by nobody.
#[inline(always)]
pub fn passed_in_ring(event: Position, new: Position, old: Position, size: u16) -> bool {
    let size = u32::from(size);
    // Two turns of the ring, one a value of the wrap counter, are all the positions that there are.
    let turns = size.wrapping_mul(2);
    let place = |position: Position| u32::from(position.index()).wrapping_add(if position.wrap() { 0 } else { size });
    let steps_to = |position: Position| {
        let steps = place(position).wrapping_add(turns).wrapping_sub(place(old));
        if steps < turns { steps } else { steps.wrapping_sub(turns) }
    };
    u32::from(event.index()) < size && steps_to(event) < steps_to(new)
}

#[cfg(test)]
mod tests {
    use super::passed;

    #[test]
    fn an_entry_is_passed_when_the_index_moves_beyond_it() {
        assert!(!passed(0, 0, 0));
        assert!(passed(0, 1, 0));
        assert!(!passed(1, 1, 0));
        assert!(passed(1, 2, 0));
        assert!(!passed(0, 2, 1));
        assert!(passed(0xffff, 0, 0xffff), "over the wrap");
        assert!(passed(3, 5, 0xfff0));
        assert!(!passed(6, 5, 0xfff0));
    }
}
