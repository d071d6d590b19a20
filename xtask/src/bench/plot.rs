//! Bars, as SVG.

use std::fmt::Write;

/// One bar: its label, and its values of all rounds.
pub(super) struct Row {
    pub(super) label: String,
    pub(super) median: f64,
    pub(super) lowest: f64,
    pub(super) highest: f64,
    /// Whether it is ours, and not a peer's.
    pub(super) ours: bool,
}

const WIDTH: f64 = 760.0;
const LABELS: f64 = 300.0;
const VALUES: f64 = 90.0;
const HEAD: f64 = 44.0;
const ROW: f64 = 26.0;
const BAR: f64 = 16.0;

/// A plot of horizontal bars from zero, each with the range of its values; `show` writes a value.
pub(super) fn bars(title: &str, rows: &[Row], show: impl Fn(f64) -> String) -> String {
    let height = HEAD + ROW * rows.len() as f64 + 10.0;
    let most = rows.iter().map(|row| row.highest).fold(f64::MIN_POSITIVE, f64::max);
    let scale = (WIDTH - LABELS - VALUES) / most;
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" font-family=\"sans-serif\" \
         font-size=\"13\">\n<rect width=\"100%\" height=\"100%\" fill=\"#ffffff\"/>\n\
         <text x=\"12\" y=\"26\" font-size=\"15\" font-weight=\"bold\" fill=\"#222222\">{}</text>\n",
        escaped(title)
    );
    for (index, row) in rows.iter().enumerate() {
        let top = HEAD + ROW * index as f64;
        let (middle, baseline) = (top + BAR / 2.0, top + BAR - 3.5);
        let (length, low, high) = (row.median * scale, LABELS + row.lowest * scale, LABELS + row.highest * scale);
        let colour = if row.ours { "#1f6fb2" } else { "#9aa5b1" };
        // Writing to a String cannot fail.
        let _infallible = write!(
            svg,
            "<text x=\"{:.1}\" y=\"{baseline:.1}\" text-anchor=\"end\" fill=\"#222222\">{}</text>\n\
             <rect x=\"{LABELS}\" y=\"{top:.1}\" width=\"{length:.1}\" height=\"{BAR}\" fill=\"{colour}\"/>\n\
             <line x1=\"{low:.1}\" y1=\"{middle:.1}\" x2=\"{high:.1}\" y2=\"{middle:.1}\" stroke=\"#222222\"/>\n\
             <text x=\"{:.1}\" y=\"{baseline:.1}\" fill=\"#222222\">{}</text>\n",
            LABELS - 8.0,
            escaped(&row.label),
            high.max(LABELS + length) + 8.0,
            escaped(&show(row.median))
        );
    }
    svg.push_str("</svg>\n");
    svg
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_bar_ends_where_the_values_begin_and_text_is_escaped() {
        let row = |label: &str, median: f64| Row {
            label: label.to_owned(),
            median,
            lowest: median,
            highest: median,
            ours: true,
        };
        let svg = bars("a & b", &[row("<one>", 10.0), row("two", 5.0)], |value| value.to_string());
        assert!(svg.contains("a &amp; b") && svg.contains("&lt;one&gt;"));
        assert!(svg.contains(&format!("width=\"{:.1}\"", WIDTH - LABELS - VALUES)));
        assert!(svg.contains(&format!("width=\"{:.1}\"", (WIDTH - LABELS - VALUES) / 2.0)));
    }
}
