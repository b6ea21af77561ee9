//! The loop of a soak: jobs come, things break, time passes; then all is made good, and what is left is looked at.

use std::collections::{BTreeMap, VecDeque};
use std::fs::File;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use fastrand::Rng;
use serde_json::Value;

use super::faults::{self, Kind, Strike};
use super::ground::{Ground, NODES, Role};
use super::leaks;
use super::user::{Errand, User};
use super::weight::{Sample, resident};
use super::work::{Means, Work, draw};

/// Of everything that is due.
const TURN: Duration = Duration::from_millis(20);
const LIST_EVERY: Duration = Duration::from_secs(2);
const LOOK_EVERY: Duration = Duration::from_secs(10);
const SUBMIT_EVERY: Duration = Duration::from_millis(2_500);
/// No more jobs come while so many are not yet over.
const OPEN_JOBS_MAX: usize = 45;
/// After which a user gives up to be answered: longer than any fault lasts.
const ANSWERED_WITHIN: Duration = Duration::from_secs(180);
const READY_WITHIN: Duration = Duration::from_secs(60);
/// Once all is well again.
const OVER_WITHIN: Duration = Duration::from_secs(480);
const LET_GO_WITHIN: Duration = Duration::from_secs(120);
/// The agent that is not killed in the second half, so that its memory can be judged.
pub const WATCHED: &str = "n0";

/// Set by a signal: the soak ends at once, and cleans up.
pub static INTERRUPTED: AtomicBool = AtomicBool::new(false);

#[derive(Debug, Clone, Copy)]
pub struct Plan {
    pub seed: u64,
    pub faults: usize,
    pub length: Duration,
}

pub struct Soak {
    pub plan: Plan,
    pub ground: Ground,
    pub user: User,
    pub work: Work,
    pub injected: BTreeMap<Kind, usize>,
    pub agent: Vec<Sample>,
    pub controller: Vec<Sample>,
    /// Jobs that nobody ever answered, and what was said instead.
    pub unanswered: Vec<String>,
    /// The controller that leads from the half on, which is not touched any more.
    pub spared: Option<usize>,
    /// A node that is being drained, and until when.
    pub drained: Option<(String, Instant)>,
    pub random: Rng,
    pub dir: PathBuf,
    strikes: VecDeque<Strike>,
    begun: Instant,
    journal: File,
    jobs: usize,
    listing: bool,
    /// When each of what comes again and again comes next.
    list: Instant,
    look: Instant,
    submit: Instant,
}

impl Soak {
    pub fn new(plan: Plan, dir: &Path, mark: &str) -> Result<Self> {
        let ground = Ground::new(dir, mark, plan.seed)?;
        let now = Instant::now();
        Ok(Self {
            plan,
            ground,
            user: User::default(),
            work: Work::default(),
            injected: BTreeMap::new(),
            agent: Vec::new(),
            controller: Vec::new(),
            unanswered: Vec::new(),
            spared: None,
            drained: None,
            random: Rng::with_seed(plan.seed),
            dir: dir.to_owned(),
            strikes: faults::draw(plan.seed, plan.faults, plan.length).into(),
            begun: now,
            journal: File::create(dir.join("faults.log"))?,
            jobs: 0,
            listing: false,
            list: now,
            look: now,
            submit: now,
        })
    }

    /// From the first job until nothing runs any more and all programs have ended.
    pub fn run(&mut self) -> Result<()> {
        self.ready()?;
        self.begun = Instant::now();
        while self.begun.elapsed() < self.plan.length || !self.strikes.is_empty() {
            self.turn()?;
            self.storm()?;
        }
        eprintln!("soak: {}: all is made good", self.clock());
        self.ground.heal();
        self.uncordon()?;
        let over = |soak: &mut Self| soak.work.is_over() && soak.user.open() == 0;
        self.wait("not all jobs have ended", OVER_WITHIN, over)?;
        self.wait("agents keep directories of pods", LET_GO_WITHIN, |soak| {
            leaks::pods(&soak.ground).is_empty()
        })?;
        self.ground.end();
        Ok(())
    }

    /// What nobody waits for any longer is told, and judged as it is.
    fn wait(&mut self, what: &str, limit: Duration, mut is_so: impl FnMut(&mut Self) -> bool) -> Result<()> {
        let end = Instant::now() + limit;
        while !is_so(self) {
            if Instant::now() > end {
                eprintln!("soak: {}: {what} within {} s", self.clock(), limit.as_secs());
                return Ok(());
            }
            self.turn()?;
        }
        Ok(())
    }

    /// One controller leads, and all nodes are there.
    fn ready(&mut self) -> Result<()> {
        let end = Instant::now() + READY_WITHIN;
        loop {
            let output = self.ground.berth(&["get", "nodes", "-o", "json"])?.output()?;
            let nodes: Vec<Value> = serde_json::from_slice(&output.stdout).unwrap_or_default();
            if nodes.iter().filter(|node| node["state"] == "online").count() == NODES {
                return Ok(());
            }
            if Instant::now() > end {
                bail!("nodes are not online within {} s: {nodes:?}", READY_WITHIN.as_secs());
            }
            self.ground.tend()?;
            std::thread::park_timeout(TURN);
        }
    }

    /// What goes on all the time.
    fn turn(&mut self) -> Result<()> {
        if INTERRUPTED.load(Ordering::Relaxed) {
            bail!("interrupted");
        }
        for ended in self.ground.tend()? {
            self.note(&format!("by itself: {ended}"));
        }
        self.hear();
        let now = Instant::now();
        if !self.listing && now >= self.list {
            self.list = now + LIST_EVERY;
            self.listing = true;
            self.user.send(Errand::List, self.ground.berth(&["get", "jobs", "-o", "json"])?, None);
        }
        if now >= self.look {
            self.look = now + LOOK_EVERY;
            self.weigh();
            self.progress();
        }
        std::thread::park_timeout(TURN);
        Ok(())
    }

