//! Tells on standard error what is going on: a moving bar on a terminal, plain lines elsewhere.

use std::borrow::Cow;
use std::io::{IsTerminal, stderr};
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};

/// Where steps are shown.
#[derive(Debug, Clone, Copy)]
pub struct Progress {
    output: Output,
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Output {
    Bars,
    Lines,
    Nothing,
}

impl Progress {
    /// Bars if standard error is a terminal, a line at the start and at the end of each step if not.
    #[must_use]
    pub fn stderr() -> Self {
        let output = if stderr().is_terminal() { Output::Bars } else { Output::Lines };
        Self { output }
    }

    /// Shows nothing.
    #[must_use]
    pub fn silent() -> Self {
        Self { output: Output::Nothing }
    }

    /// Begins a step. A step that is dropped before [`Step::done`] has failed, and leaves the telling to the error.
    #[must_use]
    pub fn step(&self, title: impl Into<Cow<'static, str>>) -> Step {
        let title = title.into();
        let bar = match self.output {
            Output::Bars => ProgressBar::new(0).with_style(spinner()).with_message(title.clone()),
            Output::Lines | Output::Nothing => ProgressBar::hidden(),
        };
        bar.enable_steady_tick(Duration::from_millis(100));
        if self.output == Output::Lines {
            eprintln!("{title} ...");
        }
        Step { output: self.output, title, bar }
    }
}

/// One piece of work that takes long enough to be shown.
#[derive(Debug)]
pub struct Step {
    output: Output,
    title: Cow<'static, str>,
    bar: ProgressBar,
}

impl Step {
    /// `done` of `total` pieces of the work are finished.
    pub fn advance(&self, done: u64, total: u64) {
        if self.bar.length() != Some(total) {
            self.bar.set_length(total);
            self.bar.set_style(bar());
        }
        self.bar.set_position(done);
    }

    /// Shows `text` beside the title while it is the latest news.
    pub fn note(&self, text: &str) {
        self.bar.set_message(format!("{}: {text}", self.title));
    }

    /// The step has ended well, with this result.
    pub fn done(self, result: &str) {
        self.bar.finish_and_clear();
        if self.output != Output::Nothing {
            eprintln!("{}: {result}", self.title);
        }
    }
}

impl Drop for Step {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}

fn spinner() -> ProgressStyle {
    ProgressStyle::with_template("{spinner} {msg} [{elapsed}]").unwrap_or_else(|_| ProgressStyle::default_spinner())
}

fn bar() -> ProgressStyle {
    ProgressStyle::with_template("{spinner} {msg} {wide_bar} {percent}%")
        .unwrap_or_else(|_| ProgressStyle::default_bar())
}
