//! The controller's records: how fast jobs are accepted, and how soon a controller is back from a large store.

use std::collections::HashMap;
use std::net::Ipv4Addr;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use berth_controller::io::store::{self, Contents, StoreChoice};
use berth_protocol::ids::ClusterName;
use rumqttc::{Client, MqttOptions, QoS};
use serde_json::{Value, json};

use super::figures::{Figure, percentile};
use super::flood;
use super::process::{Daemon, MIB, free_port, is_healthy, pss, until};
use super::user::{PREFIX, listen};
use super::world::{Broker, World, program, temporary};
use crate::etcd::Etcd;
use crate::mosquitto;

const COMMITS_ASKED: f64 = 5_000.0;
/// Submits without an answer while as many as possible go through.
const WINDOW: usize = 512;
/// Each of the two parts of the measurement.
const LENGTH: Duration = Duration::from_secs(15);
const JOBS: usize = 100_000;
/// Records beside a job's own two.
const PODS_PER_JOB: usize = 8;
const LIMIT: Duration = Duration::from_secs(60);

/// Jobs accepted a second, each durable before its answer; then at half of what is asked, how long an answer takes.
pub fn commit() -> Result<Vec<Figure>> {
    let world = World::new(Broker::Embedded)?;
    let mut submitter = Submitter::connect(world.port())?;
    let begun = Instant::now();
    while begun.elapsed() < LENGTH {
        while submitter.open.len() < WINDOW {
            submitter.submit()?;
        }
        submitter.hear(Duration::from_secs(1))?;
    }
    let took = begun.elapsed().as_secs_f64();
    let rate = submitter.waits.len() as f64 / took;
    submitter.drain()?;
    submitter.waits.clear();
    let pause = Duration::from_secs_f64(2.0 / COMMITS_ASKED);
    let (begun, mut due) = (Instant::now(), Instant::now());
    while begun.elapsed() < LENGTH {
        while due <= Instant::now() {
            submitter.submit()?;
            due += pause;
        }
        submitter.hear(due.saturating_duration_since(Instant::now()))?;
    }
    submitter.drain()?;
    let wait = |percent: f64| percentile(&submitter.waits, percent).context("nothing was answered");
    Ok(vec![
        Figure::at_least("jobs accepted a second, durable", rate, "1/s", COMMITS_ASKED),
        Figure::peer("submit to answer at 2,500 jobs/s, median", wait(50.0)?, "ms"),
        Figure::asked("submit to answer at 2,500 jobs/s, p99", wait(99.0)?, "ms", 20.0),
    ])
}

/// A user who submits jobs that stay suspended, and hears the answers alone.
struct Submitter {
    client: Client,
    answers: std::sync::mpsc::Receiver<(String, Instant, bool)>,
    next: usize,
    open: HashMap<String, Instant>,
    /// From submit to answer, in milliseconds.
    waits: Vec<f64>,
}

impl Submitter {
    fn connect(port: u16) -> Result<Self> {
        let mut options = MqttOptions::new("bench-submitter", "127.0.0.1", port);
        options.set_inflight(u16::try_from(WINDOW)?);
        let (to, answers) = std::sync::mpsc::channel();
        let client = listen(options, "answer", move |job, at, payload| {
            let accepted = payload.windows(15).any(|part| part == b"\"accepted\":true");
            to.send((job.to_owned(), at, accepted)).is_ok()
        })?;
        Ok(Self { client, answers, next: 0, open: HashMap::new(), waits: Vec::new() })
    }

    fn submit(&mut self) -> Result<()> {
        let name = format!("c{}", self.next);
        self.next += 1;
        let file = json!({"image": "host", "command": ["true"], "suspend": true}).to_string();
        self.open.insert(name.clone(), Instant::now());
        Ok(self.client.publish(format!("{PREFIX}/{name}/submit"), QoS::AtLeastOnce, false, file)?)
    }

