//! Aligned columns for people. Pure.

/// How a cell stands out on a terminal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tone {
    Plain,
    Good,
    Busy,
    Bad,
    Faint,
}

impl Tone {
    fn code(self) -> Option<&'static str> {
        match self {
            Tone::Plain => None,
            Tone::Good => Some("32"),
            Tone::Busy => Some("33"),
            Tone::Bad => Some("31"),
            Tone::Faint => Some("2"),
        }
    }

    pub fn paint(self, text: &str, colour: bool) -> String {
        match self.code().filter(|_| colour) {
            Some(code) => format!("\x1b[{code}m{text}\x1b[0m"),
            None => text.to_owned(),
        }
    }
}

#[derive(Debug, Clone)]
pub struct Cell {
    text: String,
    tone: Tone,
}

impl Cell {
    pub fn toned(text: impl Into<String>, tone: Tone) -> Self {
        Self { text: text.into(), tone }
    }
}

impl<T: Into<String>> From<T> for Cell {
    fn from(text: T) -> Self {
        Self::toned(text, Tone::Plain)
    }
}

#[derive(Debug)]
pub struct Table {
    headers: Vec<&'static str>,
    rows: Vec<Vec<Cell>>,
}

impl Table {
    pub fn new(headers: Vec<&'static str>) -> Self {
        Self { headers, rows: Vec::new() }
    }

    pub fn push(&mut self, row: Vec<Cell>) {
        debug_assert_eq!(row.len(), self.headers.len());
        self.rows.push(row);
    }

    pub fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    /// The table's lines. `widths` are kept at least and grow, so that rows printed later line up.
    pub fn render(&self, header: bool, colour: bool, widths: &mut Vec<usize>) -> String {
        widths.resize(self.headers.len(), 0);
        let grow = |width: &mut usize, text: &str| *width = (*width).max(text.chars().count());
        widths.iter_mut().zip(&self.headers).for_each(|(width, text)| grow(width, text));
        for row in &self.rows {
            widths.iter_mut().zip(row).for_each(|(width, cell)| grow(width, &cell.text));
        }
        let mut out = String::new();
        let mut line = |cells: &mut dyn Iterator<Item = (&str, Tone)>| {
            let mut gap = 0;
            for ((text, tone), width) in cells.zip(widths.iter()) {
                if !text.is_empty() {
                    out.push_str(&" ".repeat(gap));
                    gap = 0;
                    out.push_str(&tone.paint(text, colour));
                }
                // Two spaces between columns, none at a line's end.
                gap += width + 2 - text.chars().count();
            }
            out.push('\n');
        };
        if header {
            line(&mut self.headers.iter().map(|text| (*text, Tone::Plain)));
        }
        for row in &self.rows {
            line(&mut row.iter().map(|cell| (cell.text.as_str(), cell.tone)));
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up_and_lines_end_without_spaces() {
        let mut table = Table::new(vec!["NAME", "PHASE", "REASON"]);
        table.push(vec!["digits".into(), Cell::toned("Running", Tone::Good), "".into()]);
        table.push(vec!["é".into(), "Failed".into(), "OOMKilled".into()]);
        let want = "NAME    PHASE    REASON\ndigits  Running\né       Failed   OOMKilled\n";
        let mut widths = Vec::new();
        assert_eq!(table.render(true, false, &mut widths), want);
        assert_eq!(widths, [6, 7, 9]);
        assert!(table.render(false, true, &mut widths).contains("\x1b[32mRunning\x1b[0m\n"));
    }
}
