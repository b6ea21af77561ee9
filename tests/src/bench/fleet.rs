//! Ten thousand agents over Mosquitto, in a process of their own, each with a connection of its own: what the
//! controller spends on them, how soon it knows of a heartbeat, and what a restart of the broker costs.

use std::collections::BTreeMap;
use std::io::{BufRead as _, BufReader, Write as _};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::Arc;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use berth_protocol::codec;
use berth_protocol::ids::{Epoch, PodId, Run, StoreId};
use berth_protocol::limits::EVENTS_PER_MESSAGE_MAX;
use berth_protocol::message::node::{Desired, Events, Lease, NodeEvent, NumberedEvent, PodChange, PodEvent};
use berth_protocol::pod::Goal;
use berth_protocol::topic::{NodeTopic, Topic};
use berth_protocol::units::Timestamp;
use rumqttc::{AsyncClient, Event, EventLoop, MqttOptions, Packet, QoS};
use serde_json::json;

use super::figures::{Figure, percentile};
use super::flood::now;
use super::node::{Face, KINDS};
use super::process::{Daemon, MIB, cpu_time, free_port, pss, until};
use super::user::User;
use super::world::{program, temporary};

/// The word by which the program of `make bench` is asked to be the agents.
pub const AGENTS: &str = "fleet-agents";
const COUNT: usize = 10_000;
/// What the broker may open, and the agents.
const FILES: usize = 2 * COUNT;
const JOBS: usize = 10;
const PODS_PER_JOB: usize = 100;
const BEAT: Duration = Duration::from_secs(10);
/// While unanswered.
const BEAT_AGAIN: Duration = Duration::from_secs(2);
/// Of each, for its connection to come back.
const BACKOFF: Duration = Duration::from_secs(5);
/// For all to be there.
const LIMIT: Duration = Duration::from_secs(180);

/// `BENCH_SECONDS` shortens the ten minutes for whoever develops.
fn length() -> Duration {
    let seconds = std::env::var("BENCH_SECONDS").ok().and_then(|text| text.parse().ok()).unwrap_or(600);
    Duration::from_secs(seconds)
}

