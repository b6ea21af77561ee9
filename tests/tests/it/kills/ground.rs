//! Two nodes, one counter between them, and everything that may be looked at from outside while something of it is
//! killed: processes, mounts, control groups, directories, the log.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use berth_protocol::ids::Digest;
use serde_json::Value;

use crate::cluster::{Cluster, program, text, until};

/// In which whatever was killed must be made good.
const SETTLE_S: u64 = 60;
/// In the environment of agents, and so of all that they start but containers.
const MARK: &str = "BERTH_TEST_MARK";

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Victim {
    Agent,
    Shim,
    Criu,
    /// The process that carries a checkpoint to or from the depot.
    Carrier,
}

/// What a process in `/proc` is.
struct Process {
    pid: u32,
    parent: u32,
    command: String,
}

fn processes() -> Vec<Process> {
    let process = |pid: u32| {
        let command = fs::read(format!("/proc/{pid}/cmdline")).ok().filter(|line| !line.is_empty())?;
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        let parent = stat.rsplit_once(')')?.1.split_whitespace().nth(1)?.parse().ok()?;
        Some(Process { pid, parent, command: String::from_utf8_lossy(&command).into_owned() })
    };
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).filter_map(process).collect()
}

/// Programs of the job that are there: not what they have forked and not yet turned into something else.
fn copies(word: &str) -> usize {
    let all: Vec<Process> =
        processes().into_iter().filter(|process| process.command.contains(word)).collect();
    let inner = |process: &&Process| all.iter().any(|other| other.pid == process.parent);
    all.iter().filter(|process| !inner(process)).count()
}

/// Counts the job's programs again and again.
struct Watch {
    over: Arc<AtomicBool>,
    most: Arc<AtomicUsize>,
    thread: Option<JoinHandle<()>>,
}

impl Watch {
    fn start(word: String) -> Self {
        let (over, most) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
        let (end, found) = (over.clone(), most.clone());
        let look = move || {
            while !end.load(Ordering::Relaxed) {
                found.fetch_max(copies(&word), Ordering::Relaxed);
                std::thread::park_timeout(Duration::from_millis(20));
            }
        };
        Self { over, most, thread: Some(std::thread::spawn(look)) }
    }

    fn most(&self) -> usize {
        self.most.load(Ordering::Relaxed)
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
        drop(self.thread.take().map(JoinHandle::join));
    }
}

/// Where the counter is, and how far.
#[derive(Debug, Clone, PartialEq)]
pub struct Place {
    pub node: String,
    pub epoch: u64,
    checkpoint: Value,
    message: Value,
}

impl Place {
    fn of(job: &Value) -> Self {
        let pod = &job["pods"][0];
        Self {
            node: pod["node"].as_str().unwrap_or_default().to_owned(),
            epoch: pod["epoch"].as_u64().unwrap_or(0),
            checkpoint: job["checkpoint"]["id"].clone(),
            // What is said while it is on its way is no answer.
            message: if pod["reason"].is_null() { pod["message"].clone() } else { Value::Null },
        }
    }
}

pub struct Ground {
    pub cluster: Cluster,
    pub nodes: [String; 2],
    pub kills: usize,
    stop: PathBuf,
    between: PathBuf,
    word: String,
    watch: Watch,
    random: fastrand::Rng,
    shims: u64,
    begun: Instant,
}

impl Ground {
    /// A counter that runs, and has one checkpoint already.
    pub fn new(seed: u64) -> Self {
        let cluster = Cluster::new();
        let dir = cluster.dir.path().to_owned();
        let (stop, between) = (dir.join("stop"), dir.join("between"));
        for dir in [&stop, &between] {
            fs::create_dir(dir).expect("a directory");
        }
        symlink(program("criu-between"), between.join("criu")).expect("a link");
        symlink(program("criu").join("criu"), between.join("real")).expect("a link");
        let word = format!("counter-{}-", cluster.port);
        let nodes = ["a1", "a2"].map(str::to_owned);
        let mut ground = Self {
            watch: Watch::start(word.clone()),
            random: fastrand::Rng::with_seed(seed),
            kills: 0,
            shims: 0,
            begun: Instant::now(),
            cluster,
            nodes,
            stop,
            between,
            word,
        };
        for node in ground.nodes.clone() {
            ground.start(&node);
        }
        let job = format!(
            "image: host\n\
             command: [sh, -c, \"i=0; while [ ! -e /stop/now ]; do echo $i; i=$((i+1)); sleep 0.02; done\", {}]\n\
             resources: {{cpu: 100m, memory: 64Mi}}\nlimits: {{cpu: 1}}\ncheckpoint: {{mode: criu}}\n\
             volumes: [{{mount: /stop, host: {}, readOnly: true}}]\n",
            ground.word,
            ground.stop.display()
        );
        ground.cluster.submit("counter", &job);
        ground.settled("its beginning", |_| true);
        let saved = ground.cluster.run(&["checkpoint", "counter"]);
        assert!(saved.status.success(), "{}\n{}", text(&saved), ground.cluster.logs_of_all());
        ground
    }

