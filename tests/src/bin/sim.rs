//! `sim --seeds N [--from S]`: plays N histories and prints the first that goes wrong, with the command that plays
//! it again; `sim --seed S` plays one and prints what happened. With `--mutant RULE` a fencing rule is broken
//! throughout, and a violation is what is looked for.

use std::process::ExitCode;
use std::time::Instant;

use berth_protocol::rule::Rule;
use berth_tests::world;

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let mutant = args.iter().position(|arg| arg == "--mutant").map(|at| args.get(at + 1));
    let Some(name) = mutant else { return play(&args) };
    match name.and_then(|name| Rule::parse(name)) {
        Some(rule) => play_without(rule, &args),
        None => {
            println!("--mutant takes one of {:?}", Rule::ALL);
            ExitCode::FAILURE
        }
    }
}

#[cfg(debug_assertions)]
fn play_without(rule: Rule, args: &[String]) -> ExitCode {
    berth_protocol::rule::without(rule, || play(args))
}

#[cfg(not(debug_assertions))]
fn play_without(_: Rule, _: &[String]) -> ExitCode {
    println!("this program keeps every rule: it was built without debug assertions");
    ExitCode::FAILURE
}

fn play(args: &[String]) -> ExitCode {
    let number = |flag: &str| -> Option<u64> {
        let at = args.iter().position(|arg| arg == flag)?;
        args.get(at + 1)?.parse().ok()
    };
    if let Some(seed) = number("--seed") {
        let (result, trace) = world::run(seed, true);
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
    let (begin, mut steps) = (Instant::now(), 0);
    for seed in from..from + seeds {
        match world::run(seed, false).0 {
            Ok(taken) => steps += taken,
            Err(error) => {
                println!("seed {seed}: {error}");
                println!("to see it: make sim SEED={seed}");
                return ExitCode::FAILURE;
            }
        }
    }
    println!("{seeds} seeds, {steps} steps, no violation, {:.1} s", begin.elapsed().as_secs_f64());
    ExitCode::SUCCESS
}
