//! How the scheduler's cost grows: decisions a second and memory a node with the number of nodes, and the time of a pass
//! with the number of jobs that wait. In this process, on one core, without broker or store; drawn into `growth.svg`
//! beside `bench.jsonl`.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use berth_controller::core::schedule::engine::Engine;
use berth_controller::core::schedule::policy::Policy;
use berth_controller::core::schedule::prices::{Demand, Prices};
use berth_controller::core::schedule::problem::{Device, Room, Shape, Size};
use berth_controller::core::{Config, Controller, Event, Now, Step};
use berth_protocol::codec;
use berth_protocol::ids::{
    BootId, ClientId, ClusterName, Generation, HardwareId, JobName, LedgerId, Namespace, NodeId,
    SessionNonce, StoreId, Term,
};
use berth_protocol::message::node::Hello;
use berth_protocol::topic::{JobTopic, NodeTopic, Topic};
use berth_protocol::units::{BootMs, Timestamp};
use serde_json::json;

use super::figures::Figure;
use super::node::inventory;

/// Nodes, and the decisions a second that are asked for.
const FLEETS: [(usize, f64); 3] = [(1_213, 200_000.0), (10_000, 50_000.0), (100_000, 10_000.0)];
const BYTES_PER_NODE: f64 = 2048.0;
const QUEUES: [usize; 4] = [100, 1_000, 10_000, 100_000];
/// Shapes that wait, each a line of its own.
const LINES: usize = 40;
const PASSES: usize = 50;

pub fn growth() -> Result<Vec<Figure>> {
    let (mut figures, mut speed, mut memory, mut passes) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for (nodes, asked) in FLEETS {
        let (rate, bytes) = fill(nodes)?;
        speed.push((nodes as f64, rate));
        memory.push((nodes as f64, bytes));
        figures.push(Figure::at_least(&format!("decisions a second, {nodes} nodes"), rate, "1/s", asked));
        figures.push(Figure::asked(&format!("memory a node, {nodes} nodes"), bytes, "B", BYTES_PER_NODE));
    }
    for jobs in QUEUES {
        let ms = pass(jobs)?;
        passes.push((jobs as f64, ms));
        figures.push(Figure::peer(&format!("a pass over {jobs} waiting jobs"), ms, "ms"));
    }
    let charts = [
        chart("Decisions a second, one core", "nodes", &speed, 0),
        chart("Bytes a node", "nodes", &memory, 1),
        chart("Milliseconds a pass", "jobs that wait", &passes, 2),
    ];
    let here = std::env::current_exe()?;
    let path = here.ancestors().nth(2).context("a program lies in a directory")?.join("growth.svg");
    let head = r##"<svg xmlns="http://www.w3.org/2000/svg" width="1260" height="380" viewBox="0 0 1260 380" font-family="sans-serif" font-size="13" fill="#222"><rect width="1260" height="380" fill="#fff"/>"##;
    std::fs::write(&path, format!("{head}\n{}</svg>\n", charts.concat()))
        .with_context(|| format!("cannot write {}", path.display()))?;
    Ok(figures)
}

struct Dice(u64);

impl Dice {
    /// splitmix64
    fn below(&mut self, n: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        ((z ^ (z >> 31)) % n as u64) as usize
    }
}

/// Kinds of nodes as large fleets have them: cores, devices, model.
const KINDS: [(u64, usize, usize); 6] =
    [(96, 8, 0), (96, 8, 1), (64, 2, 2), (96, 4, 3), (96, 0, 0), (128, 8, 1)];

fn rooms(nodes: usize, dice: &mut Dice) -> Vec<Room> {
    let room = |(cores, devices, model): (u64, usize, usize)| Room {
        open: true,
        cpu_milli: cores * 1000,
        memory_bytes: cores << 32,
        disk_bytes: 1 << 40,
        slots: 256,
        devices: vec![Device { usable: true, model, milli: 1000, memory_bytes: 32 << 30 }; devices],
        size: Size { cpu_milli: cores * 1000, memory_bytes: cores << 32 },
    };
    (0..nodes).map(|_| room(KINDS[dice.below(KINDS.len())])).collect()
}

