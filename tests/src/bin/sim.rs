//! `sim --seeds N [--from S]`: plays N histories and prints the first that goes wrong, with the command that plays
//! it again; `sim --seed S` plays one and prints what happened. With `--mutant RULE` a fencing rule is broken
//! throughout, and a violation is what is looked for.

use std::process::ExitCode;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::Instant;

use berth_protocol::rule::Rule;
use berth_tests::world;

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let Some(at) = args.iter().position(|arg| arg == "--mutant") else { return play(&args, None) };
    match args.get(at + 1).and_then(|name| Rule::parse(name)) {
        Some(_) if !cfg!(debug_assertions) => {
            println!("this program keeps every rule: it was built without debug assertions");
            ExitCode::FAILURE
        }
        Some(rule) => play(&args, Some(rule)),
        None => {
            println!("--mutant takes one of {:?}", Rule::ALL);
            ExitCode::FAILURE
        }
    }
}

/// One history, without `broken` where a rule is named.
fn history(seed: u64, trace: bool, broken: Option<Rule>) -> (Result<u64, String>, Vec<String>) {
    match broken {
        #[cfg(debug_assertions)]
        Some(rule) => berth_protocol::rule::without(rule, || world::run(seed, trace)),
        _ => world::run(seed, trace),
    }
}

fn play(args: &[String], broken: Option<Rule>) -> ExitCode {
    let number = |flag: &str| -> Option<u64> {
        let at = args.iter().position(|arg| arg == flag)?;
        args.get(at + 1)?.parse().ok()
    };
    if let Some(seed) = number("--seed") {
        let (result, trace) = history(seed, true, broken);
        trace.iter().for_each(|line| println!("{line}"));
        return match result {
            Ok(steps) => {
                println!("seed {seed}: holds, {steps} steps");
                ExitCode::SUCCESS
            }
            Err(error) => {
                println!("seed {seed}: {error}");
                ExitCode::FAILURE
            }
        };
    }
    let (from, seeds) = (number("--from").unwrap_or(1), number("--seeds").unwrap_or(500));
    let begin = Instant::now();
    let (next, end, steps) = (AtomicU64::new(from), AtomicU64::new(from + seeds), AtomicU64::new(0));
    // Until one of them goes wrong: the first by number, however the threads come along.
    let play_on = || {
        loop {
            let seed = next.fetch_add(1, Ordering::Relaxed);
            if seed >= end.load(Ordering::Relaxed) {
                return None;
            }
            match history(seed, false, broken).0 {
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
        match broken {
            Some(rule) => println!("to see it: target/debug/sim --mutant {rule:?} --seed {seed}"),
            None => println!("to see it: make sim SEED={seed}"),
        }
        return ExitCode::FAILURE;
    }
    let steps = steps.into_inner();
    println!("{seeds} seeds, {steps} steps, no violation, {:.1} s", begin.elapsed().as_secs_f64());
    ExitCode::SUCCESS
}
