//! Every target of the fuzzer, on its seeds and on what is drawn from them by a seed of its own: what a run of libFuzzer
//! has found stays found, and what is new is tried a little each time.

use std::path::Path;
use std::time::{Duration, Instant};

use berth_tests::fuzz::{TARGETS, mutate};

/// For each target, until it has had so many or so long; with `BERTH_FUZZ_SECONDS`, so long.
const TRIES: usize = 20_000;
const LONG: Duration = Duration::from_secs(4);

fn seeds(target: &str) -> Vec<Vec<u8>> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/seeds").join(target);
    let entries = std::fs::read_dir(&dir).unwrap_or_else(|error| panic!("{}: {error}", dir.display()));
    let mut paths: Vec<_> = entries.flatten().map(|entry| entry.path()).collect();
    paths.sort();
    paths.iter().map(|path| std::fs::read(path).expect("a seed")).collect()
}

fn variable(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

/// `BERTH_FUZZ_SEED` draws others, `BERTH_FUZZ_TARGET` names one target; the input that fails is written where the message
/// says.
#[test]
fn what_comes_from_outside_breaks_nothing() {
    let drawn = variable("BERTH_FUZZ_SEED").unwrap_or(1);
    let (tries, long) = match variable("BERTH_FUZZ_SECONDS") {
        Some(seconds) => (usize::MAX, Duration::from_secs(seconds)),
        None => (TRIES, LONG),
    };
    let only = std::env::var("BERTH_FUZZ_TARGET").ok();
    for (name, target) in TARGETS.iter().filter(|(name, _)| only.as_ref().is_none_or(|only| only == name)) {
        let seeds = seeds(name);
        let mut rng = fastrand::Rng::with_seed(drawn);
        let begun = Instant::now();
        let drawn = std::iter::repeat_with(|| mutate(&mut rng, &seeds))
            .take(tries)
            .take_while(|_| begun.elapsed() < long);
        let mut tried = 0;
        for input in seeds.iter().cloned().chain(drawn) {
            tried += 1;
            if std::panic::catch_unwind(|| target(&input)).is_err() {
                let path = std::env::temp_dir().join(format!("berth-fuzz-{name}"));
                std::fs::write(&path, &input).expect("room for the input");
                panic!("{name} fails on {}: {:?}", path.display(), String::from_utf8_lossy(&input));
            }
        }
        println!("{name}: {tried} inputs");
    }
}
