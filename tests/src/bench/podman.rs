//! `podman container checkpoint --export` and `restore --import` beside it, from Debian's packages, with runc and the
//! very same CRIU: one image, one command, neither with a network. When its lines came is what both logs say.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, ensure};
use serde_json::json;

use super::criu::beside;
use super::figures::{Figure, median};
use super::moves::{checkpoint, runs_on};
use super::process::until;
use super::user::Status;
use super::world::World;

const ROUNDS: usize = 7;
const LIMIT: Duration = Duration::from_secs(60);
const COUNTER: &str = "i=0; while :; do i=$((i+1)); echo $i; usleep 2000; done";
/// The host's own bounds may be lower than what podman asks for by itself.
const BOUNDS: [&str; 2] = ["nofile=1024:1024", "nproc=1024:1024"];

struct Podman {
    dir: PathBuf,
    path: String,
}

/// What keeps podman from being measured here, in its own words where it has some; `None`: nothing.
pub fn missing() -> Option<String> {
    let absent =
        |name: &&str| !["/usr/bin", "/usr/sbin"].iter().any(|dir| Path::new(dir).join(name).exists());
    let absent: Vec<&str> = ["podman", "runc", "umoci", "busybox"].into_iter().filter(absent).collect();
    if !absent.is_empty() {
        return Some(format!("no {}: apt-get install podman runc umoci busybox-static", absent.join(", ")));
    }
    let tried = || -> Result<()> {
        let dir = lower_case()?;
        let podman = Podman::new(dir.path())?;
        podman.start("tried")?;
        podman.does(&["container", "checkpoint", "--leave-running", "tried"])?;
        podman.end("tried")
    };
    tried().err().map(|error| format!("it takes no checkpoint here: {error:#}"))
}

/// A directory of this process: podman makes an image's name of the path of its layout, and takes no capitals.
fn lower_case() -> std::io::Result<tempfile::TempDir> {
    tempfile::Builder::new().prefix(&format!("berth-podman-{}", std::process::id())).rand_bytes(0).tempdir()
}

type Part = fn(&Round) -> f64;

/// In milliseconds, of one round.
struct Round {
    /// The longest time between two lines while it is saved and goes on.
    frozen: f64,
    /// From the command to the checkpoint's being there.
    saved: f64,
    /// From the command to the first line where it goes on.
    moved: f64,
    /// Between the last line here and the first one there.
    stopped: f64,
}

pub fn measure() -> Result<Vec<Figure>> {
    let dir = lower_case()?;
    let podman = Podman::new(dir.path())?;
    let theirs: Vec<Round> = (0..ROUNDS).map(|_| podman.round()).collect::<Result<_>>()?;
    let ours = ours(&podman.image())?;
    let of = |rounds: &[Round], part: Part| {
        median(&rounds.iter().map(part).collect::<Vec<_>>()).context("nothing was measured")
    };
    let mut figures = Vec::new();
    let parts: [(&str, Part); 4] = [
        ("checkpoint, frozen", |round| round.frozen),
        ("checkpoint, all", |round| round.saved),
        ("move, stop to running", |round| round.stopped),
        ("move, all", |round| round.moved),
    ];
    for (what, part) in parts {
        let podman = of(&theirs, part)?;
        figures.push(Figure::peer(&format!("podman: {what}"), podman, "ms"));
        figures.push(Figure::asked(&format!("{what}, as podman at most"), of(&ours, part)?, "ms", podman));
    }
    Ok(figures)
}

/// The times with which the lines of a log begin, in milliseconds since 1970.
fn times(log: &str) -> Result<Vec<f64>> {
    let at = |line: &str| -> Result<f64> {
        let word = line.split(' ').next().unwrap_or_default();
        let time = humantime::parse_rfc3339(word).with_context(|| format!("no time: {line}"))?;
        Ok(time.duration_since(UNIX_EPOCH)?.as_secs_f64() * 1e3)
    };
    log.lines().map(at).collect()
}

/// The longest time between two of them.
fn longest_gap(times: &[f64]) -> Result<f64> {
    times.windows(2).map(|pair| pair[1] - pair[0]).reduce(f64::max).context("fewer than two lines")
}

fn now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64() * 1e3
}

fn ms(begun: Instant) -> f64 {
    begun.elapsed().as_secs_f64() * 1e3
}

impl Podman {
    /// With a storage of its own, and an image of busybox in it.
    fn new(dir: &Path) -> Result<Self> {
        let criu = beside()?;
        let criu = criu.parent().context("criu lies in a directory")?.display().to_string();
        let path = format!("{criu}:{}", std::env::var("PATH").unwrap_or_default());
        let podman = Self { dir: dir.to_owned(), path };
        let (layout, bundle) = (dir.join("image"), dir.join("bundle"));
        let (image, bundle_path) = (podman.image(), bundle.display().to_string());
        umoci(&["init", "--layout", &layout.display().to_string()])?;
        umoci(&["new", "--image", &image])?;
        umoci(&["unpack", "--image", &image, &bundle_path])?;
        let root = bundle.join("rootfs");
        for name in ["bin", "dev", "etc", "proc", "sys", "tmp"] {
            fs::create_dir_all(root.join(name))?;
        }
        fs::copy("/bin/busybox", root.join("bin/busybox"))?;
        for name in ["sh", "usleep"] {
            std::os::unix::fs::symlink("busybox", root.join("bin").join(name))?;
        }
        umoci(&["repack", "--image", &image, &bundle_path])?;
        podman.does(&["pull", "-q", &format!("oci:{image}")])?;
        Ok(podman)
    }

