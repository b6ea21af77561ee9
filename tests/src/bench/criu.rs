//! CRIU by itself: on a plain process, without berth; and how long it is at work within berth.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::unix::fs::symlink;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use super::process::until;
use super::world::program;

const LIMIT: Duration = Duration::from_secs(60);

/// The one that lies beside the programs, as an agent finds it.
pub fn beside() -> Result<PathBuf> {
    let criu = program("criu")?.join("criu");
    let output = Command::new(&criu).arg("check").output().context("tests/criu leaves one there")?;
    ensure!(output.status.success(), "{} does not work here", criu.display());
    Ok(criu)
}

/// A directory in which a criu notes each word between itself and a shim.
pub struct Traced(PathBuf);

impl Traced {
    pub fn new(dir: &Path) -> Result<Self> {
        let dir = dir.join("traced");
        fs::create_dir(&dir)?;
        symlink(program("criu-between")?, dir.join("criu"))?;
        symlink(beside()?, dir.join("real"))?;
        File::create(dir.join("trace"))?;
        Ok(Self(dir))
    }

    pub fn criu(&self) -> PathBuf {
        self.0.join("criu")
    }

    /// For how long the last criu was at work, in milliseconds: from the request to its last word, and after a restore to
    /// its end, but for the times in which it waited for the shim. Passing the request on is none of the shim's work.
    pub fn last(&self) -> Result<f64> {
        let text = fs::read_to_string(self.0.join("trace"))?;
        let mut works: BTreeMap<&str, (f64, Option<i64>)> = BTreeMap::new();
        let mut last = None;
        for line in text.lines() {
            let words: Vec<&str> = line.split(' ').collect();
            let [pid, _, stage, what, nanos] = words[..] else { continue };
            let nanos: i64 = nanos.parse()?;
            let (total, since) = works.entry(pid).or_default();
            match (stage, what) {
                ("begin", "answered") => {}
                ("begin", "told") | (_, "answered") => *since = Some(nanos),
                _ => *total += since.take().map_or(0.0, |since| (nanos - since) as f64 / 1e6),
            }
            last = Some(pid);
        }
        let (total, _) = last.and_then(|pid| works.get(pid)).context("criu was not called")?;
        Ok(*total)
    }
}

/// A program of its own session, with its output in a file.
pub struct Plain {
    pid: i32,
    dir: PathBuf,
    /// Nobody's child once criu has brought it back.
    child: Option<Child>,
    /// Its number is its own.
    alive: bool,
}

impl Plain {
    /// `argv` with its output in `dir`.
    pub fn start(dir: &Path, argv: &[&str]) -> Result<Self> {
        fs::create_dir_all(dir)?;
        let output = File::create(dir.join("output"))?;
        let mut command = Command::new(argv[0]);
        command.args(&argv[1..]).current_dir("/").stdin(Stdio::null()).stdout(output).stderr(Stdio::null());
        // SAFETY: no pointers, nothing allocated.
        let own_session =
            || if unsafe { libc::setsid() } < 0 { Err(std::io::Error::last_os_error()) } else { Ok(()) };
        // SAFETY: as above.
        let child = unsafe { command.pre_exec(own_session) }.spawn()?;
        Ok(Self { pid: child.id() as i32, dir: dir.to_owned(), child: Some(child), alive: true })
    }

    pub fn output(&self) -> String {
        fs::read_to_string(self.dir.join("output")).unwrap_or_default()
    }

    /// Saves it, which ends it, and returns how long that took, and the images' way to the disk, in milliseconds.
    pub fn dump(&mut self, criu: &Path) -> Result<(f64, f64)> {
        let images = self.dir.join("images");
        let _ = fs::remove_dir_all(&images);
        fs::create_dir(&images)?;
        let begun = Instant::now();
        let mut command = Command::new(criu);
        command.args(["dump", "-v2", "-o", "dump.log", "-t", &self.pid.to_string(), "-D"]);
        ran(command.arg(&images), &images.join("dump.log"))?;
        let dumped = begun.elapsed();
        self.end();
        for entry in fs::read_dir(&images)? {
            File::open(entry?.path())?.sync_all()?;
        }
        File::open(&images)?.sync_all()?;
        Ok((dumped.as_secs_f64() * 1e3, (begun.elapsed() - dumped).as_secs_f64() * 1e3))
    }

    /// Brings it back as it was at the last dump; in milliseconds.
    pub fn restore(&mut self, criu: &Path) -> Result<f64> {
        let images = self.dir.join("images");
        let begun = Instant::now();
        let mut command = Command::new(criu);
        command.args(["restore", "--restore-detached", "-v2", "-o", "restore.log", "-D"]).arg(&images);
        ran(&mut command, &images.join("restore.log"))?;
        self.alive = true;
        Ok(begun.elapsed().as_secs_f64() * 1e3)
    }

    fn end(&mut self) {
        if !std::mem::take(&mut self.alive) {
            return;
        }
        // SAFETY: no pointers.
        unsafe { libc::kill(self.pid, libc::SIGKILL) };
        if let Some(mut child) = self.child.take() {
            let _ = child.wait();
            return;
        }
        let gone = || (!Path::new(&format!("/proc/{}", self.pid)).exists()).then_some(());
        if let Err(error) = until("the process ends", LIMIT, gone) {
            eprintln!("bench: {error}");
        }
    }
}

impl Drop for Plain {
    fn drop(&mut self) {
        self.end();
    }
}

fn ran(command: &mut Command, log: &Path) -> Result<()> {
    let output = command.stdin(Stdio::null()).output()?;
    let said = || {
        let log = fs::read_to_string(log).unwrap_or_default();
        let errors: Vec<&str> = log.lines().filter(|line| line.contains("Error")).collect();
        errors.join("; ")
    };
    ensure!(output.status.success(), "{:?}: {}: {}", command.get_program(), output.status, said());
    Ok(())
}
