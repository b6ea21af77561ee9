//! What containers write of themselves, and what must hold of it: no run of a pod before the last one has ended, no tick
//! left out. Pure: text in, findings out.

use std::fmt;

/// What a program did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Start,
    Tick,
    Stop,
}

/// One line of a pod's history, written by the program inside the container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Line {
    /// CLOCK_REALTIME, which all containers of one machine share.
    pub at_ns: u64,
    pub pod: String,
    pub epoch: u64,
    pub run: u64,
    pub kind: Kind,
    /// Ticks so far, this one included.
    pub n: u64,
}

impl fmt::Display for Line {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = match self.kind {
            Kind::Start => "start",
            Kind::Tick => "tick",
            Kind::Stop => "stop",
        };
        write!(out, "{} {} {} {} {kind} {}", self.at_ns, self.pod, self.epoch, self.run, self.n)
    }
}

impl Line {
    pub fn parse(text: &str) -> Option<Self> {
        let words: Vec<&str> = text.split(' ').collect();
        let [at_ns, pod, epoch, run, kind, n] = words[..] else { return None };
        let kind = match kind {
            "start" => Kind::Start,
            "tick" => Kind::Tick,
            "stop" => Kind::Stop,
            _ => return None,
        };
        Some(Self {
            at_ns: at_ns.parse().ok()?,
            pod: pod.to_owned(),
            epoch: epoch.parse().ok()?,
            run: run.parse().ok()?,
            kind,
            n: n.parse().ok()?,
        })
    }

    fn place(&self) -> (u64, u64) {
        (self.epoch, self.run)
    }
}

/// A rule that a history breaks, and the line (from 1) that shows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// Not written by the program.
    Malformed(usize),
    /// Of a run that came before one that had begun, or two of one run at once.
    Overlap(usize),
    /// More than one further than anything before.
    Skip(usize),
}

impl Fault {
    pub fn line(self) -> usize {
        match self {
            Self::Malformed(line) | Self::Overlap(line) | Self::Skip(line) => line,
        }
    }

    pub fn is_overlap(self) -> bool {
        matches!(self, Self::Overlap(_))
    }
}

/// What a pod's history says.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Verdict {
    pub faults: Vec<Fault>,
    /// Lines of ticks, those that were done again too.
    pub ticks: u64,
    /// Of ticks, those done again since a run went on from less than was reached.
    pub repeated: u64,
    /// Runs that went on from a checkpoint.
    pub resumed: u64,
    /// Runs that began from nothing though there had been ticks.
    pub begun_anew: u64,
    /// The count at which the last run ended by itself; none where it did not.
    pub stopped_at: Option<u64>,
}

/// Judges one pod's history, in the order in which it was written.
pub fn check(text: &str) -> Verdict {
    let mut verdict = Verdict::default();
    let mut last: Option<Line> = None;
    let mut reached = 0;
    for (number, text) in (1..).zip(text.lines()) {
        let Some(line) = Line::parse(text) else {
            verdict.faults.push(Fault::Malformed(number));
            continue;
        };
        if let Some(last) = &last {
            let goes_on = line.place() == last.place();
            let late = line.place() < last.place() || line.at_ns < last.at_ns;
            // Within a run there is one beginning, and nothing behind an end.
            let twice = goes_on && !follows(last, &line);
            if late || twice {
                verdict.faults.push(Fault::Overlap(number));
            }
            if !goes_on && line.kind == Kind::Tick {
                verdict.resumed += 1;
            }
        }
        match line.kind {
            Kind::Start => verdict.begun_anew += u64::from(reached > 0),
            Kind::Tick => {
                verdict.ticks += 1;
                verdict.repeated += u64::from(line.n <= reached);
            }
            Kind::Stop => {}
        }
        if line.n > reached + u64::from(line.kind == Kind::Tick) {
            verdict.faults.push(Fault::Skip(number));
        }
        reached = reached.max(line.n);
        verdict.stopped_at = (line.kind == Kind::Stop).then_some(line.n);
        last = Some(line);
    }
    verdict
}

/// May `line` come behind `last` in one run?
fn follows(last: &Line, line: &Line) -> bool {
    match (last.kind, line.kind) {
        (Kind::Stop, _) | (_, Kind::Start) => false,
        (_, Kind::Tick) => line.n == last.n + 1,
        (_, Kind::Stop) => line.n == last.n,
    }
}