    /// As umoci names it, and berth behind `oci:`.
    fn image(&self) -> String {
        format!("{}:latest", self.dir.join("image").display())
    }

    fn does(&self, words: &[&str]) -> Result<String> {
        let mut command = Command::new("podman");
        command.env("PATH", &self.path).env("TZ", "UTC");
        for (flag, name) in [("--root", "storage"), ("--runroot", "run"), ("--tmpdir", "tmp")] {
            command.arg(flag).arg(self.dir.join(name));
        }
        command.args(["--cgroup-manager", "cgroupfs", "--runtime", "runc"]).args(words);
        let output = command.output()?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "podman {}: {}: {}", words.join(" "), output.status, said.trim());
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// Returns once it counts.
    fn start(&self, name: &str) -> Result<()> {
        let image = self.does(&["images", "-q"])?;
        let mut words = vec!["run", "-d", "--name", name, "--network", "none", "--log-driver", "k8s-file"];
        words.extend(BOUNDS.iter().flat_map(|bound| ["--ulimit", bound]));
        words.extend([image.trim(), "/bin/sh", "-c", COUNTER]);
        self.does(&words)?;
        self.counts(name, 0)
    }

    fn log(&self, name: &str) -> Result<Vec<f64>> {
        times(&self.does(&["logs", "-t", name])?)
    }

    fn counts(&self, name: &str, from: usize) -> Result<()> {
        until("the container counts", LIMIT, || (self.log(name).ok()?.len() > from + 20).then_some(()))
    }

    fn end(&self, name: &str) -> Result<()> {
        self.does(&["rm", "-f", "-t", "0", name]).map(drop)
    }

    fn round(&self) -> Result<Round> {
        let archive = self.dir.join("archive.tar").display().to_string();
        self.start("here")?;
        let begun = Instant::now();
        self.does(&["container", "checkpoint", "--leave-running", "--export", &archive, "here"])?;
        let saved = ms(begun);
        self.counts("here", self.log("here")?.len())?;
        let frozen = longest_gap(&self.log("here")?)?;

        let begun = now();
        self.does(&["container", "checkpoint", "--export", &archive, "here"])?;
        self.does(&["container", "restore", "--import", &archive, "--name", "there"])?;
        self.counts("there", self.log("there")?.len())?;
        let last = self.log("here")?.last().copied().context("no line here")?;
        // The archive brings the log of before along.
        let first = self.log("there")?.into_iter().find(|at| *at > last).context("no line there")?;
        self.end("here")?;
        self.end("there")?;
        Ok(Round { frozen, saved, moved: first - begun, stopped: first - last })
    }
}

impl Drop for Podman {
    fn drop(&mut self) {
        for name in ["here", "there", "tried"] {
            let _ = self.end(name);
        }
    }
}

fn umoci(words: &[&str]) -> Result<()> {
    let output = Command::new("umoci").args(words).output()?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "umoci {}: {said}", words.join(" "));
    Ok(())
}

/// The same by berth, between two agents.
fn ours(image: &str) -> Result<Vec<Round>> {
    const ROOM: &str = "cpu=2,memory=1Gi";
    let mut world = World::with_agent(ROOM)?;
    let nodes = [world.node(), world.start_another(ROOM)?];
    let mut user = world.user()?;
    let file = json!({
        "image": format!("oci:{image}"), "command": ["/bin/sh", "-c", COUNTER], "network": "none",
        "resources": {"cpu": "0.1", "memory": "32Mi"}, "limits": {"cpu": "2"}, "checkpoint": {"mode": "criu"}
    });
    let log = |job: &str| times(&world.done(&["logs", "--timestamps", job])?);
    let counts = |job: &str, from: usize| {
        until("the pod counts", LIMIT, || (log(job).ok()?.len() > from + 20).then_some(()))
    };
    let mut rounds = Vec::new();
    for round in 0..ROUNDS {
        let job = format!("round-{round}");
        user.submit(&job, &file)?;
        let begun = user.wait(&job, LIMIT, |status| nodes.iter().any(|node| runs_on(status, node)));
        let begun = begun.with_context(|| world.said())?;
        let there = &nodes[usize::from(runs_on(&begun, &nodes[0]))];
        counts(&job, 0)?;
        let begun = Instant::now();
        checkpoint(&mut user, &world, &job)?;
        let saved = ms(begun);
        counts(&job, log(&job)?.len())?;
        let frozen = longest_gap(&log(&job)?)?;

        let begun = now();
        world.done(&["migrate", &job, "--to", there])?;
        user.wait(&job, LIMIT, |status| runs_on(status, there)).with_context(|| world.said())?;
        counts(&job, log(&job)?.len())?;
        let times: Vec<f64> = log(&job)?.into_iter().filter(|at| *at >= begun).collect();
        let stopped = longest_gap(&times)?;
        let first = times.windows(2).find(|pair| pair[1] - pair[0] >= stopped).map_or(begun, |pair| pair[1]);
        rounds.push(Round { frozen, saved, moved: first - begun, stopped });
        user.cancel(&job)?;
        user.wait(&job, LIMIT, Status::is_final)?;
    }
    Ok(rounds)
}
