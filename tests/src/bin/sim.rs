//! `sim --seeds N [--from S]`: plays N histories and prints the first that goes wrong, with the command that plays
//! it again. `sim --seed S` plays one and prints what happened; `--only 1,4,7` plays it with these things of its plan
//! alone, `--shrink` looks for the fewest with which it goes wrong. With `--mutant RULE` a fencing rule is broken
//! throughout, and a violation is what is looked for.

use std::process::ExitCode;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::Instant;

use berth_protocol::rule::Rule;
use berth_tests::plan::Plan;
use berth_tests::world;

/// What is asked for.
struct Args {
    words: Vec<String>,
    broken: Option<Rule>,
}

impl Args {
    fn value(&self, flag: &str) -> Option<&str> {
        let at = self.words.iter().position(|word| word == flag)?;
        self.words.get(at + 1).map(String::as_str)
    }

    fn number(&self, flag: &str) -> Option<u64> {
        self.value(flag)?.parse().ok()
    }

    /// The command that plays this history.
    fn command(&self, seed: u64, only: Option<&[usize]>) -> String {
        let mutant = self.broken.map(|rule| format!(" --mutant {rule:?}")).unwrap_or_default();
        let list = |only: &[usize]| only.iter().map(usize::to_string).collect::<Vec<_>>().join(",");
        let only = only.map(|only| format!(" --only {}", list(only))).unwrap_or_default();
        let program = std::env::args().next().unwrap_or_else(|| "sim".to_owned());
        format!("{program} --seed {seed}{mutant}{only}")
    }

    /// Plays it, without the broken rule where one is named.
    fn play(&self, plan: &Plan, trace: bool) -> (Result<u64, String>, Vec<String>) {
        match self.broken {
            #[cfg(debug_assertions)]
            Some(rule) => berth_protocol::rule::without(rule, || world::play(plan, trace)),
            _ => world::play(plan, trace),
        }
    }
}

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let mut args = Args { words, broken: None };
    if let Some(name) = args.value("--mutant") {
        args.broken = Rule::parse(name);
        if args.broken.is_none() {
            println!("--mutant takes one of {:?}", Rule::ALL);
            return ExitCode::FAILURE;
        }
        if !cfg!(debug_assertions) {
            println!("this program keeps every rule: it was built without debug assertions");
            return ExitCode::FAILURE;
        }
    }
    match args.number("--seed") {
        Some(seed) => one(&args, seed),
        None => many(&args),
    }
}

fn one(args: &Args, seed: u64) -> ExitCode {
    let whole = Plan::of(seed);
    let asked = args.value("--only").map(|list| list.split(',').filter_map(|n| n.parse().ok()).collect());
    let shrinks = args.words.iter().any(|word| word == "--shrink");
    let only: Option<Vec<usize>> = if shrinks {
        let all = asked.unwrap_or_else(|| (0..whole.len()).collect());
        Some(whole.shrunk(all, |plan| args.play(plan, false).0.is_err()))
    } else {
        asked
    };
    let plan = only.as_ref().map_or_else(|| whole.clone(), |only| whole.only(only));
    let (result, trace) = args.play(&plan, true);
    print!("{plan}");
    trace.iter().for_each(|line| println!("{line}"));
    match result {
        Ok(steps) => {
            println!("seed {seed}: holds, {steps} steps");
            ExitCode::SUCCESS
        }
        Err(error) => {
            println!("seed {seed}: {error}");
            println!("to see it: {}", args.command(seed, only.as_deref()));
            ExitCode::FAILURE
        }
    }
}

fn many(args: &Args) -> ExitCode {
    let (from, seeds) = (args.number("--from").unwrap_or(1), args.number("--seeds").unwrap_or(500));
    let begin = Instant::now();
    let (next, end, steps) = (AtomicU64::new(from), AtomicU64::new(from + seeds), AtomicU64::new(0));
    // Until one of them goes wrong: the first by number, however the threads come along.
    let play_on = || {
        loop {
            let seed = next.fetch_add(1, Ordering::Relaxed);
            if seed >= end.load(Ordering::Relaxed) {
                return None;
            }
            match args.play(&Plan::of(seed), false).0 {
                Ok(taken) => drop(steps.fetch_add(taken, Ordering::Relaxed)),
                Err(error) => {
                    end.fetch_min(seed, Ordering::Relaxed);
                    return Some((seed, error));
                }
            }
        }
    };
    let wrong = thread::scope(|scope| {
        let threads = thread::available_parallelism().map_or(1, usize::from);
        let threads: Vec<_> = (0..threads).map(|_| scope.spawn(play_on)).collect();
        threads.into_iter().filter_map(|thread| thread.join().expect("no panic")).min()
    });
    if let Some((seed, error)) = wrong {
        println!("seed {seed}: {error}");
        println!("to see it: {0}; the fewest things that make it: {0} --shrink", args.command(seed, None));
        return ExitCode::FAILURE;
    }
    let (steps, seconds) = (steps.into_inner(), begin.elapsed().as_secs_f64());
    println!("{seeds} seeds, {steps} steps, no violation, {seconds:.1} s");
    ExitCode::SUCCESS
}
