//! The terminal: what is drawn, and what keys do.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use anyhow::{Context, Result};
use ratatui::Frame;
use ratatui::crossterm::event::{self, Event, KeyCode, KeyEvent, KeyEventKind, KeyModifiers};
use ratatui::layout::{Constraint, Layout, Rect};
use ratatui::style::{Modifier, Style};
use ratatui::text::Line;
use ratatui::widgets::{Cell, Table, TableState};
use vfio_user_blk::config::{SortBy, TopArgs};
use vfio_user_blk::control::{ControlClient, Snapshot};

use super::rates::{self, Row};
use super::{NAP, look, table};

const HELP: &str = "q ends  up/down selects  s sorts by the next, S by the one before  u shows queues";

/// What `s` goes through.
const SORTS: [(SortBy, &str); 6] = [
    (SortBy::None, "none"),
    (SortBy::Iops, "IOPS"),
    (SortBy::Bandwidth, "bandwidth"),
    (SortBy::Depth, "depth"),
    (SortBy::Latency, "store p99"),
    (SortBy::Errors, "errors"),
];

/// The terminal as it was is given back when this goes; a panic does so, too.
struct Screen(ratatui::DefaultTerminal);

impl Screen {
    fn new() -> Result<Self> {
        match ratatui::try_init() {
            Ok(terminal) => Ok(Self(terminal)),
            Err(error) => {
                ratatui::restore();
                Err(error).context("the terminal cannot be drawn on; use --once or --batch")
            }
        }
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        ratatui::restore();
    }
}

/// What is shown.
#[derive(Default)]
struct View {
    before: Snapshot,
    now: Snapshot,
    sort: SortBy,
    queues: bool,
    selected: usize,
}

/// Draws, and looks at the server again each interval, until a key or a signal ends it.
pub(super) fn run(server: &mut ControlClient, arguments: &TopArgs, ended: &AtomicBool) -> Result<()> {
    let now = look(server)?;
    let mut view = View { before: now.clone(), now, sort: arguments.sort, queues: arguments.queues, ..View::default() };
    let mut screen = Screen::new()?;
    let mut next = Instant::now() + arguments.interval;
    while !ended.load(Ordering::Relaxed) {
        screen.0.draw(|frame| view.draw(frame)).context("cannot draw")?;
        loop {
            let left = next.saturating_duration_since(Instant::now());
            if left.is_zero() {
                let now = look(server)?;
                view.before = std::mem::replace(&mut view.now, now);
                next = Instant::now() + arguments.interval;
                break;
            }
            if event::poll(left.min(NAP)).context("cannot read keys")? {
                match event::read().context("cannot read keys")? {
                    Event::Key(key) if view.press(key) == Pressed::End => return Ok(()),
                    _ => break,
                }
            }
            if ended.load(Ordering::Relaxed) {
                break;
            }
        }
    }
    Ok(())
}

#[derive(Debug, PartialEq, Eq)]
enum Pressed {
    GoOn,
    End,
}

impl View {
    fn rows(&self) -> Vec<Row> {
        rates::rows(&self.before, &self.now, self.sort, self.queues)
    }

    fn press(&mut self, key: KeyEvent) -> Pressed {
        if key.kind == KeyEventKind::Release {
            return Pressed::GoOn;
        }
        let last = self.rows().len().saturating_sub(1);
        let sort = SORTS.iter().position(|(sort, _)| *sort == self.sort).unwrap_or(0);
        let by = |number: usize| SORTS.get(number % SORTS.len()).map_or(SortBy::None, |(sort, _)| *sort);
        match key.code {
            KeyCode::Char('c') if key.modifiers.contains(KeyModifiers::CONTROL) => return Pressed::End,
            KeyCode::Char('q') | KeyCode::Esc => return Pressed::End,
            KeyCode::Up | KeyCode::Char('k') => self.selected = self.selected.saturating_sub(1),
            KeyCode::Down | KeyCode::Char('j') => self.selected = self.selected.saturating_add(1),
            KeyCode::PageUp => self.selected = self.selected.saturating_sub(20),
            KeyCode::PageDown => self.selected = self.selected.saturating_add(20),
            KeyCode::Home => self.selected = 0,
            KeyCode::End => self.selected = last,
            KeyCode::Char('s') => self.sort = by(sort + 1),
            KeyCode::Char('S') => self.sort = by(sort + SORTS.len() - 1),
            KeyCode::Char('u') => self.queues = !self.queues,
            _ => {}
        }
        self.selected = self.selected.min(self.rows().len().saturating_sub(1));
        Pressed::GoOn
    }

    fn draw(&mut self, frame: &mut Frame<'_>) {
        let [title, body, foot] =
            Layout::vertical([Constraint::Length(1), Constraint::Min(0), Constraint::Length(1)]).areas(frame.area());
        let rows = self.rows();
        self.selected = self.selected.min(rows.len().saturating_sub(1));
        let devices = || rows.iter().filter(|row| !row.is_queue);
        // A sum of nothing is -0 in Rust.
        let iops = devices().fold(0.0, |sum, row| sum + row.iops);
        let sort = SORTS.iter().find(|(sort, _)| *sort == self.sort).map_or("", |(_, name)| name);
        let count = devices().count();
        let s = if count == 1 { "" } else { "s" };
        frame.render_widget(
            Line::from(format!("{count} device{s}, {iops:.0} requests a second; sorted by {sort}")),
            title,
        );
        frame.render_widget(Line::from(HELP).style(Modifier::DIM), foot);
        draw_table(frame, body, &rows, self.selected);
    }
}