/// Shapes, the frequent ones first.
fn shapes(dice: &mut Dice) -> Vec<Shape> {
    let shape = |i: usize| {
        let (gpus, gpu_milli) =
            [(1, 1000), (1, 460), (1, 500), (1, 320), (0, 0), (2, 1000), (1, 810), (8, 1000)]
                [if i % 20 == 19 { 7 } else { i % 7 }];
        let cpu_milli = 2000 + 2000 * dice.below(8) as u64 + 4000 * gpus as u64;
        Shape { cpu_milli, memory_bytes: cpu_milli << 20, gpus, gpu_milli, ..Shape::default() }
    };
    (0..60).map(shape).collect()
}

/// Fills a fleet to the brim; decisions a second, and what the engine took of memory, in bytes a node.
fn fill(nodes: usize) -> Result<(f64, f64)> {
    let mut dice = Dice(42);
    let (rooms, shapes) = (rooms(nodes, &mut dice), shapes(&mut dice));
    let demand: Demand = shapes.iter().enumerate().map(|(i, s)| (s.clone(), 60 - i as u64)).collect();
    let prices = Prices::new(&demand, &rooms);
    let capacity: usize = rooms.iter().map(|room| room.devices.len()).sum();
    let (mut wanted, mut pods) = (0, Vec::new());
    while wanted < 1000 * capacity {
        // The lower of two throws: early shapes come more often.
        let shape = &shapes[dice.below(shapes.len()).min(dice.below(shapes.len()))];
        wanted += shape.gpus * shape.gpu_milli as usize;
        pods.push(shape);
    }
    // Fleets come smallest first: what an earlier one gave back is little beside the next.
    let before = resident()?;
    let mut engine = Engine::new(Policy::Bid, 0);
    for (index, room) in rooms.iter().enumerate() {
        engine.refresh(index, room.clone());
    }
    engine.adopt(prices);
    let begun = Instant::now();
    let mut seated = 0;
    for shape in &pods {
        if let Some(seat) = engine.place(shape, &[], None) {
            engine.charge(shape, &seat);
            seated += 1;
        }
    }
    let rate = pods.len() as f64 / begun.elapsed().as_secs_f64();
    ensure!(seated * 10 > pods.len() * 8, "{seated} of {} pods found a seat", pods.len());
    let bytes = resident()?.saturating_sub(before);
    Ok((rate, bytes as f64 / nodes as f64))
}

/// Bytes of this process in memory.
fn resident() -> Result<usize> {
    let text = std::fs::read_to_string("/proc/self/statm")?;
    let pages: usize = text.split(' ').nth(1).context("statm has fields")?.parse()?;
    Ok(pages * 4096)
}

