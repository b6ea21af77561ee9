//! A linear programme that grows by columns: maximise `c·x` where `A·x <= b`, `x >= 0`, `b >= 0`. Revised simplex with
//! a dense inverse: made for some hundred rows. Deterministic.

const TOLERANCE: f64 = 1e-9;

/// A variable: its part of the objective, and its entries by row.
#[derive(Debug, Clone)]
pub struct Column {
    pub gain: f64,
    pub entries: Vec<(usize, f64)>,
}

#[derive(Debug, Clone)]
pub struct Simplex {
    rows: usize,
    /// Inverse of the basis, row by row.
    inverse: Vec<f64>,
    /// Values of the basic variables.
    values: Vec<f64>,
    /// Column of each basic variable; a slack where none.
    basis: Vec<Option<usize>>,
    columns: Vec<Column>,
    /// The price of each row.
    prices: Vec<f64>,
}

impl Simplex {
    pub fn new(bounds: Vec<f64>) -> Self {
        let rows = bounds.len();
        let mut inverse = vec![0.0; rows * rows];
        for row in 0..rows {
            inverse[row * rows + row] = 1.0;
        }
        Self {
            rows,
            inverse,
            values: bounds,
            basis: vec![None; rows],
            columns: Vec::new(),
            prices: vec![0.0; rows],
        }
    }

    pub fn add(&mut self, column: Column) {
        self.columns.push(column);
    }

    /// What one more unit of each row's bound is worth.
    pub fn prices(&self) -> &[f64] {
        &self.prices
    }

    /// By how much the objective grows with a unit of this column.
    pub fn gain(&self, column: &Column) -> f64 {
        column.gain - column.entries.iter().map(|(row, value)| value * self.prices[*row]).sum::<f64>()
    }

    /// Pivots until no column gains, at most `pivots` times; says how many it took.
    pub fn improve(&mut self, pivots: usize) -> usize {
        for taken in 0..pivots {
            let gains = self.columns.iter().enumerate().map(|(i, column)| (self.gain(column), i));
            let best = gains.fold(
                (TOLERANCE, None),
                |best, (gain, i)| {
                    if gain > best.0 { (gain, Some(i)) } else { best }
                },
            );
            let slack = (0..self.rows).map(|row| (-self.prices[row], row));
            let slack = slack.fold(
                (best.0, None),
                |best, (gain, row)| {
                    if gain > best.0 { (gain, Some(row)) } else { best }
                },
            );
            let entering = match (slack.1, best.1) {
                (Some(row), _) => (None, Column { gain: 0.0, entries: vec![(row, 1.0)] }),
                (None, Some(i)) => (Some(i), self.columns[i].clone()),
                (None, None) => return taken,
            };
            if !self.pivot(entering.0, &entering.1) {
                return taken;
            }
        }
        pivots
    }

    /// Brings the column in for the row that bounds it first.
    fn pivot(&mut self, entering: Option<usize>, column: &Column) -> bool {
        let rows = self.rows;
        let direction: Vec<f64> = (0..rows)
            .map(|row| {
                let line = &self.inverse[row * rows..(row + 1) * rows];
                column.entries.iter().map(|(i, value)| line[*i] * value).sum()
            })
            .collect();
        let mut leaving: Option<(f64, usize)> = None;
        for row in (0..rows).filter(|row| direction[*row] > 1e-7) {
            let ratio = self.values[row].max(0.0) / direction[row];
            let better = leaving.is_none_or(|(least, at)| {
                ratio < least - 1e-12 || ratio < least + 1e-12 && direction[row] > direction[at]
            });
            if better {
                leaving = Some((ratio, row));
            }
        }
        let Some((ratio, row)) = leaving else { return false };
        let gain = self.gain(column);
        let scale = 1.0 / direction[row];
        let line: Vec<f64> = self.inverse[row * rows..(row + 1) * rows].iter().map(|v| v * scale).collect();
        for other in (0..rows).filter(|other| *other != row && direction[*other] != 0.0) {
            let by = direction[other];
            let target = &mut self.inverse[other * rows..(other + 1) * rows];
            target.iter_mut().zip(&line).for_each(|(value, with)| *value -= by * with);
            self.values[other] -= by * ratio;
        }
        self.prices.iter_mut().zip(&line).for_each(|(price, with)| *price += gain * with);
        self.inverse[row * rows..(row + 1) * rows].copy_from_slice(&line);
        self.values[row] = ratio;
        self.basis[row] = entering;
        true
    }
}
