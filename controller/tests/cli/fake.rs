//! A broker (mosquitto on a free port), a controller made of one closure, and a depot made of a map.

use std::collections::BTreeMap;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::sync::{Arc, Mutex, mpsc};
use std::time::{Duration, Instant};

use berth_protocol::codec;
use berth_protocol::ids::{
    ClientId, ClusterName, Digest, Generation, JobName, Namespace, PodName, RequestId,
};
use berth_protocol::message::query::{Query, QueryRequest};
use berth_protocol::message::user::{Answer, JobCommand, Verdict};
use berth_protocol::topic::{JobTopic, Topic};
use rumqttc::{Client, Event, MqttOptions, Packet, QoS};
use serde_json::{Value, json};

pub const DEADLINE: Duration = Duration::from_secs(20);

pub struct Broker {
    child: Child,
    port: u16,
    _dir: tempfile::TempDir,
}

impl Broker {
    pub fn start() -> Self {
        Self::start_on(free_port())
    }

    pub fn start_on(port: u16) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let config = dir.path().join("mosquitto.conf");
        let text = format!(
            "listener {port} 127.0.0.1\nallow_anonymous true\nset_tcp_nodelay true\nuser root\nlog_type none\n"
        );
        std::fs::write(&config, text).unwrap();
        let child = Command::new("mosquitto")
            .args(["-c", config.to_str().unwrap()])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("these tests need mosquitto: apt install mosquitto");
        let until = Instant::now() + DEADLINE;
        while TcpStream::connect(("127.0.0.1", port)).is_err() {
            assert!(Instant::now() < until, "mosquitto does not listen");
            std::thread::sleep(Duration::from_millis(5));
        }
        Self { child, port, _dir: dir }
    }

    pub fn port(&self) -> u16 {
        self.port
    }

    pub fn url(&self) -> String {
        format!("mqtt://127.0.0.1:{}", self.port)
    }
}

impl Drop for Broker {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

pub fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

/// What users send.
#[derive(Debug)]
pub enum Request {
    Submit { job: JobName, payload: Vec<u8> },
    Command { job: JobName, command: JobCommand, payload: Vec<u8> },
    Query { client: ClientId, id: RequestId, query: Query },
}

/// How the fake controller and agents talk back.
#[derive(Clone)]
pub struct Bus {
    client: Client,
}

fn cluster() -> ClusterName {
    ClusterName::parse("default").unwrap()
}

pub fn namespace() -> Namespace {
    Namespace::default_namespace()
}

impl Bus {
    fn publish(&self, topic: &Topic, value: &impl serde::Serialize, retain: bool) {
        let payload = serde_json::to_vec(value).unwrap();
        self.client.publish(topic.render(&cluster()), QoS::AtLeastOnce, retain, payload).unwrap();
    }

    pub fn accept(&self, job: &JobName, id: Option<RequestId>, payload: &[u8], generation: u64) {
        let answer = Answer::new(id, payload, Verdict::accepted(Generation(generation)));
        self.publish(&Topic::job(&namespace(), job, JobTopic::Answer), &answer, false);
    }

    pub fn reject(&self, job: &JobName, id: Option<RequestId>, payload: &[u8], rejected: Value) {
        let verdict = Verdict::Rejected { rejected: serde_json::from_value(rejected).unwrap() };
        self.publish(
            &Topic::job(&namespace(), job, JobTopic::Answer),
            &Answer::new(id, payload, verdict),
            false,
        );
    }

    pub fn status(&self, status: &Value) {
        let job = JobName::parse(status["job"].as_str().unwrap()).unwrap();
        self.publish(&Topic::job(&namespace(), &job, JobTopic::Status), status, true);
    }

    pub fn log(&self, pod: &str, epoch: u64, seq: u64, stream: &str, text: &str) {
        let topic = Topic::Logs { namespace: namespace(), pod: PodName::parse(pod).unwrap() };
        let message =
            json!({"epoch": epoch, "container": "main", "stream": stream, "seq": seq, "text": text});
        self.publish(&topic, &message, false);
    }

    pub fn reply(&self, client: &ClientId, id: &RequestId, result: Value) {
        self.publish(
            &Topic::QueryReply { client: client.clone() },
            &json!({"id": id, "result": result}),
            false,
        );
    }

