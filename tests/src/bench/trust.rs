//! What trusting nobody costs: signatures on what controller and agents say, and TLS when all come back at once.

use std::io::{BufRead as _, BufReader, Write as _};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use berth_controller::core::members::Member;
use berth_controller::io::ca::Ca;
use berth_controller::io::store::{Op, Store, StoreChoice};
use berth_protocol::codec;
use berth_protocol::hex;
use berth_protocol::ids::{ClusterName, NodeId};
use berth_protocol::join::Roles;
use berth_protocol::sign::{Key, Signer};
use berth_protocol::tls::{Credentials, Party};
use berth_protocol::topic::{NodeTopic, Topic};
use berth_protocol::units::Timestamp;
use rumqttc::{AsyncClient, Event, MqttOptions, Packet, TlsConfiguration, Transport};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject as _;

use super::figures::Figure;
use super::node::Face;
use super::process::{Daemon, free_port, until};
use super::world::{program, temporary};

/// The word by which the program of `make bench` is asked to be the agents.
pub const AGENTS: &str = "trust-agents";
const COUNT: usize = 5_000;
const FILES: usize = 4 * COUNT;
/// Messages a second of which the cost is told, each signed by one side and verified by the other.
const RATE: f64 = 500.0;
const MESSAGES: u32 = 5_000;
/// As agents do.
const BACKOFF_MIN: Duration = Duration::from_millis(200);
const BACKOFF_MAX: Duration = Duration::from_secs(10);
const LIMIT: Duration = Duration::from_secs(180);

pub fn trust() -> Result<Vec<Figure>> {
    let mut figures = envelope()?;
    figures.extend(reconnect()?);
    Ok(figures)
}

fn key(name: &str) -> Key {
    Key::derived(&[0; 32], name)
}

/// Of a core, at so many messages a second, the side that does more of it.
fn envelope() -> Result<Vec<Figure>> {
    let cluster = ClusterName::parse("default")?;
    let mut face = Face::new("node")?;
    let topic = Topic::node(&face.id, NodeTopic::Heartbeat);
    let plain = codec::encode(&topic, &face.heartbeat(std::iter::empty()))?;
    let signer = Signer::new(cluster.clone(), key("node"));
    let signed = codec::sign(&signer, &topic, &plain)?;
    let share = |begun: Instant| begun.elapsed().as_secs_f64() / f64::from(MESSAGES) * RATE * 100.0;
    let begun = Instant::now();
    for _ in 0..MESSAGES {
        std::hint::black_box(codec::sign(&signer, &topic, &plain)?);
    }
    let sign = share(begun);
    let begun = Instant::now();
    for _ in 0..MESSAGES {
        std::hint::black_box(codec::verify(&cluster, &topic, &signed)?);
    }
    let verify = share(begun);
    Ok(vec![
        Figure::asked("envelope: 500 messages a second verified", verify, "% of a core", 5.0),
        Figure::asked("envelope: 500 messages a second signed", sign, "% of a core", 5.0),
    ])
}

/// 5,000 agents with certificates, whose controller is killed with its broker, and started again.
fn reconnect() -> Result<Vec<Figure>> {
    let dir = temporary()?;
    let (mqtt, http) = (free_port()?, free_port()?);
    let data = dir.path().join("controller");
    let mut init = Command::new(program("berth-controller")?);
    init.args(["init", "--host", "127.0.0.1", "--config"]).arg(dir.path().join("controller.toml"));
    init.arg("--data-dir").arg(&data).arg("--admin-dir").arg(dir.path().join("admin"));
    init.args(["--listen-mqtt", &format!("127.0.0.1:{mqtt}"), "--listen-http", &format!("127.0.0.1:{http}")]);
    let made = init.output()?;
    ensure!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    let secret = let_in(&data)?;

    let log = |name: &str| dir.path().join(format!("{name}.log"));
    let start = || {
        let mut command = Command::new("prlimit");
        command.args([&format!("--nofile={FILES}:{FILES}")]).arg(program("berth-controller")?);
        command.arg("--config").arg(dir.path().join("controller.toml"));
        Daemon::start(&mut command, &log("controller"))
    };
    let listens = || std::net::TcpStream::connect(("127.0.0.1", mqtt)).ok().map(drop);
    let mut controller = start()?;
    until("the broker listens", LIMIT, listens)?;
    let mut agents = Agents::start(mqtt, &secret)?;
    agents.until_all_are_connected()?;

    controller.kill();
    until("all have noticed", LIMIT, || (agents.connected().ok()? == 0).then_some(()))?;
    let _controller = start()?;
    until("the broker listens again", LIMIT, listens)?;
    let begun = Instant::now();
    agents.until_all_are_connected()?;
    let back = begun.elapsed().as_secs_f64();
    Ok(vec![Figure::asked("5,000 agents over TLS: all back after the broker's restart", back, "s", 15.0)])
}

