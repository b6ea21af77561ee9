//! Pods' networks for real: the bridge, the way out through address translation, none, the node's. Each test has a
//! network namespace of its own for a node, so that nothing of this machine's is touched.

#[allow(dead_code, reason = "each test binary uses its own part")]
#[path = "shim/world.rs"]
mod world;

use std::process::{Child, Command, Stdio};

use berth_agent::io::network::{self, Bridge};
use berth_protocol::job::Network;
use nix::sched::{CloneFlags, unshare};
use world::*;

/// This thread, and what it starts, becomes a node with its own network.
fn become_node() {
    unshare(CloneFlags::CLONE_NEWNET).unwrap();
    sh("ip link set lo up");
}

fn sh(script: &str) -> String {
    let output = Command::new("sh").args(["-ec", script]).output().unwrap();
    assert!(output.status.success(), "{script}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// Another machine at 198.51.100.2, which says hello on port 8080 and has no route to the pods.
struct Server(Vec<Child>);

impl Server {
    fn new() -> Self {
        let holder = Command::new("unshare").args(["-n", "sleep", "1000"]).spawn().unwrap();
        let pid = holder.id();
        let own = std::fs::read_link("/proc/thread-self/ns/net").unwrap();
        wait_for("the server's namespace", || {
            std::fs::read_link(format!("/proc/{pid}/ns/net")).is_ok_and(|ns| ns != own)
        });
        sh(&format!(
            "ip link add up0 type veth peer name srv0 netns {pid}
             ip addr add 198.51.100.1/24 dev up0; ip link set up0 up
             nsenter -t {pid} -n ip addr add 198.51.100.2/24 dev srv0
             nsenter -t {pid} -n ip link set srv0 up"
        ));
        let listen = format!("exec nsenter -t {pid} -n busybox nc -ll -p 8080 -e /bin/echo hello");
        let server = Command::new("sh").args(["-c", &listen]).stderr(Stdio::null()).spawn().unwrap();
        wait_for("the server", || sh(&format!("nsenter -t {pid} -n ss -ltn")).contains(":8080"));
        Self(vec![server, holder])
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        for child in &mut self.0 {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

#[test]
fn a_pod_on_the_bridge_reaches_the_world() {
    become_node();
    let _server = Server::new();
    let slots = tempfile::tempdir().unwrap();
    let bridge = Bridge::open(slots.path(), "/var/lib/a".as_ref()).unwrap();
    // A second agent, and the first one again.
    let second = Bridge::open(slots.path(), "/var/lib/b".as_ref()).unwrap();
    assert_ne!(bridge.slot(), second.slot());
    second.close();
    let slot = bridge.slot();
    drop(bridge);
    let bridge = Bridge::open(slots.path(), "/var/lib/a".as_ref()).unwrap();
    assert_eq!(bridge.slot(), slot);

    let place = network::address(slot, 7, vec!["192.0.2.53".parse().unwrap()]).unwrap();
    let (own, gateway) = (place.address, place.gateway);
    let mut pod = Pod::new(&format!(
        "ip -o -4 addr; ip route; cat /etc/resolv.conf /etc/hosts /run/berth/pod.json
         busybox ping -c 1 -W 5 {gateway} >/dev/null && echo pinged
         busybox nc 198.51.100.2 8080 </dev/null; busybox nc 127.0.0.1 1 </dev/null || echo own loopback"
    ));
    pod.task.template.network = Network::Bridge;
    pod.task.network = Some(place);
    let output = pod.succeed();
    let (address, route) = (format!("{own}/24"), format!("default via {gateway}"));
    let told = format!("\"addresses\":[\"{own}\"]");
    for part in [&address, &route, &told, "nameserver 192.0.2.53", "pinged", "hello", "own loopback"] {
        assert!(output.contains(part), "{part}\n{output}");
    }
    pod.assert_clean();
    assert!(!sh("ip -o link").contains(": bv"));
    // The same address again, at once.
    assert!(pod_again(&mut pod).contains("hello"));
    // The shim says that the pod has ended before its link is gone.
    let end = std::time::Instant::now() + std::time::Duration::from_secs(20);
    while sh("ip -o link").contains(": bv") {
        assert!(std::time::Instant::now() < end, "the pod's link stays");
        std::thread::park_timeout(std::time::Duration::from_millis(20));
    }
    bridge.close();
    assert!(!sh("ip -o link").contains(": berth"));
    assert!(!sh("nft list tables").contains("berth"));
}

fn pod_again(pod: &mut Pod) -> String {
    pod.task.run = pod.task.run.next();
    pod.succeed()
}

#[test]
fn without_a_network_there_is_loopback_alone() {
    let output = Pod::new("ip -o link; busybox ping -c 1 127.0.0.1 >/dev/null && echo pinged").succeed();
    assert_eq!(output.lines().count(), 2, "{output}");
    assert!(output.contains("LOOPBACK,UP") && output.contains("pinged"), "{output}");
}

#[test]
fn the_nodes_network_is_the_nodes() {
    become_node();
    let own = std::fs::read_link("/proc/thread-self/ns/net").unwrap();
    let mut pod = Pod::new("readlink /proc/self/ns/net; cat /etc/hosts");
    pod.task.template.network = Network::Host;
    let output = pod.succeed();
    assert!(output.contains(own.to_str().unwrap()), "{output}");
}

#[test]
fn a_missing_bridge_is_said() {
    become_node();
    let mut pod = Pod::new("true");
    pod.task.template.network = Network::Bridge;
    pod.task.network = network::address(9, 0, Vec::new());
    let outcome = pod.run().outcome;
    assert_eq!(outcome.reason.as_deref(), Some("NetworkUnavailable"));
    assert!(outcome.message.unwrap().contains("berth9"));
    pod.assert_clean();
}