fn draw_table(frame: &mut Frame<'_>, area: Rect, rows: &[Row], selected: usize) {
    let widths = table::COLUMNS.iter().map(|(_, width, _)| match width {
        0 => Constraint::Min(16),
        width => Constraint::Length(*width),
    });
    let titles = ratatui::widgets::Row::new(table::COLUMNS.iter().map(|(title, ..)| *title)).style(Modifier::BOLD);
    let lines = rows.iter().map(|row| {
        let style = if row.errors > 0.0 { Style::new().red() } else { Style::new() };
        ratatui::widgets::Row::new(table::COLUMNS.iter().map(|(.., cell)| Cell::from(cell(row)))).style(style)
    });
    let drawn = Table::new(lines, widths).header(titles).row_highlight_style(Modifier::REVERSED);
    let mut state = TableState::new().with_selected(Some(selected));
    frame.render_stateful_widget(drawn, area, &mut state);
}

#[cfg(test)]
mod tests {
    use ratatui::Terminal;
    use ratatui::backend::TestBackend;

    use super::*;
    use crate::top::rates::tests::two;

    fn view() -> View {
        let (before, now) = two();
        View { before, now, ..View::default() }
    }

    /// The lines that are drawn, and which of them is shown as selected.
    fn drawn(view: &mut View, width: u16, height: u16) -> (Vec<String>, Option<usize>) {
        let mut terminal = Terminal::new(TestBackend::new(width, height)).unwrap();
        terminal.draw(|frame| view.draw(frame)).unwrap();
        let buffer = terminal.backend().buffer();
        let cells = |y| (0..width).map(move |x| &buffer[(x, y)]);
        let lines = (0..height).map(|y| cells(y).map(|cell| cell.symbol()).collect());
        let selected = (0..height).position(|y| cells(y).all(|cell| cell.modifier.contains(Modifier::REVERSED)));
        (lines.collect(), selected)
    }

    fn press(view: &mut View, code: KeyCode) -> Pressed {
        view.press(KeyEvent::new(code, KeyModifiers::NONE))
    }

    #[test]
    fn a_screen_has_totals_rows_and_keys() {
        let mut view = view();
        let (lines, selected) = drawn(&mut view, 140, 8);
        assert!(lines[0].starts_with("2 devices, 8200 requests a second; sorted by none"), "{lines:#?}");
        assert!(lines[1].starts_with("DEVICE") && lines[1].contains("STORE p50"), "{lines:#?}");
        assert!(lines[2].starts_with("a ") && lines[2].contains("in use") && lines[2].contains(" 200 "), "{lines:#?}");
        assert!(lines[3].starts_with("b ") && lines[3].contains("8.0k"), "{lines:#?}");
        assert!(lines[7].starts_with("q ends"), "{lines:#?}");
        assert_eq!(selected, Some(2));
    }

    #[test]
    fn keys_select_sort_and_end() {
        let mut view = view();
        press(&mut view, KeyCode::Down);
        assert_eq!(drawn(&mut view, 140, 8).1, Some(3));
        press(&mut view, KeyCode::Down);
        assert_eq!(view.selected, 1, "there is no row below");
        press(&mut view, KeyCode::Char('s'));
        let (lines, _) = drawn(&mut view, 140, 8);
        assert!(lines[0].contains("sorted by IOPS") && lines[2].starts_with("b "), "{lines:#?}");
        press(&mut view, KeyCode::Char('S'));
        press(&mut view, KeyCode::Char('S'));
        assert_eq!(view.sort, SortBy::Errors);
        press(&mut view, KeyCode::Char('u'));
        press(&mut view, KeyCode::End);
        assert_eq!(view.selected, 5);
        assert!(drawn(&mut view, 140, 10).0[7].starts_with("  queue 1"));
        // Fewer rows take the selection along.
        press(&mut view, KeyCode::Char('u'));
        assert_eq!(view.selected, 1);
        assert_eq!(press(&mut view, KeyCode::Char('x')), Pressed::GoOn);
        assert_eq!(press(&mut view, KeyCode::Char('q')), Pressed::End);
        assert_eq!(view.press(KeyEvent::new(KeyCode::Char('c'), KeyModifiers::CONTROL)), Pressed::End);
    }

    #[test]
    fn what_is_selected_stays_in_sight_and_no_terminal_is_too_small() {
        let mut view = view();
        view.queues = true;
        press(&mut view, KeyCode::End);
        let (lines, selected) = drawn(&mut view, 140, 6);
        assert_eq!(selected, Some(4), "{lines:#?}");
        for (width, height) in [(1, 1), (3, 2), (20, 3), (80, 4)] {
            drawn(&mut view, width, height);
        }
        view.now.devices.clear();
        assert!(drawn(&mut view, 80, 5).0[0].starts_with("0 devices, 0 requests"));
    }
}
