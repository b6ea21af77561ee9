//! The real daemon, started in-process: health, metrics, and the depot with its tokens, digests and bounds.

mod common;

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;

use berth_controller::config::BrokerChoice;
use berth_controller::io::depot::{Depot, Item};
use berth_protocol::broker::BrokerUrl;
use berth_protocol::ids::{ContainerName, Digest, Epoch, JobUid, Namespace, NodeId};
use berth_protocol::limits::OUTPUT_BYTES_MAX;
use berth_protocol::log::{Record, Stream};
use berth_protocol::token::{Scope, mint};
use berth_protocol::units::Timestamp;
use common::*;

const LATER: Timestamp = Timestamp(u64::MAX);

/// The daemon, and how to talk to it.
struct Http(TestDaemon);

impl Http {
    fn start(dir: &std::path::Path, broker: BrokerChoice) -> Self {
        Self(TestDaemon::start(dir, broker))
    }

    fn node(&self) -> String {
        mint(&self.0.secret, &Scope::Node(NodeId::parse("n1").unwrap()), LATER)
    }

    fn user(&self) -> String {
        mint(&self.0.secret, &Scope::Namespace(Namespace::default_namespace()), LATER)
    }

    /// Status and body.
    fn ask(&self, method: &str, path: &str, token: Option<&str>, body: &[u8]) -> (u16, Vec<u8>) {
        let length = format!("Content-Length: {}\r\n", body.len());
        self.ask_raw(method, path, token, &length, body)
    }

    fn ask_raw(
        &self,
        method: &str,
        path: &str,
        token: Option<&str>,
        headers: &str,
        body: &[u8],
    ) -> (u16, Vec<u8>) {
        let mut stream = TcpStream::connect(self.0.http).unwrap();
        stream.set_read_timeout(Some(DEADLINE)).unwrap();
        let token = token.map(|token| format!("Authorization: Bearer {token}\r\n")).unwrap_or_default();
        write!(stream, "{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n{token}{headers}\r\n")
            .unwrap();
        // A server that refuses does not read on.
        let _ = stream.write_all(body);
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer);
        let end = answer.windows(4).position(|four| four == b"\r\n\r\n").expect("a header");
        let head = String::from_utf8_lossy(&answer[..end]).into_owned();
        let status = head.split(' ').nth(1).unwrap().parse().unwrap();
        (status, answer[end + 4..].to_vec())
    }
}

fn blob(bytes: &[u8]) -> String {
    format!("/v1/blobs/{}", Digest::of(bytes).hex())
}

#[test]
fn health_and_metrics() {
    let dir = tempfile::tempdir().unwrap();
    let daemon = Http::start(dir.path(), BrokerChoice::Embedded);
    wait_until("it is healthy", || daemon.ask("GET", "/healthz", None, b"").0 == 200);
    assert_eq!(daemon.ask("GET", "/v1/blobs/x", None, b"").0, 404);
    assert_eq!(daemon.ask("GET", &blob(b"x"), None, b"").0, 401);
    let (status, text) = daemon.ask("GET", "/metrics", None, b"");
    let text = String::from_utf8(text).unwrap();
    assert_eq!(status, 200);
    assert!(
        text.contains("berth_bus_up 1") && text.contains("berth_refused_total{reason=\"token\"} 1"),
        "{text}"
    );
    drop(daemon);
    // Its ports, its lock and its files are free again.
    drop(Http::start(dir.path(), BrokerChoice::Embedded));
}

#[test]
fn without_a_broker_it_says_so_and_goes_on() {
    let dir = tempfile::tempdir().unwrap();
    let url = BrokerUrl::new(SocketAddr::from(([127, 0, 0, 1], free_port())));
    let daemon = Http::start(dir.path(), BrokerChoice::Url(url));
    let (status, why) = daemon.ask("GET", "/healthz", None, b"");
    assert_eq!((status, why), (503, b"the broker is not connected\n".to_vec()));
}

