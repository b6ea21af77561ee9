//! The programs of a soak, each on a host of its own: started, ended, stopped, cut off, and brought back when it is time.

use std::fs;
use std::os::unix::process::ExitStatusExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus};
use std::time::{Duration, Instant};

use anyhow::Result;

use super::leaks::MARK;
use super::wire::{Link, NETWORK, Way, Wire, address};
use crate::bench::process::Daemon;
use crate::bench::world::program;
use crate::etcd::{self, Place};
use crate::mosquitto;

pub const NODES: usize = 4;
const MEMBERS: usize = 3;
const CONTROLLERS: usize = 2;
/// The host of whoever types `berth`, behind those of the programs, which have the numbers of their hosts.
const USER: usize = 1 + MEMBERS + CONTROLLERS + NODES;
const BROKER_PORT: u16 = 1883;
/// As a service manager does it.
const RESTART_AFTER: Duration = Duration::from_secs(1);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    Broker,
    Member,
    Controller,
    Agent,
}

pub struct Program {
    pub name: String,
    pub role: Role,
    command: Command,
    log: PathBuf,
    daemon: Option<Daemon>,
    /// When it is started again.
    due: Option<Instant>,
    /// When it goes on; until then it is stopped.
    wakes: Option<Instant>,
    /// Of its log, what earlier lives have written.
    begins: usize,
    /// As its host's line is without a fault.
    line: Link,
    /// When its line is that again.
    heals: Option<Instant>,
}

impl Program {
    /// The process, where it is there and not stopped.
    pub fn awake(&self) -> Option<u32> {
        self.daemon.as_ref().filter(|_| self.wakes.is_none()).map(Daemon::pid)
    }

    /// The process, stopped or not.
    pub fn pid(&self) -> Option<u32> {
        self.daemon.as_ref().map(Daemon::pid)
    }

    /// What is wrong with it just now.
    pub fn trouble(&self) -> Option<&'static str> {
        match (&self.daemon, self.wakes, self.heals) {
            (None, ..) => Some("dead"),
            (_, Some(_), _) => Some("stopped"),
            (.., Some(_)) => Some("cut off or far"),
            _ => None,
        }
    }

    pub fn is_cut(&self) -> bool {
        self.heals.is_some()
    }

    fn start(&mut self) -> Result<()> {
        self.begins = fs::metadata(&self.log).map_or(0, |file| file.len() as usize);
        self.due = None;
        self.daemon = Some(Daemon::start(&mut self.command, &self.log)?);
        Ok(())
    }

    /// What it has said since its start.
    fn said(&self) -> String {
        let log = fs::read(&self.log).unwrap_or_default();
        String::from_utf8_lossy(log.get(self.begins..).unwrap_or_default()).into_owned()
    }
}

pub struct Ground {
    pub programs: Vec<Program>,
    wire: Wire,
    dir: PathBuf,
    /// Ends that no program should have: who, how.
    pub crashes: Vec<String>,
}

impl Ground {
    /// Everything runs when it returns, though not all of it may be ready.
    pub fn new(dir: &Path, mark: &str, seed: u64) -> Result<Self> {
        let fair = |host: &usize| *host > MEMBERS + CONTROLLERS && *host < USER;
        let line = |host: usize| Link::both(if fair(&host) { Way::FAIR } else { Way::GOOD });
        let wire = Wire::new((0..=USER).map(line).collect(), seed)?;
        let mut ground = Self { programs: Vec::new(), wire, dir: dir.to_owned(), crashes: Vec::new() };
        fs::create_dir_all(ground.histories())?;
        for (name, role, mut command) in commands(dir)? {
            let host = ground.programs.len();
            ground.wire.place(host, command.env(MARK, mark));
            let log = dir.join(format!("{name}.log"));
            let (daemon, due, wakes, heals) = (None, None, None, None);
            let line = line(host);
            let mut program =
                Program { name, role, command, log, daemon, due, wakes, begins: 0, line, heals };
            program.start()?;
            ground.programs.push(program);
        }
        Ok(ground)
    }

    /// Where containers write.
    pub fn histories(&self) -> PathBuf {
        self.dir.join("histories")
    }

    /// The data directories of nodes, by their names.
    pub fn nodes(&self) -> impl Iterator<Item = (&str, PathBuf)> {
        let agents = self.programs.iter().filter(|program| program.role == Role::Agent);
        agents.map(|agent| (agent.name.as_str(), self.dir.join(&agent.name)))
    }

    pub fn agent(&self, name: &str) -> Option<usize> {
        self.programs.iter().position(|program| program.role == Role::Agent && program.name == name)
    }

    /// The client, somewhere in the network.
    pub fn berth(&self, words: &[&str]) -> Result<Command> {
        let mut command = Command::new(program("berth")?);
        command.env("BERTH_BROKER", broker()).args(["--request-timeout", "15s"]).args(words);
        self.wire.place(USER, &mut command);
        Ok(command)
    }

    /// Runs a program on a host.
    pub fn on(&self, host: usize, command: &mut Command) {
        self.wire.place(host, command);
    }

    /// The controller that leads, by what it says.
    pub fn leader(&self) -> Option<usize> {
        let leads = |program: &Program| {
            program.role == Role::Controller && program.said().contains("started cluster=")
        };
        self.programs.iter().position(|program| program.daemon.is_some() && leads(program))
    }

