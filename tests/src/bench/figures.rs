//! Figures: what was asked, what was measured, and how both are shown. Measures nothing.

use std::fs::File;
use std::io::{self, Write};
use std::path::Path;

use serde_json::json;

/// One measured number.
#[derive(Debug, Clone, PartialEq)]
pub struct Figure {
    pub name: String,
    pub value: f64,
    pub unit: &'static str,
    /// The bound, in the same unit.
    pub asked: Option<f64>,
    /// Larger is better; otherwise smaller.
    pub more: bool,
}

impl Figure {
    pub fn asked(name: &str, value: f64, unit: &'static str, asked: f64) -> Self {
        Self { name: name.to_owned(), value, unit, asked: Some(asked), more: false }
    }

    /// Where larger is better.
    pub fn at_least(name: &str, value: f64, unit: &'static str, asked: f64) -> Self {
        Self { more: true, ..Self::asked(name, value, unit, asked) }
    }

    /// For comparison only.
    pub fn peer(name: &str, value: f64, unit: &'static str) -> Self {
        Self { name: name.to_owned(), value, unit, asked: None, more: false }
    }

    pub fn is_missed(&self) -> bool {
        self.asked.is_some_and(|asked| if self.more { self.value < asked } else { self.value > asked })
    }
}

/// The `percent` percentile by nearest rank; `None` of nothing.
pub fn percentile(values: &[f64], percent: f64) -> Option<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let rank = (percent / 100.0 * sorted.len() as f64).ceil() as usize;
    sorted.get(rank.max(1) - 1).copied()
}

pub fn median(values: &[f64]) -> Option<f64> {
    percentile(values, 50.0)
}

/// In place of what the file holds, one JSON object a line: `name`, `value`, `unit`, and `asked` where there is a bound.
pub fn write_lines(path: &Path, figures: &[Figure]) -> io::Result<()> {
    File::create(path)?;
    add_lines(path, figures)
}

/// Behind what the file holds already.
pub fn add_lines(path: &Path, figures: &[Figure]) -> io::Result<()> {
    let mut file = File::options().create(true).append(true).open(path)?;
    for figure in figures {
        let mut line = json!({"name": figure.name, "value": rounded(figure.value), "unit": figure.unit});
        if let Some(asked) = figure.asked {
            line["asked"] = json!(asked);
        }
        writeln!(file, "{line}")?;
    }
    Ok(())
}

fn rounded(value: f64) -> f64 {
    (value * 1000.0).round() / 1000.0
}

/// An aligned table for people.
pub fn table(figures: &[Figure]) -> String {
    let row = |figure: &Figure| {
        let asked = figure.asked.map_or("-".to_owned(), |asked| format!("{asked} {}", figure.unit));
        let verdict = match (figure.asked, figure.is_missed()) {
            (None, _) => "",
            (Some(_), false) => "met",
            (Some(_), true) => "MISSED",
        };
        [figure.name.clone(), asked, format!("{:.2} {}", figure.value, figure.unit), verdict.to_owned()]
    };
    let head = ["FIGURE", "ASKED", "MEASURED", ""].map(str::to_owned);
    let rows: Vec<[String; 4]> = std::iter::once(head).chain(figures.iter().map(row)).collect();
    let width = |column: usize| rows.iter().map(|row| row[column].len()).max().unwrap_or(0);
    let (names, asked, measured) = (width(0), width(1), width(2));
    let line = |[a, b, c, d]: &[String; 4]| format!("{a:names$}  {b:>asked$}  {c:>measured$}  {d}");
    rows.iter().map(|row| line(row).trim_end().to_owned() + "\n").collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_by_nearest_rank() {
        let values: Vec<f64> = (1..=100).rev().map(f64::from).collect();
        assert_eq!((median(&values), percentile(&values, 99.0)), (Some(50.0), Some(99.0)));
        assert_eq!((median(&[7.0]), median(&[])), (Some(7.0), None));
    }

    #[test]
    fn a_missed_figure_says_so() {
        let figures = [Figure::asked("a", 2.5, "ms", 3.0), Figure::asked("long name", 4.0, "ms", 3.0)];
        let figures = [&figures[..], &[Figure::peer("peer", 1.0, "s")]].concat();
        let want = "FIGURE     ASKED  MEASURED\n\
                    a           3 ms   2.50 ms  met\n\
                    long name   3 ms   4.00 ms  MISSED\n\
                    peer           -    1.00 s\n";
        assert_eq!(table(&figures), want);
    }
}