    fn start(&mut self, node: &str) {
        let (stop, criu) = (self.stop.display().to_string(), self.between.join("criu").display().to_string());
        let flags = ["--capacity", "cpu=1,memory=1Gi", "--allow-host-path", &stop, "--criu", &criu];
        self.cluster.agent_with(node, &flags, &[(MARK, &self.word)]);
    }

    fn agent(&self, node: &str) -> u32 {
        let found = self.cluster.agents.iter().find(|agent| agent.name == node);
        found.expect("its agent").child.id()
    }

    /// Starts an agent anew that was killed.
    fn revive(&mut self, node: &str) {
        let at = self.cluster.agents.iter().position(|agent| agent.name == node).expect("its agent");
        drop(self.cluster.agents.remove(at));
        self.start(node);
    }

    fn job(&self) -> Value {
        self.cluster.job("counter")
    }

    pub fn place(&self) -> Place {
        Place::of(&self.job())
    }

    pub fn other(&self, node: &str) -> String {
        self.nodes.iter().find(|other| *other != node).expect("two nodes").clone()
    }

    /// The pod's directory on a node.
    pub fn pod_dir(&self, node: &str, epoch: u64) -> Option<PathBuf> {
        let pods = self.cluster.dir.path().join(node).join("pods");
        let own = |path: &PathBuf| path.extension().is_some_and(|end| *end == *epoch.to_string());
        fs::read_dir(pods).ok()?.flatten().map(|entry| entry.path()).find(own)
    }

    /// Checkpoints that a node keeps for itself.
    pub fn kept(&self, node: &str) -> BTreeSet<PathBuf> {
        let dir = self.cluster.dir.path().join(node).join("checkpoints");
        fs::read_dir(dir).into_iter().flatten().flatten().map(|entry| entry.path()).collect()
    }

    fn shim(&self, node: &str, epoch: u64) -> Option<u32> {
        fs::read_to_string(self.pod_dir(node, epoch)?.join("shim.lock")).ok()?.parse().ok()
    }

    /// What agents have started, but for the shim of `live` and its pod's init.
    fn helpers(&self, live: Option<&Path>) -> Vec<Process> {
        let agents: Vec<u32> = self.cluster.agents.iter().map(|agent| agent.child.id()).collect();
        let mark = format!("{MARK}={}", self.word);
        let ours = |process: &Process| {
            let environment = fs::read(format!("/proc/{}/environ", process.pid)).unwrap_or_default();
            environment.split(|byte| *byte == 0).any(|pair| pair == mark.as_bytes())
        };
        let shim = live.map(|dir| format!("berth-agent\0shim\0{}\0", dir.display()));
        let is_shim = |process: &Process| shim.as_ref().is_some_and(|shim| process.command == *shim);
        let helper = |process: &Process| !agents.contains(&process.pid) && ours(process) && !is_shim(process);
        processes().into_iter().filter(helper).collect()
    }

    /// The process that carries a checkpoint for a node's agent.
    pub fn carrier(&self, node: &str) -> Option<u32> {
        let agent = self.agent(node);
        let children = fs::read_to_string(format!("/proc/{agent}/task/{agent}/children")).ok()?;
        let carries = |pid: &u32| {
            let command = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            command.starts_with(b"berth-agent\0checkpoint\0")
        };
        children.split_whitespace().filter_map(|pid| pid.parse().ok()).find(carries)
    }

    /// The pod runs, once, counts, and nobody works on it any more; `wanted` of where it is.
    fn settled(&self, what: &str, wanted: impl Fn(&Place) -> bool) -> Place {
        let end = Instant::now() + Duration::from_secs(SETTLE_S);
        loop {
            let job = self.job();
            let place = Place::of(&job);
            match self.unsettled(&job, &place, &wanted) {
                None => return place,
                Some(why) => assert!(
                    Instant::now() < end,
                    "{what}: not within {SETTLE_S} s: {why}\n{}\n{:#}\n{}",
                    self.at_work(),
                    self.job(),
                    self.cluster.logs_of_all()
                ),
            }
            std::thread::park_timeout(Duration::from_millis(20));
        }
    }