    /// An answer, if one comes in time, and whatever has come with it.
    fn hear(&mut self, patience: Duration) -> Result<()> {
        let Ok(first) = self.answers.recv_timeout(patience) else { return Ok(()) };
        for (job, at, accepted) in std::iter::once(first).chain(self.answers.try_iter()) {
            ensure!(accepted, "job {job} was refused");
            if let Some(submitted) = self.open.remove(&job) {
                self.waits.push(at.duration_since(submitted).as_secs_f64() * 1000.0);
            }
        }
        Ok(())
    }

    fn drain(&mut self) -> Result<()> {
        let end = Instant::now() + LIMIT;
        while !self.open.is_empty() {
            ensure!(Instant::now() < end, "{} submits have no answer", self.open.len());
            self.hear(Duration::from_secs(1))?;
        }
        Ok(())
    }
}

/// From the start of the program until it answers, with 100,000 jobs and 1,000,000 records in its store: nine of ten
/// jobs have ended, the others wait for a node.
pub fn recovery() -> Result<Vec<Figure>> {
    let (ended, waiting, contents) = samples()?;
    let dir = temporary()?;
    let data = dir.path().join("ctl");
    std::fs::create_dir(&data)?;
    let mut entries = std::collections::BTreeMap::new();
    for job in 0..JOBS {
        let sample = if job % 10 == 0 { &waiting } else { &ended };
        let uid = format!("job{job:09}");
        for (key, value) in &sample.records {
            let key = key.replace(&sample.uid, &uid);
            let value = value.replace(&sample.uid, &uid).replace(&sample.name, &format!("j{job}"));
            entries.insert(key, Some(value.into_bytes()));
        }
    }
    let records = entries.len();
    store::write(
        &data.join("store.sqlite"),
        &Contents { entries: entries.into_iter().collect(), ..contents },
    )?;
    let mut starts = Vec::new();
    let mut size = 0.0;
    for _ in 0..3 {
        let (took, pss) = start(&data, dir.path())?;
        starts.push(took.as_secs_f64());
        size = pss;
    }
    let median = percentile(&starts, 50.0).context("it started")?;
    Ok(vec![
        Figure::peer("records of the recovered store", records as f64, ""),
        Figure::asked("recovery with 100,000 jobs and 1,000,000 records", median, "s", 3.0),
        Figure::peer("controller PSS then", size / MIB, "MiB"),
    ])
}

/// Until `/healthz` says that all is well: the store read, the broker there.
fn start(data: &Path, dir: &Path) -> Result<(Duration, f64)> {
    let (port, http) = (free_port()?, free_port()?);
    let mut command = Command::new(program("berth-controller")?);
    command.args(["--dev", "--broker", "embedded", "--listen-mqtt", &format!("127.0.0.1:{port}")]);
    command.args(["--listen-http", &format!("127.0.0.1:{http}"), "--data-dir"]).arg(data);
    let begun = Instant::now();
    let controller = Daemon::start(&mut command, &dir.join("controller.log"))?;
    until("the controller is back", LIMIT, || is_healthy(http).then_some(()))?;
    let took = begun.elapsed();
    Ok((took, pss(controller.pid())?))
}

/// One job's records, as a controller wrote them.
struct Sample {
    uid: String,
    name: String,
    records: Vec<(String, String)>,
}

