//! Turns of some milliseconds: what is compared is measured side by side, as what else a machine does, and where its host
//! lets it run, changes within tenths of a second.

use std::time::Duration;

use anyhow::Result;

/// A measurement, and what comes right before it and does not count.
#[derive(Debug, Clone, Copy)]
pub(super) struct Turn {
    pub(super) warm_up: Duration,
    pub(super) length: Duration,
}

impl Turn {
    /// One of many. The warm-up is for a server that slept, or was stopped, while others had their turns.
    pub(super) const SHORT: Self = Self { warm_up: Duration::from_millis(2), length: Duration::from_millis(8) };

    /// The only one: caches fill before it, and policies learn.
    pub(super) fn whole(length: Duration) -> Self {
        Self { warm_up: Duration::from_millis(100), length }
    }
}

/// Who has turns.
pub(super) trait Contender {
    /// Takes a turn: a rate, or a time. Between turns it takes no processor.
    fn turn(&mut self, turn: Turn) -> Result<f64>;

    /// There are no more turns.
    fn leave(self: Box<Self>) -> Result<()>;
}

/// What needs nothing between its turns.
impl<F: FnMut(Turn) -> Result<f64>> Contender for F {
    fn turn(&mut self, turn: Turn) -> Result<f64> {
        self(turn)
    }

    fn leave(self: Box<Self>) -> Result<()> {
        Ok(())
    }
}

/// Gives each as many short turns, one after the other and then back again; the values of each, in the order of the turns.
pub(super) fn take(contenders: &mut [Box<dyn Contender + '_>], turns: usize) -> Result<Vec<Vec<f64>>> {
    let mut values = vec![Vec::with_capacity(turns); contenders.len()];
    for turn in 0..turns {
        let mut order: Vec<_> = contenders.iter_mut().zip(&mut values).collect();
        if turn % 2 == 1 {
            order.reverse();
        }
        for (contender, values) in order {
            values.push(contender.turn(Turn::SHORT)?);
        }
    }
    Ok(values)
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use super::*;

    #[test]
    fn the_order_turns_round_and_the_values_stay_with_their_contender() {
        let order = RefCell::new(Vec::new());
        let contender = |name: u8| {
            let order = &order;
            move |_: Turn| {
                order.borrow_mut().push(name);
                Ok(f64::from(name))
            }
        };
        let mut contenders: Vec<Box<dyn Contender + '_>> = vec![Box::new(contender(1)), Box::new(contender(2))];
        assert_eq!(take(&mut contenders, 3).unwrap(), [[1.0; 3], [2.0; 3]]);
        assert_eq!(*order.borrow(), [1, 2, 2, 1, 1, 2]);
    }
}