    /// What goes on as long as things break.
    fn storm(&mut self) -> Result<()> {
        let now = Instant::now();
        let passed = self.begun.elapsed();
        if passed >= self.plan.length / 2 && self.spared.is_none() {
            self.spared = self.ground.leader();
        }
        if self.drained.as_ref().is_some_and(|(_, until)| *until <= now) {
            self.uncordon()?;
        }
        if now >= self.submit {
            self.submit = now + SUBMIT_EVERY;
            let counts = self.work.counts();
            if passed < self.plan.length && counts.sent + counts.running + counts.waiting < OPEN_JOBS_MAX {
                self.send_job(self.plan.length - passed)?;
            }
        }
        if self.strikes.front().is_some_and(|strike| strike.at <= passed)
            && let Some(strike) = self.strikes.pop_front()
            && !self.strike(&strike)?
        {
            // There was nothing that it could hit: it waits.
            self.strikes.push_front(strike);
        }
        Ok(())
    }

    fn strike(&mut self, strike: &Strike) -> Result<bool> {
        for kind in faults::instead(strike) {
            if let Some(whom) = self.inject(kind, strike)? {
                *self.injected.entry(kind).or_default() += 1;
                self.note(&format!("{}: {whom} ({:.1} s)", kind.name(), strike.lasts.as_secs_f64()));
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// A line of what was done, for whoever looks for a reason: with the time of day, as logs have it.
    pub fn note(&mut self, what: &str) {
        let now = humantime::format_rfc3339_millis(std::time::SystemTime::now());
        // The soak says nothing by it.
        let _ = writeln!(self.journal, "{now} {}: {what}", self.clock());
    }

    fn clock(&self) -> String {
        format!("{:.1} s", self.begun.elapsed().as_secs_f64())
    }

    fn send_job(&mut self, left: Duration) -> Result<()> {
        let program = std::env::current_exe()?;
        let histories = self.ground.histories();
        let job =
            draw(&mut self.random, self.jobs, left, &Means { program: &program, histories: &histories });
        self.jobs += 1;
        let path = self.dir.join(format!("{}.json", job.name));
        std::fs::write(&path, job.file.to_string())?;
        let command = self.ground.berth(&["submit", path.to_str().context("a plain path")?])?;
        self.user.send(Errand::Submit(job.name.clone()), command, Some(Instant::now() + ANSWERED_WITHIN));
        self.work.jobs.insert(job.name.clone(), job);
        Ok(())
    }

    fn hear(&mut self) {
        for answer in self.user.answers() {
            match &answer.errand {
                Errand::Submit(name) if answer.is_good() => self.work.accepted(name, Instant::now()),
                Errand::Submit(name) => self.unanswered.push(format!("{name}: {}", answer.said())),
                Errand::List => {
                    self.listing = false;
                    let rows = answer.output.as_ref().ok().filter(|_| answer.is_good());
                    if let Some(rows) =
                        rows.and_then(|output| serde_json::from_slice::<Vec<Value>>(&output.stdout).ok())
                    {
                        self.work.listed(&rows, answer.asked, Instant::now());
                    }
                }
                Errand::Order(what) if !answer.is_good() => self.note(&format!("{what}: {}", answer.said())),
                Errand::Order(_) => {}
            }
        }
    }

    /// Has nodes take pods again: all of them, since an order to drain one may have come late.
    fn uncordon(&mut self) -> Result<()> {
        self.drained = None;
        let nodes = self.ground.nodes().map(|(node, _)| node);
        let words: Vec<&str> = std::iter::once("uncordon").chain(nodes).collect();
        let command = self.ground.berth(&words)?;
        let until = Instant::now() + ANSWERED_WITHIN;
        self.user.send(Errand::Order(words.join(" ")), command, Some(until));
        Ok(())
    }

    fn weigh(&mut self) {
        let at = self.begun.elapsed().as_secs_f64() / self.plan.length.as_secs_f64();
        if at >= 1.0 {
            return;
        }
        let sample = |host: usize| {
            let pid = self.ground.programs[host].pid()?;
            Some(Sample { at, pid, bytes: resident(pid).ok()? })
        };
        let agent = self.ground.agent(WATCHED).and_then(sample);
        let leader = self.spared.or_else(|| self.ground.leader()).and_then(sample);
        self.agent.extend(agent);
        self.controller.extend(leader);
    }

    fn progress(&self) {
        let counts = self.work.counts();
        let broken: Vec<String> = self
            .ground
            .programs
            .iter()
            .filter_map(|program| Some(format!("{} {}", program.name, program.trouble()?)))
            .collect();
        eprintln!(
            "soak: {}: {} faults ({}); jobs: {} ended, {} running, {} waiting, {} on their way; now: {}",
            self.clock(),
            self.injected.values().sum::<usize>(),
            faults::in_words(&self.injected),
            counts.ended,
            counts.running,
            counts.waiting,
            counts.sent,
            if broken.is_empty() { "all well".to_owned() } else { broken.join(", ") },
        );
    }

    /// Hosts of this kind.
    pub fn hosts(&self, role: Role) -> Vec<usize> {
        (0..self.ground.programs.len()).filter(|host| self.ground.programs[*host].role == role).collect()
    }

    /// From the half on: what has to live so that its memory can be judged.
    pub fn is_second_half(&self) -> bool {
        self.begun.elapsed() >= self.plan.length / 2
    }
}
