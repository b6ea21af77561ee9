//! `simulate`: the controller's own scheduler on fleets and pods from files, for planning and for judging it. It needs no
//! broker, unless the fleet is the live one.

mod churn;
pub mod command;
mod fleet;
mod plot;
mod random;
mod replay;
mod stopwatch;
mod trace;

use std::io::Write as _;
use std::path::PathBuf;

use anyhow::Context as _;
use berth_protocol::message::query::Query;
use serde_json::{Map, Value, json};

use crate::core::schedule::policy::Policy;
use crate::core::schedule::prices::{Demand, Prices};
use crate::core::schedule::problem::Room;

use super::Usage;
use super::command::Format;
use super::config::Settings;
use super::connect::Session;
use super::table::Table;
use command::Simulate;
use plot::Line;
use trace::{Models, Pod};

/// What one seed came to: figures by name in the order of printing, and its drawing.
struct Result {
    figures: Vec<(&'static str, Option<f64>)>,
    lines: Vec<Line>,
    fill: Vec<f64>,
}

pub async fn simulate(settings: &Settings, args: Simulate) -> anyhow::Result<u8> {
    let seeds = seeds(&args.seed).map_err(Usage::new)?;
    if !(args.load > 0.0 && args.load <= 10.0) || args.churn.is_some_and(|load| !(load > 0.0 && load <= 2.0))
    {
        return Err(Usage::new("a load is a multiple of the fleet: --load up to 10, --churn up to 2").into());
    }
    let mut models = Models::default();
    let rooms = match args.nodes.to_str() {
        Some("live") => live(settings, &mut models).await?,
        _ => trace::nodes(&args.nodes, &mut models)?,
    };
    let pods = trace::pods(&args.pods, &models)?;
    if args.churn.is_some() && pods.iter().all(|pod| pod.duration.is_none()) {
        let file = args.pods.display();
        anyhow::bail!(
            "{file}: --churn needs to know how long pods run: columns creation_time, deletion_time"
        );
    }
    let mut demand = Demand::new();
    for pod in &pods {
        *demand.entry(pod.shape.clone()).or_default() += 1;
    }
    let policy = args.policy.into();
    let prices = Prices::new(&demand, &rooms);
    let mut results = Vec::new();
    for seed in seeds {
        eprintln!("seed {seed}: {} nodes, {} pods in the list", rooms.len(), pods.len());
        let result = one(&args, policy, &rooms, &pods, &prices, seed);
        if settings.format == Format::Json {
            print_json(json!(seed), &result.figures)?;
        }
        results.push((seed, result));
    }
    let means = means(&results);
    match settings.format {
        Format::Json => print_json(json!("mean"), &means)?,
        _ => print_table(&results, &means)?,
    }
    if let (Some(path), Some((seed, first))) = (&args.plot, results.first()) {
        draw(path, &args, *seed, first)?;
    }
    Ok(0)
}

fn one(args: &Simulate, policy: Policy, rooms: &[Room], pods: &[Pod], prices: &Prices, seed: u64) -> Result {
    if let Some(load) = args.churn {
        let outcome = churn::churn(policy, rooms, pods, prices, load, usize::from(args.moves), seed);
        let figures = vec![
            ("gpuAllocated", Some(outcome.allocated)),
            ("gpuAllocatedNet", Some(outcome.net)),
            ("gpuOffered", Some(outcome.offered)),
            ("cpuAllocated", Some(outcome.cpu)),
            ("waitSeconds", Some(outcome.wait_s)),
            ("waitShareSeconds", Some(outcome.wait_share_s)),
            ("waitMultiGpuSeconds", Some(outcome.wait_several_s)),
            ("neverStarted", Some(outcome.never_started as f64)),
            ("pods", Some(outcome.pods as f64)),
            ("moves", Some(outcome.moves as f64)),
            ("decisionsPerSecond", Some(outcome.decisions_per_second)),
        ];
        let points = outcome.points.iter().map(|(at, allocated)| (at / 3600.0, *allocated)).collect();
        let lines = vec![Line { name: "allocated".to_owned(), points }];
        return Result { figures, lines, fill: outcome.fill };
    }
    let outcome = replay::replay(policy, rooms, pods, prices, args.load, usize::from(args.moves), seed);
    let points = &outcome.points;
    let devices = rooms.iter().any(|room| !room.devices.is_empty());
    let gpu = |at| replay::mean_at(points, at, |p| p.devices).filter(|_| devices);
    let (cpu, memory) =
        (|at| replay::mean_at(points, at, |p| p.cpu), |at| replay::mean_at(points, at, |p| p.memory));
    let figures = vec![
        ("gpuAllocated100", gpu(100.0)),
        ("gpuAllocated130", gpu(130.0)),
        ("cpuAllocated100", cpu(100.0)),
        ("cpuAllocated130", cpu(130.0)),
        ("memoryAllocated100", memory(100.0)),
        ("memoryAllocated130", memory(130.0)),
        ("pods", Some(outcome.pods as f64)),
        ("dropped", Some(outcome.dropped as f64)),
        ("moves", Some(outcome.moves as f64)),
        ("decisionsPerSecond", Some(outcome.decisions_per_second)),
    ];
    let line = |name: &str, of: &dyn Fn(&replay::Point) -> f64| Line {
        name: name.to_owned(),
        points: points.iter().map(|p| (p.arrived, of(p))).collect(),
    };
    let mut lines = vec![line("CPU allocated", &|p| p.cpu), line("memory allocated", &|p| p.memory)];
    if devices {
        lines.insert(0, line("GPU allocated", &|p| p.devices));
    }
    Result { figures, lines, fill: outcome.fill }
}

/// `42`, `42..51` (both ends count) or `1,2,7`.
fn seeds(text: &str) -> std::result::Result<Vec<u64>, String> {
    let number = |text: &str| {
        text.trim().parse::<u64>().map_err(|_| format!("`{text}` is no seed: write 42, 42..51 or 1,2,7"))
    };
    let seeds: Vec<u64> = match text.split_once("..") {
        Some((first, last)) => {
            (number(first)?..=number(last.trim_start_matches('='))?).take(10_001).collect()
        }
        None => text.split(',').map(number).collect::<std::result::Result<_, _>>()?,
    };
    match seeds.len() {
        0 => Err(format!("`{text}` names no seed")),
        1..=10_000 => Ok(seeds),
        _ => Err(format!("`{text}` names more than 10000 seeds")),
    }
}

/// The nodes of one's own fleet, as they would be empty.
async fn live(settings: &Settings, models: &mut Models) -> anyhow::Result<Vec<Room>> {
    let mut session = Session::open(settings, Vec::new()).await?;
    let rows: Vec<Value> = session.pages(|after| Query::Nodes { after }).await?;
    session.close().await;
    let mut rooms = Vec::new();
    for row in &rows {
        let amount = |name: &str| row["capacity"][name].as_u64().unwrap_or(0);
        let gpus = row["gpus"].as_array().map(Vec::as_slice).unwrap_or_default();
        let usable = gpus.iter().filter(|gpu| gpu["unhealthy"].is_null() && gpu["mig"] != json!(true));
        let devices = usable.map(|gpu| {
            (models.number(gpu["model"].as_str().unwrap_or_default()), gpu["memory"].as_u64().unwrap_or(0))
        });
        let devices = devices.collect();
        rooms.push(trace::room(amount("cpuMilli"), amount("memoryBytes"), devices));
    }
    anyhow::ensure!(!rooms.is_empty(), "the fleet has no nodes yet");
    Ok(rooms)
}

fn means(results: &[(u64, Result)]) -> Vec<(&'static str, Option<f64>)> {
    let names = results.first().map(|(_, result)| &result.figures).into_iter().flatten();
    let mean = |at: usize| {
        let values: Vec<f64> = results.iter().filter_map(|(_, result)| result.figures[at].1).collect();
        (!values.is_empty()).then(|| values.iter().sum::<f64>() / values.len() as f64)
    };
    names.enumerate().map(|(at, (name, _))| (*name, mean(at))).collect()
}

fn print_json(seed: Value, figures: &[(&'static str, Option<f64>)]) -> anyhow::Result<()> {
    let mut line = Map::new();
    line.insert("seed".to_owned(), seed);
    for (name, value) in figures {
        let rounded = value.map(|value| (value * 1000.0).round() / 1000.0);
        let value = match rounded {
            Some(whole) if whole.fract() == 0.0 && whole.abs() < 1e15 => json!(whole as i64),
            other => json!(other),
        };
        line.insert((*name).to_owned(), value);
    }
    let mut out = std::io::stdout().lock();
    writeln!(out, "{}", Value::Object(line))?;
    Ok(out.flush()?)
}

fn print_table(results: &[(u64, Result)], means: &[(&'static str, Option<f64>)]) -> anyhow::Result<()> {
    let mut headers = vec!["SEED"];
    headers.extend(means.iter().map(|(name, _)| heading(name)));
    let mut table = Table::new(headers);
    let cells = |seed: String, figures: &[(&'static str, Option<f64>)]| {
        let text = |(name, value): &(&str, Option<f64>)| match value {
            None => "-".to_owned(),
            Some(value) if name.contains("llocated") || name.contains("ffered") => format!("{value:.2}"),
            Some(value) => format!("{value:.0}"),
        };
        std::iter::once(seed).chain(figures.iter().map(text)).map(Into::into).collect()
    };
    for (seed, result) in results {
        table.push(cells(seed.to_string(), &result.figures));
    }
    table.push(cells("mean".to_owned(), means));
    Ok(std::io::stdout().write_all(table.render(true, false, &mut Vec::new()).as_bytes())?)
}

fn heading(name: &str) -> &'static str {
    match name {
        "gpuAllocated100" => "GPU@100",
        "gpuAllocated130" => "GPU@130",
        "cpuAllocated100" => "CPU@100",
        "cpuAllocated130" => "CPU@130",
        "memoryAllocated100" => "MEM@100",
        "memoryAllocated130" => "MEM@130",
        "gpuAllocated" => "GPU",
        "gpuAllocatedNet" => "NET",
        "gpuOffered" => "OFFERED",
        "cpuAllocated" => "CPU",
        "waitSeconds" => "WAIT",
        "waitShareSeconds" => "SHARES",
        "waitMultiGpuSeconds" => "MULTI-GPU",
        "neverStarted" => "NEVER",
        "pods" => "PODS",
        "dropped" => "DROPPED",
        "moves" => "MOVES",
        _ => "DECISIONS/S",
    }
}

fn draw(path: &PathBuf, args: &Simulate, seed: u64, result: &Result) -> anyhow::Result<()> {
    let file = args.pods.file_stem().map_or_else(String::new, |name| name.to_string_lossy().into_owned());
    let title = format!("{file}, policy {}, seed {seed}", args.policy.name());
    let along = match args.churn {
        Some(load) => format!("hours, at a load of {load}"),
        None => "arrived, in percent of the fleet".to_owned(),
    };
    let svg = plot::svg(&title, &along, &result.lines, &result.fill);
    std::fs::write(path, svg).with_context(|| format!("cannot write {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn seeds_are_one_a_range_or_a_list() {
        assert_eq!(seeds("42"), Ok(vec![42]));
        assert_eq!(seeds("42..44"), Ok(vec![42, 43, 44]));
        assert_eq!(seeds("1, 7"), Ok(vec![1, 7]));
        for bad in ["", "x", "5..4", "1..20000"] {
            assert!(seeds(bad).is_err(), "{bad}");
        }
    }
}