/// Makes members of all agents; the store's secret, as digits.
fn let_in(data: &std::path::Path) -> Result<String> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let cluster = ClusterName::parse("default")?;
        let mut store = Store::open(&StoreChoice::Embedded, data, &cluster).await?;
        let term = store.campaign().await?;
        let member = |n: usize| {
            let name = name(n);
            let key = key(&name).public();
            let member = Member { key, since: Timestamp(0), admin: false, roles: Roles::new() };
            let value = serde_json::to_vec(&member)?;
            anyhow::Ok(Op::Put { key: format!("member/{}", Party::Node(NodeId::parse(&name)?)), value })
        };
        store.txn(term, (0..COUNT).map(member).collect::<Result<_>>()?).await?;
        anyhow::Ok(hex::encode(&store.identity().secret))
    })
}

fn name(n: usize) -> String {
    format!("trust-{n}")
}

/// The other process. It ends with its standard input.
struct Agents {
    child: Child,
    answers: BufReader<std::process::ChildStdout>,
}

impl Agents {
    fn start(port: u16, secret: &str) -> Result<Self> {
        let mut command = Command::new("prlimit");
        command.args([&format!("--nofile={FILES}:{FILES}")]).arg(std::env::current_exe()?);
        command.args([AGENTS, &port.to_string(), secret]).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().context("the agents do not start")?;
        let answers = BufReader::new(child.stdout.take().context("they answer")?);
        Ok(Self { child, answers })
    }

    fn connected(&mut self) -> Result<usize> {
        writeln!(self.child.stdin.as_mut().context("they listen")?)?;
        let mut answer = String::new();
        self.answers.read_line(&mut answer)?;
        answer.trim().parse().context("the agents are gone")
    }

    fn until_all_are_connected(&mut self) -> Result<()> {
        until("all agents are connected", LIMIT, || (self.connected().ok()? == COUNT).then_some(()))
    }
}

impl Drop for Agents {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The program as agents: says how many are connected as often as it is asked, until its standard input ends.
pub fn agents(port: u16, secret: &str) -> Result<()> {
    let secret: [u8; 32] = hex::decode(secret).context("a secret has 32 bytes")?;
    let ca = Ca::of(&secret, &ClusterName::parse("default")?)?;
    let root = CertificateDer::from_pem_slice(ca.pem().as_bytes())?;
    let mut options = Vec::with_capacity(COUNT);
    for n in 0..COUNT {
        let (name, key) = (name(n), key(&name(n)));
        let certificate = ca.member(&Party::Node(NodeId::parse(&name)?), &key.public())?;
        let certificate = CertificateDer::from_pem_slice(certificate.as_bytes())?;
        let tls = Credentials::new(root.clone(), certificate, &key).client()?;
        let mut mqtt = MqttOptions::new(format!("{name}.nonce"), "127.0.0.1", port);
        mqtt.set_transport(Transport::tls_with_config(TlsConfiguration::Rustls(tls)));
        mqtt.set_keep_alive(Duration::from_secs(20));
        options.push(mqtt);
    }
    let connected = Arc::new(AtomicUsize::new(0));
    let of_agents = connected.clone();
    std::thread::spawn(move || {
        let Ok(runtime) = tokio::runtime::Builder::new_current_thread().enable_all().build() else { return };
        runtime.block_on(async {
            for options in options {
                tokio::spawn(connect(options, of_agents.clone()));
            }
            std::future::pending::<()>().await;
        });
    });
    for order in std::io::stdin().lines() {
        order?;
        println!("{}", connected.load(Ordering::Relaxed));
    }
    Ok(())
}

async fn connect(options: MqttOptions, connected: Arc<AtomicUsize>) {
    let (_client, mut mqtt) = AsyncClient::new(options, 4);
    let (mut up, mut pause) = (false, BACKOFF_MIN);
    loop {
        match mqtt.poll().await {
            Ok(Event::Incoming(Packet::ConnAck(_))) => {
                connected.fetch_add(1, Ordering::Relaxed);
                (up, pause) = (true, BACKOFF_MIN);
            }
            Ok(_) => {}
            Err(_) => {
                if std::mem::take(&mut up) {
                    connected.fetch_sub(1, Ordering::Relaxed);
                }
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(BACKOFF_MAX);
            }
        }
    }
}