pub fn fleet() -> Result<Vec<Figure>> {
    let dir = temporary()?;
    let log = |name: &str| dir.path().join(format!("{name}.log"));
    let port = free_port()?;
    let config = dir.path().join("mosquitto.conf");
    std::fs::write(&config, format!("listener {port} 127.0.0.1\nallow_anonymous true\npersistence false\n"))?;
    let broker = || {
        // A connection is a file.
        let mut command = Command::new("prlimit");
        command.args([&format!("--nofile={FILES}:{FILES}"), "mosquitto", "-c"]).arg(&config);
        Daemon::start(&mut command, &log("mosquitto"))
    };
    let listens = || std::net::TcpStream::connect(("127.0.0.1", port)).ok().map(drop);
    let mut mosquitto = broker()?;
    until("the broker listens", LIMIT, listens)?;
    let mut command = Command::new(program("berth-controller")?);
    command.args(["--dev", "--broker", &format!("mqtt://127.0.0.1:{port}"), "--listen-http"]);
    command.arg(format!("127.0.0.1:{}", free_port()?)).arg("--data-dir").arg(dir.path().join("ctl"));
    let controller = Daemon::start(&mut command, &log("controller"))?;
    let said = || std::fs::read_to_string(log("controller")).unwrap_or_default();
    until("the controller is there", LIMIT, || said().contains("connected to the broker").then_some(()))?;

    let mut agents = Agents::start(port)?;
    agents.until_all_are_granted()?;
    let mut user = User::connect(port, "fleet-user")?;
    for job in 0..JOBS {
        let file = json!({
            "image": "host", "command": ["sleep", "infinity"], "parallelism": PODS_PER_JOB, "completions": PODS_PER_JOB
        });
        user.submit(&format!("fleet-{job}"), &file)?;
    }
    let mut running = BTreeMap::new();
    let all_run =
        |running: &BTreeMap<String, u64>| running.values().sum::<u64>() == (JOBS * PODS_PER_JOB) as u64;
    let end = Instant::now() + LIMIT;
    while !all_run(&running) {
        ensure!(Instant::now() < end, "not all pods run: {running:?}");
        if let Some(status) = user.hear(Duration::from_secs(1))? {
            let count = status.body["podCounts"]["Running"].as_u64().unwrap_or(0);
            running.insert(status.job.clone(), count);
        }
    }

    agents.report()?;
    let (begun, cpu) = (Instant::now(), cpu_time(controller.pid())?);
    std::thread::sleep(length());
    let busy = (cpu_time(controller.pid())? - cpu).as_secs_f64() / begun.elapsed().as_secs_f64() * 100.0;
    let size = pss(controller.pid())? / MIB;
    let steady = agents.report()?;
    let silent = said().matches(" is silent").count() + said().matches(" is lost").count();

    mosquitto.kill();
    agents.mark()?;
    mosquitto = broker()?;
    let begun = Instant::now();
    until("the broker listens again", LIMIT, listens)?;
    agents.until_all_are_granted()?;
    let back = begun.elapsed().as_secs_f64();
    let lost = said().matches(" is lost").count();
    let mut evictions = 0;
    while let Some(status) = user.hear(Duration::from_secs(2)).unwrap_or(None) {
        evictions += status.body["evictions"].as_u64().unwrap_or(0);
    }
    drop(mosquitto);
    let told = |value: Option<f64>| value.context("no heartbeat was answered");
    Ok(vec![
        Figure::asked("10,000 agents: controller CPU", busy, "%", 30.0),
        Figure::asked("10,000 agents: controller PSS", size, "MiB", 250.0),
        Figure::peer("10,000 agents: heartbeat to its answer, median", told(steady.median)?, "ms"),
        Figure::asked("10,000 agents: heartbeat to its answer, p99", told(steady.p99)?, "ms", 500.0),
        Figure::asked("10,000 agents: false silences and losses", silent as f64, "", 0.0),
        Figure::asked("10,000 agents: all back after a broker's restart", back, "s", 60.0),
        Figure::asked("10,000 agents: losses and evictions by it", (lost as u64 + evictions) as f64, "", 0.0),
    ])
}

/// The other process. It ends with its standard input.
struct Agents {
    child: Child,
    orders: ChildStdin,
    answers: BufReader<ChildStdout>,
}

/// What the agents saw since the last report.
#[derive(serde::Serialize, serde::Deserialize)]
struct Report {
    /// That were granted something since the last mark.
    granted: usize,
    median: Option<f64>,
    p99: Option<f64>,
}

impl Agents {
    fn start(port: u16) -> Result<Self> {
        let mut command = Command::new(std::env::current_exe()?);
        command.args([AGENTS, &port.to_string()]).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().context("the agents do not start")?;
        let orders = child.stdin.take().context("they listen")?;
        let answers = BufReader::new(child.stdout.take().context("they answer")?);
        Ok(Self { child, orders, answers })
    }

    fn ask(&mut self, order: &str) -> Result<Report> {
        writeln!(self.orders, "{order}")?;
        let mut answer = String::new();
        self.answers.read_line(&mut answer)?;
        serde_json::from_str(&answer).context("the agents are gone")
    }

    fn report(&mut self) -> Result<Report> {
        self.ask("report")
    }

    /// From here on grants count anew.
    fn mark(&mut self) -> Result<()> {
        self.ask("mark").map(drop)
    }

    fn until_all_are_granted(&mut self) -> Result<()> {
        let end = Instant::now() + LIMIT;
        loop {
            let granted = self.report()?.granted;
            if granted == COUNT {
                return Ok(());
            }
            ensure!(Instant::now() < end, "{granted} of {COUNT} agents are granted");
            std::thread::sleep(Duration::from_millis(200));
        }
    }
}

