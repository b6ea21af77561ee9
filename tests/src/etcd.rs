//! Real members of etcd: what starts them, and a cluster of them on loopback, gone with its handle.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use crate::ports::free_ports;

/// A cluster; dropping it ends its members.
pub struct Etcd {
    /// `HOST:PORT` of each, for clients.
    pub members: Vec<String>,
    commands: Vec<Command>,
    children: Vec<Option<Child>>,
}

/// Where a member listens, as `HOST:PORT`.
pub struct Place {
    /// For clients.
    pub client: String,
    /// For the other members.
    pub peer: String,
}

/// Files in PEM with which members let in none but clients that have certificates.
pub struct Tls {
    pub ca: PathBuf,
    pub cert: PathBuf,
    pub key: PathBuf,
}

/// What starts each member of a cluster at these places; data and logs are in `dir`.
pub fn commands(places: &[Place], dir: &Path, tls: Option<&Tls>) -> Vec<Command> {
    let cluster: Vec<String> =
        places.iter().enumerate().map(|(n, place)| format!("m{n}=http://{}", place.peer)).collect();
    let command = |(n, place): (usize, &Place)| {
        let log = std::fs::File::create(dir.join(format!("etcd{n}.log"))).expect("a log");
        let scheme = if tls.is_some() { "https" } else { "http" };
        let (own, peer) = (format!("{scheme}://{}", place.client), format!("http://{}", place.peer));
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
        if let Some(Tls { ca, cert, key }) = tls {
            command.arg("--client-cert-auth").arg("--trusted-ca-file").arg(ca);
            command.arg("--cert-file").arg(cert).arg("--key-file").arg(key);
        }
        command
    };
    places.iter().enumerate().map(command).collect()
}

/// A cluster as a controller's `--store` wants it.
pub fn url<'a>(clients: impl Iterator<Item = &'a str>) -> String {
    format!("etcd://{}", clients.collect::<Vec<_>>().join(","))
}

impl Etcd {
    /// Of `count` members, whose data and logs are in `dir`.
    pub fn start(count: usize, dir: &Path, tls: Option<&Tls>) -> Self {
        let ports = free_ports(2 * count).into_iter();
        let addresses: Vec<String> = ports.map(|port| format!("127.0.0.1:{port}")).collect();
        let (members, peers) = addresses.split_at(count);
        let pairs = members.iter().zip(peers);
        let places: Vec<Place> =
            pairs.map(|(client, peer)| Place { client: client.clone(), peer: peer.clone() }).collect();
        let commands = commands(&places, dir, tls);
        let children = commands.iter().map(|_| None).collect();
        let mut etcd = Self { members: members.to_vec(), commands, children };
        (0..count).for_each(|n| etcd.revive(n));
        etcd
    }

    /// As a controller's `--store` wants them.
    pub fn url(&self) -> String {
        url(self.members.iter().map(String::as_str))
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