/// The lines around one, with their numbers, for people.
pub fn excerpt(text: &str, around: usize) -> String {
    let first = around.saturating_sub(6).max(1);
    let lines = (1..).zip(text.lines()).skip(first - 1).take(12);
    lines
        .map(|(number, line)| format!("{} {number}: {line}\n", if number == around { '>' } else { ' ' }))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Each word is `EPOCH.RUN` and what happened, 50 ms apart: `1.1s` start, `1.1t3` third tick, `1.1e3` end.
    fn history(words: &str) -> String {
        let line = |(number, word): (u64, &str)| {
            let (epoch, rest) = word.split_once('.').unwrap();
            let at = rest.find(|c: char| c.is_ascii_alphabetic()).unwrap();
            let (run, rest) = rest.split_at(at);
            let (kind, n) = rest.split_at(1);
            let kind = match kind {
                "s" => Kind::Start,
                "t" => Kind::Tick,
                _ => Kind::Stop,
            };
            let (epoch, run) = (epoch.parse().unwrap(), run.parse().unwrap());
            let line = Line {
                at_ns: 1_000 + number * 50_000_000,
                pod: "job-0".into(),
                epoch,
                run,
                kind,
                n: n.parse().unwrap_or(0),
            };
            format!("{line}\n")
        };
        (0..).zip(words.split_whitespace()).map(line).collect()
    }

    #[test]
    fn a_line_is_what_was_written() {
        let line = Line { at_ns: 17, pod: "a-0".into(), epoch: 3, run: 2, kind: Kind::Stop, n: 40 };
        assert_eq!(Line::parse(&line.to_string()), Some(line));
        for torn in
            ["", "17 a-0 3 2 stop", "17 a-0 3 2 sleep 40", "17 a-0 3 2 stop 40 41", "x a-0 3 2 stop 40"]
        {
            assert_eq!(Line::parse(torn), None, "{torn}");
        }
    }

    #[test]
    fn clean_histories() {
        for (words, ticks, repeated, resumed, begun_anew, stopped_at) in [
            ("", 0, 0, 0, 0, None),
            ("1.1s 1.1t1 1.1t2 1.1e2", 2, 0, 0, 0, Some(2)),
            // Killed between start and first tick, and begun anew in place.
            ("1.1s 1.2s 1.2t1 1.2e1", 1, 0, 0, 0, Some(1)),
            // Moved without a loss.
            ("1.1s 1.1t1 1.1t2 2.1t3 2.1e3", 3, 0, 1, 0, Some(3)),
            // Lost with its node, on from its checkpoint.
            ("1.1s 1.1t1 1.1t2 1.1t3 2.1t2 2.1t3 2.1t4 2.1e4", 6, 2, 1, 0, Some(4)),
            // Lost before it had one.
            ("1.1s 1.1t1 1.1t2 3.1s 3.1t1 3.1t2 3.1e2", 4, 2, 0, 1, Some(2)),
            // An end that nobody heard of.
            ("1.1s 1.1t1 1.1e1 2.1s 2.1t1", 2, 1, 0, 1, None),
            // Saved at its last tick.
            ("1.1s 1.1t1 2.1e1", 1, 0, 0, 0, Some(1)),
        ] {
            let expected = Verdict { faults: vec![], ticks, repeated, resumed, begun_anew, stopped_at };
            assert_eq!(check(&history(words)), expected, "{words}");
        }
    }

    #[test]
    fn what_must_not_be_is_found() {
        for (words, faults) in [
            ("1.1s 1.1t1 2.1s 1.1t2 2.1t1", &[Fault::Overlap(4)][..]),
            ("1.1s 1.1t1 1.2s 1.1t2", &[Fault::Overlap(4)]),
            // Two of one run.
            ("1.1s 1.1t1 1.1t1 1.1t2", &[Fault::Overlap(3)]),
            ("1.1s 1.1t1 1.1s", &[Fault::Overlap(3)]),
            ("1.1s 1.1t1 1.1e1 1.1t2", &[Fault::Overlap(4)]),
            ("1.1s 1.1t1 2.1t3", &[Fault::Skip(3)]),
            ("1.1t2", &[Fault::Skip(1)]),
        ] {
            assert_eq!(check(&history(words)).faults, faults, "{words}");
        }
        let torn = history("1.1s 1.1t1").replace("tick", "tic");
        assert_eq!(check(&torn).faults, [Fault::Malformed(2)]);
    }

    #[test]
    fn an_old_run_that_wakes_is_found_by_its_clock_too() {
        let mut lines: Vec<String> = history("1.1s 1.1t1 2.1t2").lines().map(str::to_owned).collect();
        lines[2] = lines[2].replace("100001000", "40001000");
        assert_eq!(check(&lines.join("\n")).faults, [Fault::Overlap(3)]);
    }

    #[test]
    fn an_excerpt_shows_where() {
        let text = history("1.1s 1.1t1 1.1t2");
        assert!(excerpt(&text, 2).lines().nth(1).is_some_and(|line| line.starts_with("> 2: ")));
        assert_eq!(excerpt(&text, 2).lines().count(), 3);
    }
}