impl Drop for Agents {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Shared by all agents of the process.
#[derive(Default)]
struct Seen {
    /// By mark, how many agents were granted first after it.
    granted: usize,
    mark: u64,
    /// From heartbeats to their answers, in milliseconds, since the last report.
    waits: Vec<f64>,
}

/// The program as agents: until its standard input ends.
pub fn agents(port: u16) -> Result<()> {
    let limit = libc::rlimit { rlim_cur: FILES as u64, rlim_max: FILES as u64 };
    // SAFETY: it only reads `limit`.
    ensure!(
        unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit) } == 0,
        "a connection is a file: be root"
    );
    let seen = Arc::new(Mutex::new(Seen::default()));
    let of_agents = seen.clone();
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let Ok(runtime) = runtime else { return };
        runtime.block_on(async {
            for node in 0..COUNT {
                if let Ok(agent) = Agent::new(node, port, of_agents.clone()) {
                    tokio::spawn(agent.run());
                }
                // As machines that start one after the other.
                if node % 10 == 9 {
                    tokio::time::sleep(Duration::from_millis(10)).await;
                }
            }
            std::future::pending::<()>().await;
        });
    });
    for order in std::io::stdin().lines() {
        let order = order?;
        let mut seen = seen.lock().map_err(|_| anyhow::anyhow!("an agent panicked"))?;
        if order == "mark" {
            (seen.mark, seen.granted) = (seen.mark + 1, 0);
        }
        let waits = std::mem::take(&mut seen.waits);
        let report =
            Report { granted: seen.granted, median: percentile(&waits, 50.0), p99: percentile(&waits, 99.0) };
        println!("{}", serde_json::to_string(&report)?);
    }
    Ok(())
}

/// One node, as far as the controller can tell.
struct Agent {
    face: Face,
    client: AsyncClient,
    mqtt: EventLoop,
    seen: Arc<Mutex<Seen>>,
    sent: Option<(u64, Instant)>,
    /// The mark after which it was granted last.
    mark: Option<u64>,
    store: Option<StoreId>,
    pods: BTreeMap<PodId, Epoch>,
    events: Vec<NumberedEvent>,
    last: u64,
    acked: u64,
    subscribed: usize,
}

impl Agent {
    fn new(node: usize, port: u16, seen: Arc<Mutex<Seen>>) -> Result<Self> {
        let face = Face::new(&format!("fleet-{node}"))?;
        let mut options = MqttOptions::new(face.client(), "127.0.0.1", port);
        options.set_max_packet_size(96 * 1024, 96 * 1024);
        options.set_keep_alive(BEAT * 2);
        let (client, mqtt) = AsyncClient::new(options, 16);
        Ok(Self {
            face,
            client,
            mqtt,
            seen,
            sent: None,
            mark: None,
            store: None,
            pods: BTreeMap::new(),
            events: Vec::new(),
            last: 0,
            acked: 0,
            subscribed: 0,
        })
    }

    async fn run(mut self) {
        let mut beat_at = tokio::time::Instant::now() + BEAT;
        loop {
            tokio::select! {
                event = self.mqtt.poll() => match event {
                    Ok(Event::Incoming(Packet::ConnAck(_))) => {
                        self.subscribed = 0;
                        for kind in KINDS {
                            let _ = self.client.try_subscribe(self.face.topic(kind), QoS::AtLeastOnce);
                        }
                    }
                    Ok(Event::Incoming(Packet::SubAck(_))) => {
                        self.subscribed += 1;
                        if self.subscribed == KINDS.len() {
                            self.hello();
                            self.beat();
                            beat_at = tokio::time::Instant::now() + BEAT_AGAIN;
                        }
                    }
                    Ok(Event::Incoming(Packet::Publish(message))) => {
                        let answered = self.take(&message.topic, &message.payload);
                        if answered {
                            beat_at = tokio::time::Instant::now() + BEAT;
                        }
                    }
                    Ok(_) => {}
                    Err(_) => tokio::time::sleep(BACKOFF.mul_f64(fastrand::f64())).await,
                },
                () = tokio::time::sleep_until(beat_at) => {
                    self.beat();
                    beat_at = tokio::time::Instant::now() + BEAT_AGAIN;
                }
            }
        }
    }

