//! What processes take of memory over the time, and whether that grows. Judges samples; takes none itself but from
//! `/proc`.

use anyhow::{Context, Result, ensure};

use crate::bench::figures::{Figure, median};
use crate::bench::process::MIB;

pub const GROWTH_PERCENT_MAX: f64 = 5.0;

/// Resident memory, in bytes.
pub fn resident(pid: u32) -> Result<f64> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = text.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("no VmRSS")?;
    Ok(line.trim().trim_end_matches("kB").trim().parse::<f64>()? * 1024.0)
}

/// One process looked at.
#[derive(Debug, Clone, Copy)]
pub struct Sample {
    /// Of the whole time, from 0 to 1.
    pub at: f64,
    pub pid: u32,
    pub bytes: f64,
}

/// How much more the median of the last quarter is than that of the third, in percent.
fn growth(samples: &[Sample]) -> Result<(f64, f64)> {
    let half: Vec<&Sample> = samples.iter().filter(|sample| sample.at >= 0.5).collect();
    let quarter = |of: std::ops::Range<f64>| -> Result<f64> {
        let bytes: Vec<f64> =
            half.iter().filter(|sample| of.contains(&sample.at)).map(|sample| sample.bytes).collect();
        median(&bytes).context("too few samples")
    };
    let first = half.first().context("it was not there")?;
    ensure!(half.iter().all(|sample| sample.pid == first.pid), "it ended in the second half");
    let (third, fourth) = (quarter(0.5..0.75)?, quarter(0.75..2.0)?);
    Ok(((fourth / third - 1.0) * 100.0, fourth))
}

/// What to show of a program's samples; where growth cannot be told, why.
pub fn figures(what: &str, samples: &[Sample]) -> Result<Vec<Figure>, String> {
    let (percent, bytes) = growth(samples).map_err(|error| format!("memory of the {what}: {error}"))?;
    let name = format!("growth of the {what} over the second half");
    Ok(vec![
        Figure::asked(&name, percent, "%", GROWTH_PERCENT_MAX),
        Figure::peer(&format!("resident memory of the {what}"), bytes / MIB, "MiB"),
    ])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn samples(of: impl Fn(f64) -> (u32, f64)) -> Vec<Sample> {
        let sample = |n| {
            let at = f64::from(n) / 100.0;
            let (pid, bytes) = of(at);
            Sample { at, pid, bytes }
        };
        (0..=100).map(sample).collect()
    }

    #[test]
    fn growth_is_of_the_second_half() {
        let flat = samples(|at| (1, if at < 0.5 { 50.0 } else { 100.0 }));
        assert_eq!(growth(&flat).ok(), Some((0.0, 100.0)));
        let (percent, _) = growth(&samples(|at| (1, 100.0 + 100.0 * at))).unwrap();
        assert!((14.0..17.0).contains(&percent), "{percent}");
    }

    #[test]
    fn of_another_process_nothing_is_said() {
        let reborn = samples(|at| (if at < 0.8 { 1 } else { 2 }, 100.0));
        assert!(figures("agent", &reborn).is_err_and(|why| why.contains("ended")));
        assert!(growth(&samples(|at| (if at < 0.4 { 1 } else { 2 }, 100.0))).is_ok());
        assert!(growth(&[]).is_err());
    }
}
