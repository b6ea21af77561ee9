//! What may be left of a soak: processes, mounts, control groups, interfaces, directories of pods. Sets the soak apart
//! before anything starts, looks, and at the very end sweeps.

use std::ffi::CString;
use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use berth_agent::io::network::SLOTS_DIR;
use berth_protocol::ids::Digest;

use super::ground::{Ground, Role};

/// In the environment of programs, and so of all that they start but containers.
pub const MARK: &str = "BERTH_TEST_MARK";

/// Leaves the machine's mount namespace for one of the soak's own, with `dir` in the place where agents of a machine share
/// numbers for their bridges: others of this machine must not take one from an agent that is dead for a moment, and whose
/// bridge they cannot see. Before the first thread.
pub fn set_apart(dir: &Path) -> Result<()> {
    let slots = dir.join("net");
    fs::create_dir_all(&slots)?;
    fs::create_dir_all(SLOTS_DIR)?;
    // SAFETY: no pointers.
    if unsafe { libc::unshare(libc::CLONE_NEWNS) } != 0 {
        return Err(io::Error::last_os_error()).context("cannot make a mount namespace (is this root?)");
    }
    mount(Path::new("/"), Path::new("/"), libc::MS_REC | libc::MS_SLAVE)?;
    mount(&slots, Path::new(SLOTS_DIR), libc::MS_BIND)
}

fn mount(from: &Path, to: &Path, flags: libc::c_ulong) -> Result<()> {
    let (source, target) =
        (CString::new(from.as_os_str().as_bytes())?, CString::new(to.as_os_str().as_bytes())?);
    // SAFETY: both outlive the call; such mounts need neither type nor options.
    match unsafe { libc::mount(source.as_ptr(), target.as_ptr(), std::ptr::null(), flags, std::ptr::null()) }
    {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()).with_context(|| format!("cannot mount at {}", to.display())),
    }
}

/// What was found, in words.
#[derive(Debug, Default)]
pub struct Leaks {
    pub processes: Vec<String>,
    pub mounts: Vec<String>,
    pub groups: Vec<String>,
    pub interfaces: Vec<String>,
    pub pods: Vec<String>,
}

/// To be asked when nothing runs any more.
pub fn look(ground: &Ground, dir: &Path, mark: &str) -> Leaks {
    let processes = marked(mark).into_iter().chain(programs(dir).into_iter().map(|(pid, _)| pid));
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    // The soak's own is of another place.
    let here = dir.to_string_lossy();
    let left = |line: &&str| line.contains(&*here) && !line.contains(SLOTS_DIR);
    Leaks {
        processes: processes.map(|pid| format!("{pid} {}", words(pid).join(" "))).collect(),
        mounts: mounts.lines().filter(left).map(str::to_owned).collect(),
        groups: ground.nodes().flat_map(|(node, dir)| groups(node, &dir)).map(shown).collect(),
        interfaces: interfaces(ground),
        pods: pods(ground).into_iter().map(shown).collect(),
    }
}

fn shown(path: PathBuf) -> String {
    path.display().to_string()
}

/// Directories of pods that agents have not let go.
pub fn pods(ground: &Ground) -> Vec<PathBuf> {
    let entries = ground.nodes().flat_map(|(_, dir)| fs::read_dir(dir.join("pods")).into_iter().flatten());
    entries.flatten().map(|entry| entry.path()).collect()
}

fn numbers() -> impl Iterator<Item = u32> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok())
}

/// The command line of a process.
pub fn words(pid: u32) -> Vec<String> {
    let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    let words = line.split(|byte| *byte == 0).filter(|word| !word.is_empty());
    words.map(|word| String::from_utf8_lossy(word).into_owned()).collect()
}

fn marked(mark: &str) -> Vec<u32> {
    let pair = format!("{MARK}={mark}").into_bytes();
    let has = |pid: &u32| {
        let environment = fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
        environment.split(|byte| *byte == 0).any(|part| part == pair)
    };
    numbers().filter(has).collect()
}

/// The programs of jobs, each with its job's name.
pub fn programs(dir: &Path) -> Vec<(u32, String)> {
    let histories = dir.join("histories");
    let job = |pid: u32| match &words(pid)[..] {
        [_, word, place, job, ..] if word == "tick" && Path::new(place) == histories => {
            Some((pid, job.clone()))
        }
        _ => None,
    };
    numbers().filter_map(job).collect()
}

/// The control groups of a node, innermost first.
fn groups(node: &str, data: &Path) -> Vec<PathBuf> {
    let owner = Digest::of(data.as_os_str().as_encoded_bytes()).hex();
    let own = format!("berth/{node}.{}", &owner[..8]);
    let mounted = fs::read_dir("/sys/fs/cgroup").into_iter().flatten().flatten();
    let roots = mounted.map(|entry| entry.path()).chain(["/sys/fs/cgroup".into()]);
    let mut found = Vec::new();
    roots.for_each(|root| descend(&root.join(&own), &mut found));
    found
}

fn descend(dir: &Path, found: &mut Vec<PathBuf>) {
    let Ok(entries) = fs::read_dir(dir) else { return };
    let inner = entries.flatten().map(|entry| entry.path()).filter(|path| path.is_dir());
    inner.for_each(|path| descend(&path, found));
    found.push(dir.to_owned());
}

/// Of hosts of agents, beside the loopback and the wire.
fn interfaces(ground: &Ground) -> Vec<String> {
    let hosts = (0..ground.programs.len()).filter(|host| ground.programs[*host].role == Role::Agent);
    let list = |host: usize| {
        let mut command = Command::new("ip");
        ground.on(host, command.args(["-o", "link"]));
        let output = command.output().map(|output| output.stdout).unwrap_or_default();
        let text = String::from_utf8_lossy(&output).into_owned();
        let extra = text.lines().filter(|line| !line.contains(": lo:") && !line.contains(": wire0:"));
        extra.map(|line| format!("{}: {line}", ground.programs[host].name)).collect::<Vec<_>>()
    };
    hosts.flat_map(list).collect()
}

/// Ends whatever bears the mark, and takes its control groups away: nothing else was made that outlives its processes.
pub fn sweep(mark: &str, nodes: &[(String, PathBuf)]) {
    let end = Instant::now() + Duration::from_secs(20);
    loop {
        let left = marked(mark);
        for pid in &left {
            // SAFETY: no pointers.
            unsafe { libc::kill(*pid as i32, libc::SIGKILL) };
        }
        let groups: Vec<PathBuf> = nodes.iter().flat_map(|(node, data)| groups(node, data)).collect();
        groups.iter().for_each(|group| drop(fs::remove_dir(group)));
        if (left.is_empty() && groups.is_empty()) || Instant::now() > end {
            return;
        }
        std::thread::park_timeout(Duration::from_millis(50));
    }
}