    /// Helpers and the job's programs, with what each waits in.
    fn at_work(&self) -> String {
        let job = processes().into_iter().filter(|process| process.command.contains(&self.word));
        let line = |process: Process| {
            let read =
                |name: &str| fs::read_to_string(format!("/proc/{}/{name}", process.pid)).unwrap_or_default();
            let state = read("status").lines().find(|line| line.starts_with("State")).map(str::to_owned);
            let (pid, command) = (process.pid, process.command.replace('\0', " "));
            format!(
                "{pid} (of {}) {command}: {} {}\n",
                process.parent,
                state.unwrap_or_default(),
                read("wchan")
            )
        };
        self.helpers(None).into_iter().chain(job).map(line).collect()
    }

    fn unsettled(&self, job: &Value, place: &Place, wanted: &impl Fn(&Place) -> bool) -> Option<String> {
        let pod = &job["pods"][0];
        if pod["phase"] != "Running" || !pod["reason"].is_null() || !wanted(place) {
            return Some("it does not run yet".to_owned());
        }
        let Some(dir) = self.pod_dir(&place.node, place.epoch) else {
            return Some("it has no directory".to_owned());
        };
        let helpers = self.helpers(Some(&dir));
        if !helpers.is_empty() {
            let lines = helpers.iter().map(|process| process.command.replace('\0', " "));
            return Some(format!("still at work: {}", lines.collect::<Vec<_>>().join("; ")));
        }
        let length = || -> u64 {
            let segments = fs::read_dir(dir.join("log")).into_iter().flatten().flatten();
            segments.filter_map(|segment| Some(segment.metadata().ok()?.len())).sum()
        };
        let (before, end) = (length(), Instant::now() + Duration::from_millis(300));
        while length() <= before {
            if Instant::now() > end {
                return Some("it does not count".to_owned());
            }
            std::thread::park_timeout(Duration::from_millis(5));
        }
        match copies(&self.word) {
            1 => None,
            count => Some(format!("{count} copies")),
        }
    }

    /// Saves the counter, or moves it, and kills `victim` on that node when criu says so.
    pub fn kill_at(&mut self, (call, stage, side): (&str, &str, &str), moves: bool, victim: Victim) {
        let before = self.place();
        let node = if call == "dump" { before.node.clone() } else { self.other(&before.node) };
        let who = match victim {
            Victim::Criu => "criu".to_owned(),
            Victim::Shim => "shim".to_owned(),
            Victim::Agent => self.agent(&node).to_string(),
            Victim::Carrier => unreachable!("no criu carries"),
        };
        let micros = self.random.u32(0..if side == "after" { 20_000 } else { 500 });
        let what = format!("{victim:?} killed {micros} us {side} {stage} of a {call}, moves: {moves}");
        let (trap, sprung) = (self.between.join("trap"), self.between.join("sprung"));
        let _ = fs::remove_file(&sprung);
        fs::write(self.between.join("new"), format!("{call} {stage} {side} {micros} {who}\n"))
            .and_then(|()| fs::rename(self.between.join("new"), &trap))
            .expect("the trap is set");
        self.trigger(&before, moves);
        let end = Instant::now() + Duration::from_secs(30);
        while !sprung.exists() {
            assert!(
                Instant::now() < end,
                "not within 30 s: {what}\n{}\n{:#}\n{}",
                self.at_work(),
                self.job(),
                self.cluster.logs_of_all()
            );
            std::thread::park_timeout(Duration::from_millis(5));
        }
        self.made_good(&what, &before, moves, Some(victim), &node);
    }

    /// As soon as `reached` of the directory of the pod there, kills `victim` on that node; false: it was over before.
    pub fn kill_when(
        &mut self,
        (name, at_target): (&str, bool),
        moves: bool,
        victim: Victim,
        reached: impl Fn(&Self, &str, Option<&Path>) -> bool,
    ) -> bool {
        let before = self.place();
        let node = if at_target { self.other(&before.node) } else { before.node.clone() };
        let epoch = before.epoch + u64::from(at_target);
        let micros = self.random.u64(0..3_000);
        let what = format!("{victim:?} killed {micros} us after {name}, moves: {moves}");
        self.trigger(&before, moves);
        let end = Instant::now() + Duration::from_secs(20);
        let mut dir = None;
        let seen = loop {
            dir = dir.or_else(|| self.pod_dir(&node, epoch));
            if reached(self, &node, dir.as_deref()) {
                break true;
            }
            let late = Instant::now() + Duration::from_secs(18) > end;
            if Instant::now() > end || (late && self.is_over(&before, moves)) {
                // The last step is one that stays.
                break reached(self, &node, dir.as_deref());
            }
            std::thread::park_timeout(Duration::from_micros(200));
        };
        std::thread::sleep(Duration::from_micros(micros));
        let pid = match victim {
            Victim::Agent => Some(self.agent(&node)),
            Victim::Shim => self.shim(&node, epoch),
            Victim::Carrier => self.carrier(&node),
            Victim::Criu => unreachable!("criu is killed at its own words"),
        };
        let hit = seen && pid.is_some_and(kill);
        self.made_good(&what, &before, moves, hit.then_some(victim), &node);
        hit
    }

