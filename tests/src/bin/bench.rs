//! `make bench`: measures the figures that berth promises, on the programs beside this one (a release build), and
//! writes them to `target/bench.jsonl`. Words on the command line choose: `bench array shim`.

use std::process::ExitCode;

use anyhow::Result;
use berth_tests::bench::figures::{Figure, table, write_lines};
use berth_tests::bench::world::figures_file;
use berth_tests::bench::{
    checkpoint, fleet, flood, footprint, growth, latency, moves, podman, records, slurm, throughput, trust,
};

type Measure = fn() -> Result<Vec<Figure>>;

/// What keeps another program from being measured here.
type Missing = fn() -> Option<String>;

/// What others do beside it, where they are there.
const PEERS: [(&str, Missing, Measure); 2] =
    [("podman", podman::missing, podman::measure), ("slurm", slurm::missing, slurm::measure)];

/// The quiet ones first: thousands of containers leave pages to write and groups to take apart, minutes of it.
const MEASURES: [(&str, Measure); 20] = [
    ("binary", footprint::binary),
    ("host", || latency::submit_to_output("host")),
    ("bridge", || latency::submit_to_output("bridge")),
    ("run", latency::run_command),
    ("controller", footprint::controller_alone),
    ("shim", footprint::shim),
    ("checkpoint", checkpoint::small),
    ("gigabyte", checkpoint::gigabyte),
    ("move", moves::moved),
    ("second", moves::second),
    ("array", throughput::array),
    ("daemons", footprint::daemons),
    ("crowd", throughput::crowd),
    ("growth", growth::growth),
    ("flood", flood::flood),
    ("commit", records::commit),
    ("recovery", records::recovery),
    ("failover", records::failover),
    ("fleet", fleet::fleet),
    ("trust", trust::trust),
];

fn main() -> ExitCode {
    let chosen: Vec<String> = std::env::args().skip(1).collect();
    if let [word, port] = &chosen[..]
        && word == fleet::AGENTS
        && let Ok(port) = port.parse()
    {
        return fleet::agents(port).map_or(ExitCode::FAILURE, |()| ExitCode::SUCCESS);
    }
    if let [word, port, secret] = &chosen[..]
        && word == trust::AGENTS
        && let Ok(port) = port.parse()
    {
        return trust::agents(port, secret).map_or(ExitCode::FAILURE, |()| ExitCode::SUCCESS);
    }
    let peers = PEERS.iter().map(|(name, ..)| *name);
    let all: Vec<&str> = MEASURES.iter().map(|(name, _)| *name).chain(peers).collect();
    if let Some(unknown) = chosen.iter().find(|name| !all.contains(&name.as_str())) {
        eprintln!("bench: `{unknown}` is not one of: {}", all.join(", "));
        return ExitCode::from(2);
    }
    let wanted = |name: &str| chosen.is_empty() || chosen.iter().any(|word| word == name);
    let (mut figures, mut failed) = (Vec::new(), 0);
    let mut take = |name: &str, measure: Measure| {
        eprintln!("bench: {name} (load {})", load());
        match measure() {
            Ok(more) => figures.extend(more),
            Err(error) => {
                eprintln!("bench: {name} could not be measured: {error:#}");
                failed += 1;
            }
        }
    };
    for (name, measure) in MEASURES.into_iter().filter(|(name, _)| wanted(name)) {
        take(name, measure);
    }
    for (name, missing, measure) in PEERS.into_iter().filter(|(name, ..)| wanted(name)) {
        match missing() {
            None => take(name, measure),
            Some(why) => eprintln!("SKIPPED: the comparison with {name}: {why}"),
        }
    }
    print!("{}", table(&figures));
    let path = figures_file();
    if let Err(error) = write_lines(&path, &figures) {
        eprintln!("bench: cannot write {}: {error}", path.display());
        return ExitCode::FAILURE;
    }
    if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn load() -> String {
    let text = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    text.split(' ').next().unwrap_or_default().to_owned()
}