    fn send<T: serde::Serialize>(&self, kind: NodeTopic, message: &T) {
        if let Some((topic, qos, payload)) = self.face.message(kind, message) {
            // What finds no place is sent again by the next beat.
            let _ = self.client.try_publish(topic, qos, false, payload);
        }
    }

    fn hello(&self) {
        let held = self.pods.iter().map(|(pod, epoch)| (pod, *epoch));
        self.send(NodeTopic::Hello, &self.face.hello(self.store.clone(), (self.acked, self.last), held));
    }

    fn beat(&mut self) {
        let beat = self.face.heartbeat(self.pods.iter().map(|(pod, epoch)| (pod, *epoch)));
        self.sent = Some((beat.seq, Instant::now()));
        self.send(NodeTopic::Heartbeat, &beat);
        for events in self.events.chunks(EVENTS_PER_MESSAGE_MAX) {
            let (nonce, ledger) = (self.face.nonce.clone(), self.face.ledger.clone());
            self.send(NodeTopic::Event, &Events { nonce, ledger, events: events.to_vec() });
        }
    }

    /// True: the last heartbeat was answered.
    fn take(&mut self, topic: &str, payload: &[u8]) -> bool {
        let Some(topic) = Topic::parse(&self.face.cluster, topic) else { return false };
        match &topic {
            Topic::Node { kind: NodeTopic::Lease, .. } => {
                let Ok(lease) = codec::decode::<Lease>(&topic, payload) else { return false };
                if lease.hello {
                    self.hello();
                    return false;
                }
                self.store = Some(lease.store);
                self.face.last_grant = self.face.last_grant.max(Some(lease.seq));
                if lease.ledger == self.face.ledger {
                    self.acked = self.acked.max(lease.acked);
                    self.events.retain(|event| event.n > lease.acked);
                }
                self.count(lease.seq)
            }
            Topic::Node { kind: NodeTopic::Desired, .. } => {
                if let Ok(desired) = codec::decode::<Desired>(&topic, payload) {
                    self.desired(&desired);
                }
                false
            }
            _ => false,
        }
    }

    fn count(&mut self, seq: u64) -> bool {
        let Ok(mut seen) = self.seen.lock() else { return false };
        if self.mark != Some(seen.mark) {
            self.mark = Some(seen.mark);
            seen.granted += 1;
        }
        match self.sent {
            Some((sent, at)) if sent == seq => {
                seen.waits.push(at.elapsed().as_secs_f64() * 1000.0);
                self.sent = None;
                true
            }
            _ => false,
        }
    }

    fn desired(&mut self, desired: &Desired) {
        if (desired.term, desired.generation) <= self.face.order {
            return;
        }
        self.face.order = (desired.term, desired.generation);
        let wanted: BTreeMap<PodId, Epoch> = desired
            .pods
            .iter()
            .filter(|pod| pod.goal == Goal::Run)
            .map(|pod| (pod.pod.clone(), pod.epoch))
            .collect();
        for (pod, epoch) in wanted.iter().filter(|(pod, _)| !self.pods.contains_key(*pod)) {
            self.last += 1;
            let event = PodEvent { pod: pod.clone(), epoch: *epoch, run: Run(1), change: PodChange::Running };
            let at: Timestamp = now();
            self.events.push(NumberedEvent { n: self.last, at, event: NodeEvent::Pod(event) });
        }
        self.pods = wanted;
        self.beat();
    }
}
