//! Real members of etcd on loopback, gone with their handle.

use std::net::TcpListener;
use std::path::Path;
use std::process::{Child, Command, Stdio};

/// A cluster; dropping it ends its members.
pub struct Etcd {
    /// `HOST:PORT` of each, for clients.
    pub members: Vec<String>,
    commands: Vec<Command>,
    children: Vec<Option<Child>>,
}

impl Etcd {
    /// Of `count` members, whose data and logs are in `dir`.
    pub fn start(count: usize, dir: &Path) -> Self {
        let held: Vec<TcpListener> =
            (0..2 * count).map(|_| TcpListener::bind("127.0.0.1:0").expect("loopback has ports")).collect();
        let addresses: Vec<String> =
            held.iter().map(|port| port.local_addr().expect("it is bound").to_string()).collect();
        drop(held);
        let (members, peers) = addresses.split_at(count);
        let cluster: Vec<String> =
            peers.iter().enumerate().map(|(n, peer)| format!("m{n}=http://{peer}")).collect();
        let commands: Vec<Command> = (0..count)
            .map(|n| {
                let log = std::fs::File::create(dir.join(format!("etcd{n}.log"))).expect("a log");
                let (own, peer) = (format!("http://{}", members[n]), format!("http://{}", peers[n]));
                let mut command = Command::new("etcd");
                command
                    .args(["--name", &format!("m{n}"), "--data-dir"])
                    .arg(dir.join(format!("etcd{n}")))
                    .args(["--listen-client-urls", &own, "--advertise-client-urls", &own])
                    .args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer])
                    .args(["--initial-cluster", &cluster.join(","), "--log-level", "warn"])
                    .stdin(Stdio::null())
                    .stdout(Stdio::null())
                    .stderr(log);
                command
            })
            .collect();
        let children = commands.iter().map(|_| None).collect();
        let mut etcd = Self { members: members.to_vec(), commands, children };
        (0..count).for_each(|n| etcd.revive(n));
        etcd
    }

    /// As a controller's `--store` wants them.
    pub fn url(&self) -> String {
        format!("etcd://{}", self.members.join(","))
    }

    /// Starts a member that is dead.
    pub fn revive(&mut self, member: usize) {
        self.children[member] =
            Some(self.commands[member].spawn().expect("etcd starts: apt install etcd-server"));
    }

    pub fn kill(&mut self, member: usize) {
        if let Some(mut child) = self.children[member].take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

impl Drop for Etcd {
    fn drop(&mut self) {
        (0..self.children.len()).for_each(|member| self.kill(member));
    }
}