    fn trigger(&self, before: &Place, moves: bool) {
        let other = self.other(&before.node);
        let words: &[&str] = match moves {
            true => &["migrate", "counter", "--to", &other],
            false => &["checkpoint", "counter", "--no-wait"],
        };
        let output = self.cluster.run(words);
        assert!(output.status.success(), "{words:?}: {}\n{}", text(&output), self.cluster.logs_of_all());
    }

    /// Nothing of it is still to come, on either node.
    fn is_over(&self, before: &Place, moves: bool) -> bool {
        self.is_answered(before, &self.place(), moves) && self.job()["pods"][0]["phase"] == "Running"
    }

    /// The controller knows what came of it.
    fn is_answered(&self, before: &Place, now: &Place, moves: bool) -> bool {
        let failed = now.message != before.message && now.message.is_string();
        now.epoch != before.epoch || failed || (!moves && now.checkpoint != before.checkpoint)
    }

    fn made_good(&mut self, what: &str, before: &Place, moves: bool, killed: Option<Victim>, node: &str) {
        self.kills += usize::from(killed.is_some());
        eprintln!("{:.1} s: {what}, hit: {}", self.begun.elapsed().as_secs_f64(), killed.is_some());
        match killed {
            Some(Victim::Agent) => self.revive(node),
            Some(Victim::Shim) => self.shims += 1,
            Some(Victim::Criu | Victim::Carrier) | None => {}
        }
        self.settled(what, |now| self.is_answered(before, now, moves));
        assert!(self.watch.most() <= 1, "{what}: it ran {} times at once", self.watch.most());
    }

    /// The counter ends, its log is whole, and nothing of it is left.
    pub fn end(mut self) {
        fs::write(self.stop.join("now"), "").expect("a file");
        let job = self.cluster.until_phase("counter", "Succeeded", 60);
        assert_eq!(job["failures"], 0, "{job:#}");
        assert!(job["evictions"].as_u64() >= Some(self.shims.min(1)), "{job:#}");
        let log = self.cluster.logs("counter");
        let got: Vec<usize> = log.lines().filter_map(|line| line.parse().ok()).collect();
        let wrong = got.iter().zip(0..).position(|(got, wanted)| *got != wanted);
        if let Some(at) = wrong {
            let rest = &got[at..got.len().min(at + 5)];
            let said = self.cluster.logs_of_all();
            panic!("line {at} is {rest:?} after {} kills\n{:#}\n{said}", self.kills, self.job());
        }
        assert!(!got.is_empty());
        // Ends are waited for, not given up on.
        for node in &self.nodes {
            let said = self.cluster.log(node);
            assert!(!said.contains("does not end"), "{said}");
        }
        assert_eq!(copies(&self.word), 0);
        let dir = self.cluster.dir.path().to_owned();
        for node in self.nodes.clone() {
            until(&format!("no pod's directory on {node}\n{}", self.cluster.log(&node)), 60, || {
                fs::read_dir(dir.join(&node).join("pods")).ok()?.next().is_none().then_some(())
            });
            // An agent that was killed before it let the one before go does so a minute after its next start.
            let one = || (self.kept(&node).len() <= 1).then_some(());
            until(&format!("one kept checkpoint: {:?}", self.kept(&node)), 90, one);
        }
        until("no process", 20, || self.helpers(None).is_empty().then_some(()));
        let mounts = fs::read_to_string("/proc/self/mountinfo").expect("mounts");
        let left: Vec<&str> = mounts.lines().filter(|line| line.contains(&*dir.to_string_lossy())).collect();
        assert_eq!(left, [] as [&str; 0]);
        for node in &self.nodes {
            let owner = Digest::of(dir.join(node).as_os_str().as_encoded_bytes()).hex();
            let group = format!("berth/{node}.{}", &owner[..8]);
            let mounted = fs::read_dir("/sys/fs/cgroup").expect("control groups").flatten();
            let roots = mounted.map(|entry| entry.path()).chain(["/sys/fs/cgroup".into()]);
            let inner =
                roots.flat_map(|root| fs::read_dir(root.join(&group)).into_iter().flatten().flatten());
            let groups: Vec<PathBuf> = inner.map(|entry| entry.path()).filter(|path| path.is_dir()).collect();
            assert_eq!(groups, [] as [PathBuf; 0]);
        }
        self.cluster.agents.iter_mut().for_each(|agent| agent.kill());
    }
}

/// True where there was such a process.
fn kill(pid: u32) -> bool {
    // SAFETY: no pointers.
    unsafe { libc::kill(pid as i32, libc::SIGKILL) == 0 }
}
