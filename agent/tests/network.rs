//! Pods' networks for real: the bridge, the way out through address translation, none, the node's. Each test has a
//! network namespace of its own for a node, so that nothing of this machine's is touched.

#[allow(dead_code, reason = "each test binary uses its own part")]
#[path = "shim/world.rs"]
mod world;

use std::process::{Child, Command, Stdio};

use berth_agent::io::network::{self, Bridge, Reach};
use berth_protocol::job::Network;
use nix::sched::{CloneFlags, unshare};
use world::*;

/// This thread, and what it starts, becomes a node with its own network.
fn become_node() {
    unshare(CloneFlags::CLONE_NEWNET).unwrap();
    // Its own addresses of IPv6 are good at once.
    sh("ip link set lo up
        echo 0 >/proc/sys/net/ipv6/conf/default/accept_dad");
}

fn sh(script: &str) -> String {
    let output = Command::new("sh").args(["-ec", script]).output().unwrap();
    assert!(output.status.success(), "{script}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// Processes that end with the test; here for another machine at 198.51.100.2, which says hello on port 8080 and has no route to the pods.
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
    let bridge = Bridge::open(slots.path(), "/var/lib/a".as_ref(), &Reach::default()).unwrap();
    // A second agent, and the first one again.
    let second = Bridge::open(slots.path(), "/var/lib/b".as_ref(), &Reach::default()).unwrap();
    assert_ne!(bridge.slot(), second.slot());
    second.close();
    let slot = bridge.slot();
    drop(bridge);
    let bridge = Bridge::open(slots.path(), "/var/lib/a".as_ref(), &Reach::default()).unwrap();
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

/// A service of the node's own, on every address of it.
fn node_service(port: u16) -> Child {
    let child = Command::new("busybox")
        .args(["nc", "-ll", "-p", &port.to_string(), "-e", "/bin/echo", "hello"])
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    wait_for("the node's service", || sh("ss -ltn").contains(&format!(":{port}")));
    child
}

/// What a pod on the bridge gets an answer from, of what it must not reach and what it must.
fn reached(bridge: &Bridge, index: u8) -> String {
    let place = network::address(bridge.slot(), index, Vec::new()).unwrap();
    let gateway = place.gateway;
    let link = sh(&format!("ip -6 -o addr show dev {} scope link", place.bridge));
    let link = link.split_whitespace().nth(3).unwrap().split('/').next().unwrap();
    let mut pod = Pod::new(&format!(
        "while ip -6 addr show dev eth0 | grep -q tentative; do sleep 0.05; done
         ask() {{ busybox nc -w 5 $2 $3 </dev/null 2>/dev/null | grep -q hello && echo $1; }}
         ask gateway {gateway} 1883; ask node 198.51.100.1 1883; ask link {link}%eth0 1883
         ask dns {gateway} 53; ask metadata 169.254.169.254 8080; ask azure 168.63.129.16 8080
         ask world 198.51.100.2 8080
         busybox ping -c 1 -W 5 {gateway} >/dev/null && echo ping
         echo up >/run/berth/up; busybox nc -l -p 9000 -e /bin/echo answer"
    ));
    pod.task.template.network = Network::Bridge;
    let address = place.address;
    pod.task.network = Some(place);
    let mut agent = pod.start();
    wait_for("the pod's questions", || pod.run_berth("up").exists());
    // The node asks the pod, and is answered.
    let mut answer = String::new();
    wait_for("the pod's answer", || {
        answer = sh(&format!("busybox nc -w 5 {address} 9000 </dev/null || true"));
        !answer.is_empty()
    });
    assert_eq!(answer, "answer\n");
    agent.exited();
    pod.wait();
    pod.output().replace('\n', " ")
}

#[test]
fn pods_reach_neither_the_nodes_services_nor_its_keys_in_the_cloud() {
    become_node();
    let server = Server::new();
    let pid = server.0[1].id();
    for address in ["169.254.169.254", "168.63.129.16"] {
        sh(&format!(
            "nsenter -t {pid} -n ip addr add {address}/32 dev srv0; ip route add {address} via 198.51.100.2"
        ));
    }
    let _services = Server(vec![node_service(1883), node_service(53)]);
    let slots = tempfile::tempdir().unwrap();
    let open = |reach: &Reach| Bridge::open(slots.path(), "/var/lib/a".as_ref(), reach).unwrap();
    let allowed = Reach { metadata: true, node_ports: vec![1883] };
    // By nftables, then as on a machine that has iptables alone.
    for (turn, with) in ["nft", "iptables"].into_iter().enumerate() {
        let path = (with == "iptables").then(|| without_nft(slots.path()));
        let bridge = open(&Reach::default());
        assert_eq!(reached(&bridge, 2 * turn as u8), "dns world ping ", "{with}");
        drop(bridge);
        // The same pods where the node's configuration lets them.
        let bridge = open(&allowed);
        let all = "gateway node link dns metadata azure world ping ";
        assert_eq!(reached(&bridge, 2 * turn as u8 + 1), all, "{with}");
        wait_for("the pods' links to go", || !sh("ip -o link").contains(": bv"));
        bridge.close();
        if let Some(path) = path {
            // SAFETY: this test's process has no other thread that reads the environment now.
            unsafe { std::env::set_var("PATH", path) };
        }
    }
    let left = sh("nft list tables; iptables -S; ip6tables -S; iptables -t nat -S");
    assert!(!left.contains("berth"), "{left}");
}

/// Takes nft from the programs that are found by name; what PATH was.
fn without_nft(dir: &std::path::Path) -> String {
    let bin = dir.join("bin");
    std::fs::create_dir(&bin).unwrap();
    let path = std::env::var("PATH").unwrap();
    for from in path.split(':').rev().flat_map(|dir| std::fs::read_dir(dir).into_iter().flatten().flatten()) {
        let to = bin.join(from.file_name());
        let _ = std::fs::remove_file(&to);
        std::os::unix::fs::symlink(from.path(), to).unwrap();
    }
    std::fs::remove_file(bin.join("nft")).unwrap();
    // SAFETY: as above.
    unsafe { std::env::set_var("PATH", &bin) };
    path
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
fn a_bridge_stays_as_long_as_a_pod_is_on_it() {
    become_node();
    let slots = tempfile::tempdir().unwrap();
    let open = || Bridge::open(slots.path(), "/var/lib/a".as_ref(), &Reach::default()).unwrap();
    let bridge = open();
    let (slot, there) = (bridge.slot(), |name: &str| sh("ip -o link").contains(&format!(": {name}")));
    let (name, link) = (format!("berth{slot}"), format!("bv0ad5{slot:02x}07"));
    sh(&format!("ip link add {link} type veth peer name pod0; ip link set {link} master {name}"));
    bridge.close();
    assert!(there(&name));
    let again = open();
    assert_eq!(again.slot(), slot);
    sh(&format!("ip link del {link}"));
    again.close();
    assert!(!there(&name));
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