/// A job that has ended, one that waits, and the store they were in.
fn samples() -> Result<(Sample, Sample, Contents)> {
    let mut world = World::new(Broker::Embedded)?;
    flood::node(world.port(), 0)?;
    let mut user = world.user()?;
    let resources = json!({"cpu": "0.1", "memory": "32Mi"});
    let file = |resources: &Value| {
        json!({
            "image": "host", "command": ["python3", "train.py", "--epochs", "20"], "resources": resources,
            "env": {"SEED": "42"}, "parallelism": PODS_PER_JOB, "completions": PODS_PER_JOB
        })
    };
    user.submit("sampleended", &file(&resources))?;
    user.wait_success("sampleended", LIMIT)?;
    user.submit("samplewaits", &file(&json!({"cpu": "1000", "memory": "32Mi"})))?;
    user.wait("samplewaits", LIMIT, |status| status.phase() == "Pending")?;
    world.controller.stop();
    let cluster = ClusterName::parse("default").context("a name")?;
    let runtime = tokio::runtime::Builder::new_current_thread().build()?;
    let contents =
        runtime.block_on(store::read(&StoreChoice::Embedded, &world.dir().join("ctl"), &cluster))?;
    let sample = |name: &str| -> Result<Sample> {
        let text: Vec<(String, String)> = contents
            .entries
            .iter()
            .filter_map(|(key, value)| Some((key.clone(), String::from_utf8(value.clone()?).ok()?)))
            .collect();
        let job = text.iter().find(|(key, value)| key.starts_with("job/") && value.contains(name));
        let uid =
            job.and_then(|(key, _)| key.strip_prefix("job/")).context("the job has a record")?.to_owned();
        let records = text.into_iter().filter(|(key, _)| key.contains(&uid)).collect();
        Ok(Sample { uid, name: name.to_owned(), records })
    };
    let (mut ended, waiting) = (sample("sampleended")?, sample("samplewaits")?);
    // Waiting pods have no records of their own: those of ended jobs make up for them.
    let pods = ended.records.iter().filter(|(key, _)| key.starts_with("pod/")).count();
    let (key, value) =
        ended.records.iter().find(|(key, _)| key.starts_with("pod/")).context("it had pods")?.clone();
    let more = (JOBS * (2 + PODS_PER_JOB) - JOBS / 10 * waiting.records.len()).div_ceil(JOBS / 10 * 9);
    let base = key.rsplit_once('/').context("a pod's key")?.0.to_owned();
    for index in pods..pods + more.saturating_sub(ended.records.len()) {
        ended.records.push((format!("{base}/{index}"), value.clone()));
    }
    Ok((ended, waiting, contents))
}

/// From the death of the controller that leads until the one that stands by accepts a job, with three members of etcd
/// and Mosquitto.
pub fn failover() -> Result<Vec<Figure>> {
    let dir = temporary()?;
    let port = free_port()?;
    let mut command = mosquitto::command(Ipv4Addr::LOCALHOST.into(), port, dir.path())?;
    let _mosquitto = Daemon::start(&mut command, &dir.path().join("mosquitto.log"))?;
    let etcd = Etcd::start(3, dir.path(), None);
    let controller = |name: &str| -> Result<Daemon> {
        let mut command = Command::new(program("berth-controller")?);
        command.args(["--dev", "--broker", &format!("mqtt://127.0.0.1:{port}"), "--store", &etcd.url()]);
        command.args(["--listen-http", &format!("127.0.0.1:{}", free_port()?), "--data-dir"]);
        Daemon::start(command.arg(dir.path().join(name)), &dir.path().join(format!("{name}.log")))
    };
    until("the broker listens", LIMIT, || std::net::TcpStream::connect(("127.0.0.1", port)).ok().map(drop))?;
    let mut leader = controller("c0")?;
    let mut submitter = Submitter::connect(port)?;
    submitter.until_answered()?;
    let mut takeovers = Vec::new();
    for n in 1..=5 {
        let next = controller(&format!("c{n}"))?;
        until("the next stands by", LIMIT, || {
            let log = std::fs::read_to_string(dir.path().join(format!("c{n}.log"))).ok()?;
            log.contains("standing by").then_some(())
        })?;
        let begun = Instant::now();
        leader.kill();
        submitter.until_answered()?;
        takeovers.push(begun.elapsed().as_secs_f64());
        leader = next;
    }
    let longest = takeovers.iter().copied().fold(0.0, f64::max);
    let median = percentile(&takeovers, 50.0).context("it was taken over")?;
    Ok(vec![
        Figure::peer("takeover by a standby, median of 5", median, "s"),
        Figure::asked("takeover by a standby, longest of 5", longest, "s", 5.0),
    ])
}

impl Submitter {
    /// Submits a job again and again until it is accepted.
    fn until_answered(&mut self) -> Result<()> {
        let end = Instant::now() + LIMIT;
        self.submit()?;
        while !self.open.is_empty() {
            ensure!(Instant::now() < end, "nobody answers");
            self.hear(Duration::from_millis(100))?;
            if !self.open.is_empty() {
                self.open.clear();
                self.next -= 1;
                self.submit()?;
            }
        }
        Ok(())
    }
}