    /// Packets so far, and of these the lost ones.
    pub fn packets(&self) -> (u64, u64) {
        self.wire.counts()
    }

    /// Does what is due; who has ended by itself since, and how: a controller that leads no more does.
    pub fn tend(&mut self) -> Result<Vec<String>> {
        let now = Instant::now();
        let is_due = |at: Option<Instant>| at.is_some_and(|at| at <= now);
        let mut ended = Vec::new();
        for (host, program) in self.programs.iter_mut().enumerate() {
            if let Some(status) = program.daemon.as_mut().and_then(Daemon::ended) {
                let line = format!("{} {}", program.name, how(status));
                if status.signal().is_some() || program.role != Role::Controller {
                    self.crashes.push(line.clone());
                }
                ended.push(line);
                (program.daemon, program.wakes) = (None, None);
                program.due = Some(now + RESTART_AFTER);
            }
            if is_due(program.due) {
                program.start()?;
            }
            if is_due(program.wakes) {
                program.wakes = None;
                program.daemon.iter().for_each(|daemon| daemon.signal(libc::SIGCONT));
            }
            if is_due(program.heals) {
                program.heals = None;
                self.wire.set(host, program.line);
            }
        }
        Ok(ended)
    }

    pub fn kill(&mut self, host: usize, back_after: Duration) {
        let program = &mut self.programs[host];
        program.daemon.iter_mut().for_each(Daemon::kill);
        (program.daemon, program.wakes) = (None, None);
        program.due = Some(Instant::now() + back_after);
    }

    pub fn stop(&mut self, host: usize, back_after: Duration) {
        let program = &mut self.programs[host];
        program.daemon.iter().for_each(|daemon| daemon.signal(libc::SIGSTOP));
        program.wakes = Some(Instant::now() + back_after);
    }

    pub fn spoil(&mut self, host: usize, link: Link, back_after: Duration) {
        self.wire.set(host, link);
        self.programs[host].heals = Some(Instant::now() + back_after);
    }

    /// All that is broken is made good the next time that it is tended.
    pub fn heal(&mut self) {
        let now = Instant::now();
        for program in &mut self.programs {
            for at in [&mut program.due, &mut program.wakes, &mut program.heals].into_iter().flatten() {
                *at = now;
            }
        }
    }

    /// Ends all programs in order, agents first; pods are not ended by this.
    pub fn end(&mut self) {
        for program in self.programs.iter_mut().rev() {
            program.daemon = None;
            program.due = None;
        }
    }
}

fn how(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("ended with code {code}"),
        (None, signal) => format!("was ended by signal {}", signal.unwrap_or(0)),
    }
}

fn broker() -> String {
    format!("mqtt://{}:{BROKER_PORT}", address(0))
}

/// In the order of their hosts.
fn commands(dir: &Path) -> Result<Vec<(String, Role, Command)>> {
    let mut commands = vec![(
        "mosquitto".to_owned(),
        Role::Broker,
        mosquitto::command(address(0).into(), BROKER_PORT, dir)?,
    )];
    let member = |n: usize| {
        let at = address(1 + n);
        Place { client: format!("{at}:2379"), peer: format!("{at}:2380") }
    };
    let places: Vec<Place> = (0..MEMBERS).map(member).collect();
    for (n, command) in etcd::commands(&places, dir, None).into_iter().enumerate() {
        commands.push((format!("etcd{n}"), Role::Member, command));
    }
    let store = etcd::url(places.iter().map(|place| place.client.as_str()));
    let dev = format!("--dev={NETWORK}");
    for n in 0..CONTROLLERS {
        let name = format!("controller{n}");
        share_depot(dir, &dir.join(&name))?;
        let mut command = Command::new(program("berth-controller")?);
        command.args([&dev, "--broker", &broker(), "--store", &store, "--data-dir"]).arg(dir.join(&name));
        command.args(["--listen-http", &format!("{}:7420", address(1 + MEMBERS + n))]);
        commands.push((name, Role::Controller, command));
    }
    for n in 0..NODES {
        let (name, at) = (format!("n{n}"), address(1 + MEMBERS + CONTROLLERS + n));
        let mut command = Command::new(program("berth-agent")?);
        command.args([&dev, "--broker", &broker(), "--node", &name, "--capacity", "cpu=1,memory=2Gi"]);
        command
            .args(["--listen-chunks", &format!("{at}:7421"), "--allow-host-path"])
            .arg(dir.join("histories"));
        command.arg("--data-dir").arg(dir.join(&name));
        commands.push((name, Role::Agent, command));
    }
    Ok(commands)
}

/// Several controllers need one depot that all reach; here all are on one disk. What is not whole is each one's own.
fn share_depot(dir: &Path, controller: &Path) -> Result<()> {
    let own = controller.join("depot");
    fs::create_dir_all(&own)?;
    for folder in ["blobs", "logs", "packs", "checkpoints"] {
        let shared = dir.join("depot").join(folder);
        fs::create_dir_all(&shared)?;
        std::os::unix::fs::symlink(&shared, own.join(folder))?;
    }
    Ok(())
}
