//! A private cluster of the real programs on loopback, in a temporary directory, gone with its handle.

use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::process::{Daemon, free_port, is_healthy, shims, until};
use super::user::User;
use crate::mosquitto;

/// Who carries the messages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Broker {
    Embedded,
    Mosquitto,
}

pub struct World {
    // Programs end before their directory goes, and agents before what they speak to.
    pub agent: Option<Daemon>,
    /// By the name of its node; only where the figure is of two.
    another: Option<(String, Daemon)>,
    pub controller: Daemon,
    _mosquitto: Option<Daemon>,
    dir: tempfile::TempDir,
    port: u16,
}

/// A directory that goes with its handle.
pub fn temporary() -> std::io::Result<tempfile::TempDir> {
    tempfile::Builder::new().prefix("berth-bench").tempdir()
}

/// A program of this build.
pub fn program(name: &str) -> Result<PathBuf> {
    let here = std::env::current_exe()?;
    let path = here.parent().context("a program lies in a directory")?.join(name);
    ensure!(path.exists(), "{} is not there: build the whole workspace first", path.display());
    Ok(path)
}

/// `bench.jsonl` in the target directory that this program lies in.
pub fn figures_file() -> PathBuf {
    let here = std::env::current_exe().unwrap_or_default();
    here.ancestors().nth(2).unwrap_or(&here).join("bench.jsonl")
}

impl World {
    /// A controller without any agent.
    pub fn new(broker: Broker) -> Result<Self> {
        let dir = temporary()?;
        let (port, http) = (free_port()?, free_port()?);
        let address = format!("127.0.0.1:{port}");
        let log = |name: &str| dir.path().join(format!("{name}.log"));
        let url = format!("mqtt://{address}");
        let (mosquitto, url) = match broker {
            Broker::Embedded => (None, "embedded".to_owned()),
            Broker::Mosquitto => {
                let mut command = mosquitto::command(Ipv4Addr::LOCALHOST.into(), port, dir.path())?;
                (Some(Daemon::start(&mut command, &log("mosquitto"))?), url)
            }
        };
        let mut command = Command::new(program("berth-controller")?);
        command.args(["--dev", "--broker", &url, "--listen-mqtt", &address, "--listen-http"]);
        command.arg(format!("127.0.0.1:{http}")).arg("--data-dir").arg(dir.path().join("ctl"));
        let controller = Daemon::start(&mut command, &log("controller"))?;
        // What is said before it has subscribed nobody hears.
        until("the controller hears", Duration::from_secs(20), || is_healthy(http).then_some(()))?;
        Ok(Self { agent: None, another: None, controller, _mosquitto: mosquitto, dir, port })
    }

    /// A controller with its own broker, and an agent of this capacity.
    pub fn with_agent(capacity: &str) -> Result<Self> {
        let mut world = Self::new(Broker::Embedded)?;
        world.start_agent(capacity)?;
        Ok(world)
    }

    /// Returns when the agent is online.
    pub fn start_agent(&mut self, capacity: &str) -> Result<()> {
        self.agent = Some(self.started(&self.node(), "agent", capacity)?);
        Ok(())
    }

    /// A second agent, on a node of its own, whose name is returned.
    pub fn start_another(&mut self, capacity: &str) -> Result<String> {
        let node = format!("{}-b", self.node());
        self.another = Some((node.clone(), self.started(&node, "another", capacity)?));
        Ok(node)
    }

    /// The first agent's node.
    pub fn node(&self) -> String {
        // Not this host's own name, which a real agent here may have.
        format!("bench-{}", self.port)
    }

    /// `name` is that of its directory and its log.
    fn started(&self, node: &str, name: &str, capacity: &str) -> Result<Daemon> {
        let mut command = Command::new(program("berth-agent")?);
        // The label tells `berth run` that the working directory is here already.
        let host = std::fs::read_to_string("/proc/sys/kernel/hostname")?;
        let label = format!("hostname={}", host.trim());
        command.args(["--dev", "--broker", &self.url(), "--node", node, "--label", &label]);
        command.args(["--capacity", capacity]);
        command.arg("--data-dir").arg(self.dir.path().join(name));
        let agent = Daemon::start(&mut command, &self.dir.path().join(format!("{name}.log")))?;
        until("the agent is online", Duration::from_secs(30), || {
            let output = self.berth().ok()?.args(["get", "nodes", "-o", "json"]).output().ok()?;
            let nodes: Value = serde_json::from_slice(&output.stdout).ok()?;
            nodes.as_array()?.iter().any(|row| row["node"] == node && row["state"] == "online").then_some(())
        })?;
        Ok(agent)
    }

    /// The process of a node's agent.
    pub fn agent_of(&self, node: &str) -> Result<u32> {
        match &self.another {
            Some((name, agent)) if name == node => Ok(agent.pid()),
            _ => self.agent_pid(),
        }
    }

    pub fn agent_pid(&self) -> Result<u32> {
        Ok(self.agent.as_ref().context("the world has no agent")?.pid())
    }

    fn url(&self) -> String {
        format!("mqtt://127.0.0.1:{}", self.port)
    }

    pub fn port(&self) -> u16 {
        self.port
    }

    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    pub fn agent_dir(&self) -> PathBuf {
        self.dir.path().join("agent")
    }

    pub fn user(&self) -> Result<User> {
        User::connect(self.port, "bench-user")
    }

    /// The client, speaking to this cluster.
    pub fn berth(&self) -> Result<Command> {
        let mut command = Command::new(program("berth")?);
        command.env("BERTH_BROKER", self.url());
        Ok(command)
    }

    /// What `berth logs` prints of a job.
    pub fn logs(&self, job: &str) -> Result<String> {
        self.done(&["logs", job])
    }

    /// What `berth` prints to these words.
    pub fn done(&self, words: &[&str]) -> Result<String> {
        let output = self.berth()?.args(words).output()?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "berth {}: {}: {said}", words.join(" "), output.status);
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// What the programs said, for whoever looks for the reason of a failure.
    pub fn said(&self) -> String {
        let log = |name: &str| {
            let text =
                std::fs::read_to_string(self.dir.path().join(format!("{name}.log"))).unwrap_or_default();
            let lines: Vec<&str> = text.lines().collect();
            format!("--- {name}\n{}\n", lines[lines.len().saturating_sub(20)..].join("\n"))
        };
        ["controller", "agent", "another"].map(log).concat()
    }
}

impl Drop for World {
    /// Pods outlive their agent, so they are ended here.
    fn drop(&mut self) {
        drop((self.agent.take(), self.another.take()));
        for pid in shims(self.dir.path()) {
            // SAFETY: a signal to a process that was ours a moment ago.
            unsafe { libc::kill(pid as i32, libc::SIGTERM) };
        }
        let gone = || shims(self.dir.path()).is_empty().then_some(());
        if let Err(error) = until("pods end", Duration::from_secs(60), gone) {
            eprintln!("{error}");
        }
    }
}

/// A job on the node's own file system, with the default share of a processor.
pub fn host_job(command: &[&str], network: &str) -> Value {
    json!({
        "image": "host", "command": command, "network": network,
        "resources": {"cpu": "0.1", "memory": "32Mi"}
    })
}