#[test]
fn blobs_are_kept_by_their_digest() {
    let dir = tempfile::tempdir().unwrap();
    let daemon = Http::start(dir.path(), BrokerChoice::Embedded);
    let (node, user) = (daemon.node(), daemon.user());
    let bytes: Vec<u8> = (0..300_000_u32).flat_map(u32::to_le_bytes).collect();
    assert_eq!(daemon.ask("GET", &blob(&bytes), Some(&user), b"").0, 404);
    assert_eq!(daemon.ask("HEAD", &blob(&bytes), Some(&user), b"").0, 404);
    assert_eq!(daemon.ask("PUT", &blob(&bytes), Some(&user), &bytes).0, 201);
    assert_eq!(daemon.ask("PUT", &blob(&bytes), Some(&node), &bytes).0, 201, "again is fine");
    assert_eq!(daemon.ask("HEAD", &blob(&bytes), Some(&node), b""), (200, Vec::new()));
    let (status, body) = daemon.ask("GET", &blob(&bytes), Some(&node), b"");
    assert!(status == 200 && body == bytes);
    let empty = daemon.ask("PUT", &blob(b""), Some(&user), b"");
    assert_eq!((empty.0, daemon.ask("GET", &blob(b""), Some(&user), b"")), (201, (200, Vec::new())));

    let (status, why) = daemon.ask("PUT", &blob(b"expected"), Some(&user), b"something else");
    assert_eq!(status, 400, "{}", String::from_utf8_lossy(&why));
    assert_eq!(daemon.ask("GET", &blob(b"expected"), Some(&user), b"").0, 404);
    let large = "Content-Length: 104857601\r\n";
    assert_eq!(daemon.ask_raw("PUT", &blob(b"large"), Some(&user), large, b"").0, 413);
    let large = format!("Content-Length: {}\r\n", OUTPUT_BYTES_MAX + 1);
    assert_eq!(daemon.ask_raw("PUT", &blob(b"large"), Some(&node), &large, b"").0, 413);
    let chunked = "Transfer-Encoding: chunked\r\n";
    assert_eq!(daemon.ask_raw("PUT", &blob(b"abc"), Some(&user), chunked, b"3\r\nabc\r\n0\r\n\r\n").0, 201);
    let half = dir.path().join("depot/tmp");
    wait_until("nothing half-made stays", || std::fs::read_dir(&half).unwrap().count() == 0);
}

#[test]
fn tokens_open_what_they_say() {
    let dir = tempfile::tempdir().unwrap();
    let daemon = Http::start(dir.path(), BrokerChoice::Embedded);
    let (node, user) = (daemon.node(), daemon.user());
    let expired = mint(&daemon.0.secret, &Scope::Namespace(Namespace::default_namespace()), Timestamp(1));
    let forged = mint(&[1; 32], &Scope::Namespace(Namespace::default_namespace()), LATER);
    let mut log = Vec::new();
    for seq in 1..=3 {
        let container = ContainerName::parse("main").unwrap();
        Record { seq, at: Timestamp(7), stream: Stream::Stdout, container, bytes: b"hello\n" }
            .write(&mut log);
    }
    let path = "/v1/logs/uid1/0/1";
    // token, method, path, status
    for (token, method, path, body, status) in [
        (None, "GET", path, &b""[..], 401),
        (Some("nonsense"), "GET", path, b"", 401),
        (Some(expired.as_str()), "GET", path, b"", 401),
        (Some(&forged), "GET", path, b"", 401),
        (Some(&user), "PUT", path, &log, 403),
        (Some(&user), "GET", path, b"", 404),
        (Some(&node), "PUT", path, b"not a log\n", 400),
        (Some(&node), "PUT", path, &log[..log.len() - 1], 400),
        (Some(&node), "PUT", path, &log, 201),
        (Some(&node), "GET", path, b"", 403),
        (Some(&user), "GET", path, b"", 200),
        (Some(&user), "DELETE", path, b"", 405),
    ] {
        let (got, why) = daemon.ask(method, path, token, body);
        assert_eq!(got, status, "{method} {token:?}: {}", String::from_utf8_lossy(&why));
    }
    assert_eq!(daemon.ask("GET", path, Some(&user), b"").1, log);
}

#[tokio::test]
async fn what_is_deleted_is_gone_with_its_directories() {
    let dir = tempfile::tempdir().unwrap();
    let depot = Arc::new(Depot::open(dir.path().to_owned(), None, &[7; 32], None).unwrap());
    let log = Item::Log { pod: JobUid::parse("uid1").unwrap().pod(0), epoch: Epoch(1) };
    let blob = Item::Blob(Digest::of(b"x"));
    for (item, bytes) in [(&log, &b""[..]), (&blob, b"x")] {
        depot.put(item, 10, http_body_util::Full::new(bytes::Bytes::copy_from_slice(bytes))).await.unwrap();
        assert!(depot.get(item).await.unwrap().is_some());
        depot.delete(item).await.unwrap();
        depot.delete(item).await.unwrap();
        assert!(depot.get(item).await.unwrap().is_none());
    }
    for kept in ["blobs", "logs"] {
        assert_eq!(std::fs::read_dir(dir.path().join(kept)).unwrap().count(), 0, "{kept}");
    }
}

#[test]
fn a_silent_peer_keeps_nobody_waiting() {
    let dir = tempfile::tempdir().unwrap();
    let daemon = Http::start(dir.path(), BrokerChoice::Embedded);
    let silent: Vec<_> = (0..100).map(|_| TcpStream::connect(daemon.0.http).unwrap()).collect();
    wait_until("it is healthy", || daemon.ask("GET", "/healthz", None, b"").0 == 200);
    drop(silent);
}
