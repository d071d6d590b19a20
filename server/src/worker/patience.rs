//! How long a queue that has nothing to do keeps its worker awake.
//!
//! To be woken takes a sleeping worker tens of microseconds, many times what a request takes. To stay awake takes a
//! processor. An adaptive queue stays awake for a while that it learns: when a request comes soon after the worker fell
//! asleep, staying awake would have paid, and the while grows; when none comes for long, it was in vain, and the while shrinks,
//! soon to nothing. An idle device therefore costs nothing, and one request now and then costs no more than its own wake-up.
//!
//! All this is for a processor that nobody else wants. Where the worker offers it and somebody takes it, a guest's own
//! processor often, to sleep is better twice: the others get on, and who sleeps is woken when there is news, where who
//! stayed awake would wait for its turn. A queue that has found that hardly stays awake any more, for some wake-ups.
//!
//! A request has come when its kick was heard, not when the worker was awake at last: else the time that waking takes, which
//! is what staying awake would have saved, would speak against staying awake.

use std::time::{Duration, Instant};

use super::Round;
use crate::config::PollPolicy;

/// The longest while: some times what it takes to wake a thread and for that thread to answer.
const LONGEST: Duration = Duration::from_micros(200);
/// The shortest while that is worth it.
const SHORTEST: Duration = Duration::from_micros(4);
/// From then on the processor is offered to whoever else may need it.
const SELFISH: Duration = Duration::from_micros(20);
/// To offer the processor takes less than this if nobody takes it.
const TAKEN: Duration = Duration::from_micros(10);
/// Wake-ups for which a queue then stays awake no longer than the shortest while.
const SHY: u32 = 64;
/// Rounds without work after which a queue is set aside while others have work.
const QUIET_ROUNDS: u32 = 1000;

/// One queue's while.
#[derive(Debug)]
pub(super) struct Patience {
    policy: PollPolicy,
    /// How long to stay awake.
    window: Duration,
    /// Since when the queue has had nothing to do, if its worker has slept since.
    slept: Option<Instant>,
    /// When a kick came.
    kicked: Option<Instant>,
    quiet_rounds: u32,
    /// For how many wake-ups more the shortest while is the longest.
    shy: u32,
}

impl Patience {
    pub(super) fn new(policy: PollPolicy) -> Self {
        Self { policy, window: Duration::ZERO, slept: None, kicked: None, quiet_rounds: 0, shy: 0 }
    }

    /// Whether to stay awake after having had nothing to do for `idle`.
    pub(super) fn lasts(&self, idle: Duration) -> bool {
        match self.policy {
            PollPolicy::Always => true,
            PollPolicy::Adaptive => idle < self.window,
            PollPolicy::Never => false,
        }
    }

    /// Takes note of a round; says whether the queue has been quiet for long.
    #[inline]
    pub(super) fn after(&mut self, round: Round) -> bool {
        match round {
            Round::Nothing => self.quiet_rounds = self.quiet_rounds.saturating_add(1),
            Round::Progress => {
                self.quiet_rounds = 0;
                if let Some(since) = self.slept.take() {
                    let news = self.kicked.take().unwrap_or_else(Instant::now);
                    self.learn(news.saturating_duration_since(since));
                }
            }
        }
        self.is_over()
    }

    /// Whether the queue has been quiet for long, by rounds.
    pub(super) fn is_over(&self) -> bool {
        self.quiet_rounds >= QUIET_ROUNDS && self.policy != PollPolicy::Always
    }

    /// The driver has kicked.
    pub(super) fn kicked(&mut self, at: Instant) {
        self.kicked.get_or_insert(at);
    }

    /// The worker falls asleep; there has been nothing to do since then.
    pub(super) fn sleeps(&mut self, since: Instant) {
        if self.slept.is_none() {
            self.slept = Some(since);
            self.kicked = None;
        }
    }

    /// The processor was offered, and somebody took it.
    pub(super) fn in_the_way(&mut self) {
        self.window = self.window.min(SHORTEST);
        self.shy = SHY;
    }

    /// `gap` went by between two requests, and the worker slept in it.
    fn learn(&mut self, gap: Duration) {
        self.window = if gap <= LONGEST {
            (gap * 2).clamp(SHORTEST, LONGEST)
        } else {
            // In vain: half of it, and nothing in place of next to nothing.
            Some(self.window / 2).filter(|window| *window >= SHORTEST).unwrap_or_default()
        };
        if let Some(left) = self.shy.checked_sub(1) {
            self.shy = left;
            self.window = self.window.min(SHORTEST);
        }
    }
}

/// One turn of waiting at `now`, after `idle`. Says whether somebody else had the processor meanwhile.
#[inline]
pub(super) fn spin(now: Instant, idle: Duration) -> bool {
    if idle < SELFISH {
        std::hint::spin_loop();
        return false;
    }
    std::thread::yield_now();
    now.elapsed() > TAKEN
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_grows_with_requests_that_come_soon_and_shrinks_to_nothing_without() {
        let mut patience = Patience::new(PollPolicy::Adaptive);
        assert!(!patience.lasts(Duration::ZERO), "nothing is known to pay yet");
        patience.learn(Duration::from_micros(30));
        assert!(patience.lasts(Duration::from_micros(50)));
        assert!(!patience.lasts(Duration::from_micros(60)));
        patience.learn(LONGEST);
        assert!(!patience.lasts(LONGEST), "never longer than that");
        for _ in 0..6 {
            patience.learn(Duration::from_millis(1));
        }
        assert!(!patience.lasts(Duration::ZERO));
    }

    #[test]
    fn a_request_has_come_when_its_kick_did() {
        let mut patience = Patience::new(PollPolicy::Adaptive);
        let long_ago = Instant::now() - Duration::from_secs(1);
        patience.sleeps(long_ago);
        patience.kicked(long_ago + Duration::from_micros(30));
        patience.after(Round::Progress);
        assert!(patience.lasts(Duration::from_micros(50)), "however long the worker took to wake up");
        patience.sleeps(long_ago);
        patience.after(Round::Progress);
        assert!(!patience.lasts(Duration::from_micros(50)), "that kick was another request's");
    }

    #[test]
    fn it_does_not_stay_awake_where_it_was_in_the_way() {
        let mut patience = Patience::new(PollPolicy::Adaptive);
        patience.learn(LONGEST);
        patience.in_the_way();
        for _ in 0..SHY {
            assert!(!patience.lasts(SHORTEST));
            patience.learn(Duration::from_micros(30));
        }
        assert!(!patience.lasts(SHORTEST));
        patience.learn(Duration::from_micros(30));
        assert!(patience.lasts(Duration::from_micros(50)), "it tries again");
    }

    #[test]
    fn the_other_policies_learn_nothing() {
        let (mut always, mut never) = (Patience::new(PollPolicy::Always), Patience::new(PollPolicy::Never));
        always.learn(Duration::from_secs(1));
        never.learn(Duration::from_micros(1));
        always.in_the_way();
        assert!(always.lasts(Duration::from_secs(60)));
        assert!(!never.lasts(Duration::ZERO));
    }

    #[test]
    fn a_quiet_queue_is_set_aside_unless_it_always_polls() {
        for (policy, set_aside) in [(PollPolicy::Adaptive, true), (PollPolicy::Always, false)] {
            let mut patience = Patience::new(policy);
            let mut over = false;
            for _ in 0..QUIET_ROUNDS {
                over = patience.after(Round::Nothing);
            }
            assert_eq!(over, set_aside);
            assert!(!patience.after(Round::Progress));
        }
    }
}
