//! What the tests of the controller's io share: brokers, clients, deadlines.
#![allow(dead_code, reason = "each test binary uses its own part")]

use std::net::{SocketAddr, TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use berth_controller::config::{Admission, BrokerChoice, Config};
use berth_controller::io::broker::{Broker, BrokerOptions, CONTROLLER_CLIENT_ID};
use berth_controller::io::bus::{Bus, BusEvent, BusEvents, BusOptions};
use berth_controller::io::metrics::Refusals;
use berth_controller::io::store::Sqlite;
use berth_controller::run::Daemon;
use berth_protocol::broker::BrokerUrl;
use berth_protocol::ids::ClusterName;
use berth_protocol::topic::Topic;

pub const DEADLINE: Duration = Duration::from_secs(30);
pub const PASSWORD: &str = "secret";

pub fn cluster() -> ClusterName {
    ClusterName::parse("lab").unwrap()
}

pub fn topic(rest: &str) -> Topic {
    Topic::parse(&cluster(), &format!("berth/v1/lab/{rest}")).unwrap()
}

pub fn filter(rest: &str) -> String {
    format!("berth/v1/lab/{rest}")
}

pub fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

pub fn wait_until(what: &str, mut holds: impl FnMut() -> bool) {
    let end = Instant::now() + DEADLINE;
    while !holds() {
        assert!(Instant::now() < end, "waited in vain until {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Mosquitto on a port; ended when dropped.
pub struct Mosquitto {
    child: Child,
    pub port: u16,
}

impl Mosquitto {
    /// `None` where it is not installed; the test says so.
    pub fn start(port: u16) -> Option<Self> {
        let program = ["/usr/sbin/mosquitto", "/usr/bin/mosquitto"]
            .into_iter()
            .find(|p| std::path::Path::new(p).exists());
        let Some(program) = program else {
            eprintln!("SKIPPED: mosquitto is not installed");
            return None;
        };
        let child = Command::new(program)
            .args(["-p", &port.to_string()])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        wait_until("mosquitto listens", || TcpStream::connect(("127.0.0.1", port)).is_ok());
        Some(Self { child, port })
    }

    pub fn url(&self) -> BrokerUrl {
        BrokerUrl::new(SocketAddr::from(([127, 0, 0, 1], self.port)))
    }
}

impl Drop for Mosquitto {
    /// SIGKILL: nothing said to anybody.
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

pub fn embedded(port: u16, refusals: &Arc<Refusals>) -> Broker {
    let listen = SocketAddr::from(([127, 0, 0, 1], port));
    let options =
        BrokerOptions { listen, cluster: cluster(), network: None, password: PASSWORD.to_owned(), tls: None };
    Broker::start(options, refusals.clone()).unwrap()
}

/// A client that hears `filters`, retained messages too.
pub async fn client(url: BrokerUrl, id: &str, filters: &[&str]) -> (Bus, BusEvents, Arc<Refusals>) {
    let refusals = Arc::new(Refusals::default());
    let credentials = (id == CONTROLLER_CLIENT_ID).then(|| (id.to_owned(), PASSWORD.to_owned()));
    let filters = filters.iter().map(|rest| filter(rest)).collect();
    let options = BusOptions {
        url,
        cluster: cluster(),
        client_id: id.to_owned(),
        credentials,
        filters,
        retained: true,
        tls: None,
        voucher: None,
    };
    let (bus, mut events) = Bus::connect(options, refusals.clone());
    assert_eq!(next(&mut events).await, BusEvent::Up);
    (bus, events, refusals)
}

pub async fn next(events: &mut BusEvents) -> BusEvent {
    tokio::time::timeout(DEADLINE, events.next()).await.expect("no event in time").expect("the bus ended")
}

pub async fn next_message(events: &mut BusEvents) -> (String, Vec<u8>) {
    loop {
        if let BusEvent::Message { topic, payload, .. } = next(events).await {
            return (topic.to_string(), payload);
        }
    }
}

/// A daemon on a thread of its own, so that tests may block.
pub struct TestDaemon {
    pub http: SocketAddr,
    pub mqtt: Option<SocketAddr>,
    pub secret: [u8; 32],
    stop: Option<tokio::sync::oneshot::Sender<()>>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl TestDaemon {
    pub fn start(dir: &std::path::Path, broker: BrokerChoice) -> Self {
        let secret = Sqlite::open(dir).unwrap().identity().secret;
        let config = Config {
            data_dir: dir.to_owned(),
            store: berth_controller::io::store::StoreChoice::Embedded,
            cluster: cluster(),
            broker,
            listen_mqtt: ([127, 0, 0, 1], 0).into(),
            listen_http: ([127, 0, 0, 1], 0).into(),
            depot_url: None,
            depot: None,
            checkpoint_quota: None,
            namespaces: std::collections::BTreeMap::new(),
            moves: 8,
            admission: Admission::Dev(None),
        };
        let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
        let (ready, started) = std::sync::mpsc::channel();
        let thread = std::thread::spawn(move || {
            tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(async {
                let daemon = Daemon::start(config).await.unwrap();
                ready.send((daemon.http_address(), daemon.mqtt_address())).unwrap();
                daemon.run(async { drop(stopped.await) }).await.unwrap();
            });
        });
        let (http, mqtt) = started.recv().unwrap();
        Self { http, mqtt, secret, stop: Some(stop), thread: Some(thread) }
    }
}

impl Drop for TestDaemon {
    fn drop(&mut self) {
        drop(self.stop.take());
        self.thread.take().unwrap().join().unwrap();
    }
}