    pub fn refuse(&self, client: &ClientId, id: &RequestId, code: &str, message: &str) {
        let reply = json!({"id": id, "error": {"code": code, "message": message}});
        self.publish(&Topic::QueryReply { client: client.clone() }, &reply, false);
    }
}

/// Answers every request by `handle`, until dropped.
pub struct Controller {
    pub bus: Bus,
    _stop: mpsc::Sender<()>,
}

impl Controller {
    pub fn start(broker: &Broker, mut handle: impl FnMut(&Bus, Request) + Send + 'static) -> Self {
        let mut options =
            MqttOptions::new(format!("fake-{}", std::process::id()), "127.0.0.1", broker.port());
        options.set_max_packet_size(1 << 20, 1 << 20);
        let (client, mut connection) = Client::new(options, 256);
        let mut network = rumqttc::NetworkOptions::new();
        network.set_tcp_nodelay(true);
        connection.eventloop.set_network_options(network);
        let bus = Bus { client };
        let (stop, stopped) = mpsc::channel::<()>();
        let (ready, is_ready) = mpsc::channel();
        let theirs = bus.clone();
        std::thread::spawn(move || {
            loop {
                let event = connection.recv_timeout(Duration::from_millis(50));
                if stopped.try_recv() == Err(mpsc::TryRecvError::Disconnected) {
                    return;
                }
                match event {
                    Ok(Ok(Event::Incoming(Packet::ConnAck(_)))) => {
                        for filter in berth_protocol::topic::filter::controller(&cluster()) {
                            theirs.client.subscribe(filter, QoS::AtLeastOnce).unwrap();
                        }
                    }
                    Ok(Ok(Event::Incoming(Packet::SubAck(_)))) => drop(ready.send(())),
                    Ok(Ok(Event::Incoming(Packet::Publish(publish)))) => {
                        if let Some(request) = request(&publish.topic, &publish.payload) {
                            handle(&theirs, request);
                        }
                    }
                    Ok(Err(_)) => std::thread::sleep(Duration::from_millis(20)),
                    _ => {}
                }
            }
        });
        let filters = berth_protocol::topic::filter::controller(&cluster()).len();
        for _ in 0..filters {
            is_ready.recv_timeout(DEADLINE).expect("the fake controller does not connect");
        }
        Self { bus, _stop: stop }
    }
}

fn request(topic: &str, payload: &[u8]) -> Option<Request> {
    let topic = Topic::parse(&cluster(), topic)?;
    match &topic {
        Topic::Job { job, kind: JobTopic::Submit, .. } => {
            Some(Request::Submit { job: job.clone(), payload: payload.to_vec() })
        }
        Topic::Job { job, kind: JobTopic::Command, .. } => {
            let command = codec::decode(&topic, payload).unwrap();
            Some(Request::Command { job: job.clone(), command, payload: payload.to_vec() })
        }
        Topic::QueryRequest { client } => {
            let QueryRequest { id, query } = codec::decode(&topic, payload).unwrap();
            Some(Request::Query { client: client.clone(), id, query })
        }
        _ => None,
    }
}

/// A depot of one token.
#[derive(Clone)]
pub struct Depot {
    pub url: String,
    pub files: Arc<Mutex<BTreeMap<String, Vec<u8>>>>,
}

impl Depot {
    pub fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let depot = Self { url, files: Arc::default() };
        let files = depot.files.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let files = files.clone();
                std::thread::spawn(move || serve(stream.unwrap(), &files));
            }
        });
        depot
    }

    pub fn access(&self) -> Value {
        json!({"url": self.url, "token": "secret", "expires": 4_000_000_000_000u64})
    }
}

fn serve(stream: TcpStream, files: &Mutex<BTreeMap<String, Vec<u8>>>) {
    let mut reader = BufReader::new(stream.try_clone().unwrap());
    let mut stream = stream;
    loop {
        let mut head = String::new();
        while !head.ends_with("\r\n\r\n") {
            if reader.read_line(&mut head).unwrap_or(0) == 0 {
                return;
            }
        }
        let lower = head.to_lowercase();
        let length = lower
            .lines()
            .find_map(|line| line.strip_prefix("content-length: "))
            .map_or(0, |n| n.parse().unwrap());
        let mut body = vec![0; length];
        reader.read_exact(&mut body).unwrap();
        let mut words = head.split(' ');
        let (verb, path) = (words.next().unwrap(), words.next().unwrap().to_owned());
        let mut files = files.lock().unwrap();
        let (code, content) = match (verb, lower.contains("authorization: bearer secret")) {
            (_, false) => ("401 Unauthorized", b"no token".to_vec()),
            ("PUT", _) => {
                assert!(path.ends_with(&Digest::of(&body).hex()), "{path}");
                files.insert(path, body);
                ("201 Created", Vec::new())
            }
            (_, true) => match files.get(&path) {
                Some(content) => ("200 OK", content.clone()),
                None => ("404 Not Found", b"no such file".to_vec()),
            },
        };
        let head = format!("HTTP/1.1 {code}\r\ncontent-length: {}\r\n\r\n", content.len());
        stream.write_all(head.as_bytes()).unwrap();
        if verb != "HEAD" {
            stream.write_all(&content).unwrap();
        }
    }
}

/// The client, ready to be run.
pub fn berth(broker: &Broker, args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_berth"));
    command
        .args(args)
        .env_clear()
        .env("BERTH_BROKER", broker.url())
        .env("HOME", "/nonexistent")
        .stdin(Stdio::null());
    command
}

pub fn output(broker: &Broker, args: &[&str]) -> Ended {
    Ended::of(berth(broker, args).output().unwrap())
}

pub fn output_in(dir: &Path, broker: &Broker, args: &[&str]) -> Ended {
    Ended::of(berth(broker, args).current_dir(dir).output().unwrap())
}

#[derive(Debug, PartialEq, Eq)]
pub struct Ended {
    pub code: i32,
    pub out: String,
    pub err: String,
}

impl Ended {
    pub fn of(output: Output) -> Self {
        let text = |bytes| String::from_utf8(bytes).unwrap();
        Self { code: output.status.code().unwrap_or(-1), out: text(output.stdout), err: text(output.stderr) }
    }

    pub fn json(&self) -> Value {
        serde_json::from_str(&self.out).unwrap_or_else(|e| panic!("{e}: {self:?}"))
    }
}
