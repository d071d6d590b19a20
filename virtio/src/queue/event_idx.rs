//! The event index (virtio 1.3 §2.7.7.2, §2.7.10).

/// Whether a side that moves its index from `old` to `new` passes `event`, the index behind which the other side
/// wants to hear of it: whether entry `event` is among the entries `old..new`.
///
/// All three count modulo 2^16; `old` is the index at the last decision, whatever that was. `old == new` passes nothing:
/// a move by exactly 2^16 cannot be told from none, which is why decisions come at least once a queue's size.
#[inline(always)]
pub fn passed(event: u16, new: u16, old: u16) -> bool {
    new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
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