/// Milliseconds that the whole controller takes for an event that has every waiting job looked at.
fn pass(jobs: usize) -> Result<f64> {
    let now = |ms: u64| Now { wall: Timestamp(1_700_000_000_000 + ms), boot: BootMs(1_000_000 + ms) };
    let config = Config {
        cluster: ClusterName::parse("bench")?,
        store: StoreId::parse("bench")?,
        term: Term(1),
        depot_url: "http://127.0.0.1:1".to_owned(),
        namespaces: BTreeMap::new(),
        moves_max: 8,
        secret: [7; 32],
        ca: None,
        seed: 1,
    };
    let mut controller = Controller::load(config, Vec::new(), now(0)).context("an empty store")?;
    controller.step(now(0), Event::BusUp);
    let node = NodeId::parse("n0")?;
    let hello = Hello {
        nonce: SessionNonce::parse("nonce")?,
        previous: None,
        earlier: Vec::new(),
        session: 1,
        hardware: HardwareId::parse("hardware")?,
        boot: BootId::parse("boot")?,
        ledger: LedgerId::parse("ledger")?,
        store: None,
        term: Term(0),
        generation: Generation(0),
        heard: None,
        events_acked: 0,
        events_last: 0,
        pods: Vec::new(),
        inventory: inventory("n0"),
        chunks: None,
    };
    let topic = Topic::node(&node, NodeTopic::Hello);
    let payload = codec::encode(&topic, &hello)?;
    controller.step(now(1), Event::Message { topic, payload, by: None });
    let namespace = Namespace::default_namespace();
    for i in 0..=jobs {
        // The first leaves too little for all that follow.
        let cores = if i == 0 { 40 } else { 25 + i % LINES };
        let file = json!({"image": "host", "command": ["true"], "resources": {"cpu": cores.to_string()}});
        let topic = Topic::job(&namespace, &JobName::parse(&format!("j{i}"))?, JobTopic::Submit);
        controller.step(now(2), Event::Message { topic, payload: file.to_string().into_bytes(), by: None });
    }
    let waiting = controller.counters().pods.get("pending").copied().unwrap_or(0);
    ensure!(waiting == jobs as u64, "{waiting} of {jobs} wait: {:?}", controller.counters().pods);
    let client = Topic::QueryRequest { client: ClientId::parse("bench")? };
    let mut ask = |verb: &str| -> Step {
        let payload = format!(r#"{{"id":"q","query":{{"{verb}":{{"node":"n0"}}}}}}"#).into_bytes();
        controller.step(now(3), Event::Message { topic: client.clone(), payload, by: None })
    };
    let begun = Instant::now();
    for _ in 0..PASSES {
        ask("cordon");
        ask("uncordon");
    }
    Ok(begun.elapsed().as_secs_f64() * 1000.0 / (2 * PASSES) as f64)
}

/// A chart with both axes in powers of ten, the `place`th of three.
fn chart(title: &str, along: &str, points: &[(f64, f64)], place: usize) -> String {
    let left = 76.0 + 410.0 * place as f64;
    let (wide, top, high) = (310.0, 60.0, 250.0);
    let span = |of: fn(&(f64, f64)) -> f64| {
        let logs = || points.iter().map(of).map(|value| value.max(1e-6).log10());
        (logs().fold(f64::MAX, f64::min).floor(), logs().fold(f64::MIN, f64::max).ceil())
    };
    let ((x0, x1), (y0, y1)) = (span(|p| p.0), span(|p| p.1));
    let x = |value: f64| left + (value.log10() - x0) / (x1 - x0).max(1.0) * wide;
    let y = |value: f64| top + high * (1.0 - (value.max(1e-6).log10() - y0) / (y1 - y0).max(1.0));
    let mut out = format!(r#"<text x="{left}" y="30" font-size="16" font-weight="bold">{title}</text>"#);
    for power in y0 as i32..=y1 as i32 {
        let (value, at) = (10_f64.powi(power), y(10_f64.powi(power)));
        let _ = write!(
            out,
            r##"<path d="M{left} {at:.1}h{wide}" stroke="#ddd"/><text x="{:.1}" y="{:.1}" text-anchor="end">{value}</text>"##,
            left - 6.0,
            at + 4.0
        );
    }
    for power in x0 as i32..=x1 as i32 {
        let value = 10_f64.powi(power);
        let _ = write!(
            out,
            r#"<text x="{:.1}" y="{}" text-anchor="middle">{value}</text>"#,
            x(value),
            top + high + 20.0
        );
    }
    let line: Vec<String> = points.iter().map(|(a, b)| format!("{:.1},{:.1}", x(*a), y(*b))).collect();
    let _ = write!(
        out,
        r##"<polyline points="{}" fill="none" stroke="#1b6ca8" stroke-width="2"/><text x="{:.1}" y="{}" text-anchor="middle">{along}</text>"##,
        line.join(" "),
        left + wide / 2.0,
        top + high + 42.0
    );
    for (a, b) in points {
        let shown = if *b >= 100.0 { format!("{b:.0}") } else { format!("{b:.2}") };
        let _ = write!(
            out,
            r##"<circle cx="{:.1}" cy="{:.1}" r="4" fill="#1b6ca8"/><text x="{:.1}" y="{:.1}" text-anchor="middle" font-size="11">{shown}</text>"##,
            x(*a),
            y(*b),
            x(*a),
            y(*b) - 9.0
        );
    }
    out + "\n"
}
