//! `make soak`: the programs beside this one (a release build) under faults, and whether they keep what berth promises.
//! As `soak tick DIR JOB COUNT FAILURES` it is the program that the jobs of a soak run.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::atomic::Ordering;
use std::time::Duration;

use anyhow::Result;
use berth_tests::bench::figures::{add_lines, table};
use berth_tests::bench::world::figures_file;
use berth_tests::soak::run::{INTERRUPTED, Plan, Soak};
use berth_tests::soak::{judge, leaks, ticker};
use clap::Parser;

/// Of a program of a job that is to fail.
const FAILS: u8 = 3;

#[derive(Parser)]
#[command(
    name = "soak",
    about = "Break everything that can break, for a while, and see that nothing is lost"
)]
struct Args {
    /// How many faults
    #[arg(long, default_value_t = 500)]
    faults: usize,
    /// Over how long; fewer where it need not be whole minutes
    #[arg(long, default_value_t = 30.0)]
    minutes: f64,
    /// Draws faults and jobs
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Keep logs and histories of a run without a fault, too
    #[arg(long)]
    keep: bool,
}

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    if let [word, dir, _, count, failures] = &words[..]
        && word == "tick"
        && let (Ok(count), Ok(failures)) = (count.parse(), failures.parse())
    {
        return match ticker::tick(Path::new(dir), count, failures) {
            Ok(true) => ExitCode::SUCCESS,
            Ok(false) => ExitCode::from(FAILS),
            Err(error) => {
                eprintln!("{error:#}");
                ExitCode::FAILURE
            }
        };
    }
    let args = Args::parse();
    match soak(&args) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("soak: {error:#}");
            ExitCode::FAILURE
        }
    }
}

extern "C" fn interrupt(_: libc::c_int) {
    INTERRUPTED.store(true, Ordering::Relaxed);
}

fn soak(args: &Args) -> Result<bool> {
    for signal in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP] {
        // SAFETY: the handler stores into an atomic, and does nothing else.
        unsafe { libc::signal(signal, interrupt as *const () as libc::sighandler_t) };
    }
    let dir = tempfile::Builder::new().prefix("berth-soak").tempdir()?;
    leaks::set_apart(dir.path())?;
    let mark = dir.path().display().to_string();
    // A panic ends the program at once: what it has started must not outlive it.
    let (say, word, nodes) = (std::panic::take_hook(), mark.clone(), nodes(dir.path()));
    std::panic::set_hook(Box::new(move |what| {
        say(what);
        leaks::sweep(&word, &nodes);
    }));
    let length = Duration::from_secs_f64(args.minutes * 60.0);
    let plan = Plan { seed: args.seed, faults: args.faults, length };
    eprintln!("soak: {} faults in {} min, seed {}, in {mark}", args.faults, args.minutes, args.seed);
    let result = run(plan, dir.path(), &mark);
    leaks::sweep(&mark, &self::nodes(dir.path()));
    let held = matches!(result, Ok(true));
    if !held || args.keep {
        eprintln!("soak: logs, histories and faults are kept in {}", dir.keep().display());
    }
    result
}

fn nodes(dir: &Path) -> Vec<(String, PathBuf)> {
    (0..berth_tests::soak::ground::NODES)
        .map(|n| format!("n{n}"))
        .map(|node| (node.clone(), dir.join(node)))
        .collect()
}

fn run(plan: Plan, dir: &Path, mark: &str) -> Result<bool> {
    let mut soak = Soak::new(plan, dir, mark)?;
    let ran = soak.run();
    soak.ground.end();
    judge::keep(&soak, dir)?;
    ran?;
    let left = leaks::look(&soak.ground, dir, mark);
    let judgement = judge::judge(&soak, &left)?;
    for wrong in &judgement.wrong {
        eprintln!("soak: {wrong}");
    }
    print!("{}", table(&judgement.figures));
    add_lines(&figures_file(), &judgement.figures)?;
    Ok(judgement.wrong.is_empty() && !judgement.figures.iter().any(|figure| figure.is_missed()))
}
