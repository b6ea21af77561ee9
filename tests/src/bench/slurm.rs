//! Slurm beside it, from Debian's packages, in a private directory on loopback: munged, slurmctld and one slurmd, no
//! control groups. It runs bare processes, where berth runs containers.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use super::figures::{Figure, median};
use super::process::{Daemon, MIB, free_port, pss, timed, until};

const ARRAY: usize = 500;
const RUNS: usize = 50;
const LIMIT: Duration = Duration::from_secs(120);

struct Slurm {
    // Ended in this order.
    node: Daemon,
    controller: Daemon,
    _munge: Daemon,
    config: PathBuf,
    _dir: tempfile::TempDir,
}

/// What keeps Slurm from being measured here; `None`: nothing.
pub fn missing() -> Option<String> {
    let programs = ["munged", "slurmctld", "slurmd", "srun", "sbatch", "squeue", "sinfo"];
    let missing: Vec<&str> = programs.into_iter().filter(|name| find(name).is_none()).collect();
    // SAFETY: it only reads.
    let root = unsafe { libc::geteuid() } == 0;
    match (missing.is_empty(), root) {
        (true, true) => None,
        (true, false) => Some("slurmd needs root".to_owned()),
        (false, _) => {
            let what = missing.join(", ");
            Some(format!("no {what}: apt-get install munge slurmctld slurmd slurm-client"))
        }
    }
}

fn find(name: &str) -> Option<PathBuf> {
    ["/usr/sbin", "/usr/bin"].map(|dir| Path::new(dir).join(name)).into_iter().find(|path| path.exists())
}

pub fn measure() -> Result<Vec<Figure>> {
    let slurm = Slurm::start()?;
    let mut figures = vec![
        Figure::peer("slurm: slurmd PSS, fresh", pss(slurm.node.pid())? / MIB, "MiB"),
        Figure::peer("slurm: slurmctld PSS, fresh", pss(slurm.controller.pid())? / MIB, "MiB"),
    ];
    let mut took = Vec::new();
    for _ in 0..RUNS + 3 {
        let mut srun = slurm.client("srun");
        took.push(timed(srun.args(["-n1", "/bin/echo", "x"]))?.as_secs_f64() * 1e3);
    }
    let value = median(&took[3..]).context("nothing was measured")?;
    figures.push(Figure::peer("slurm: srun /bin/echo x, whole process, p50, no container", value, "ms"));
    let value = slurm.array()?;
    figures.push(Figure::peer("slurm: an array of 500, room for all, no containers", value, "s"));
    figures.push(Figure::peer("slurm: slurmd PSS, after work", pss(slurm.node.pid())? / MIB, "MiB"));
    figures.push(Figure::peer("slurm: slurmctld PSS, after work", pss(slurm.controller.pid())? / MIB, "MiB"));
    Ok(figures)
}

impl Slurm {
    fn start() -> Result<Self> {
        let dir = tempfile::Builder::new().prefix("berth-slurm").tempdir()?;
        let at = |name: &str| dir.path().join(name);
        // Munge wants its socket reachable for all, and its key for nobody else.
        set_mode(dir.path(), 0o755)?;
        for name in ["state", "spool", "munge"] {
            fs::create_dir(at(name))?;
            set_mode(&at(name), 0o755)?;
        }
        let key = at("munge/key");
        fs::write(&key, std::iter::repeat_with(|| fastrand::u8(..)).take(1024).collect::<Vec<_>>())?;
        set_mode(&key, 0o600)?;
        let socket = at("munge/socket");
        let mut munged = Command::new("munged");
        munged.args(["--foreground", "--key-file"]).arg(&key).arg("--socket").arg(&socket);
        for (flag, name) in [("--log-file", "log"), ("--pid-file", "pid"), ("--seed-file", "seed")] {
            munged.arg(flag).arg(at("munge").join(name));
        }
        let munge = Daemon::start(&mut munged, &at("munged.log"))?;
        until("munged listens", LIMIT, || socket.exists().then_some(()))?;

        let host = fs::read_to_string("/proc/sys/kernel/hostname")?;
        let host = host.trim().split('.').next().unwrap_or_default();
        let (ctl_port, node_port) = (free_port()?, free_port()?);
        let path = dir.path().display();
        let config = at("slurm.conf");
        // Room for the whole array at once, whatever the machine has: with two processors Slurm fills freed ones
        // once a second (by default every third), and 500 tasks take minutes.
        let text = format!(
            "ClusterName=bench\nSlurmctldHost={host}(127.0.0.1)\nSlurmctldPort={ctl_port}\nSlurmdPort={node_port}\n\
             AuthType=auth/munge\nAuthInfo=socket={socket}\nCredType=cred/munge\nSlurmUser=root\nSlurmdUser=root\n\
             StateSaveLocation={path}/state\nSlurmdSpoolDir={path}/spool\n\
             SlurmctldPidFile={path}/ctl.pid\nSlurmdPidFile={path}/node.pid\n\
             SlurmctldLogFile={path}/ctl.log\nSlurmdLogFile={path}/node.log\n\
             ProctrackType=proctrack/linuxproc\nTaskPlugin=task/none\nMpiDefault=none\nReturnToService=2\n\
             SelectType=select/cons_tres\nSelectTypeParameters=CR_CPU\n\
             SchedulerParameters=batch_sched_delay=0\nSlurmdParameters=config_overrides\n\
             NodeName=bench NodeHostname={host} NodeAddr=127.0.0.1 Port={node_port} CPUs={ARRAY} State=UNKNOWN\n\
             PartitionName=all Nodes=bench Default=YES MaxTime=INFINITE State=UP\n",
            socket = socket.display()
        );
        fs::write(&config, text)?;
        // Since 23.11 slurmd takes control groups unless told not to; before that it does not know this word.
        let version = Command::new("slurmd").arg("-V").output()?;
        let words = String::from_utf8_lossy(&version.stdout).into_owned();
        let year = words.trim().trim_start_matches("slurm-wlm ").split('.').next().unwrap_or_default();
        if year.parse::<u32>().is_ok_and(|year| year >= 23) {
            fs::write(at("cgroup.conf"), "CgroupPlugin=disabled\n")?;
        }
        let daemon = |name: &str, flags: &[&str]| {
            let mut command = Command::new(name);
            Daemon::start(command.args(flags).arg("-f").arg(&config), &at(&format!("{name}.out")))
        };
        let controller = daemon("slurmctld", &["-D", "-i"])?;
        let node = daemon("slurmd", &["-D", "-N", "bench"])?;
        let slurm = Self { node, controller, _munge: munge, config, _dir: dir };
        let ready = until("slurm's node is idle", Duration::from_secs(30), || {
            let output = slurm.client("sinfo").args(["-h", "-o", "%T"]).output().ok()?;
            (String::from_utf8_lossy(&output.stdout).trim() == "idle").then_some(())
        });
        if let Err(error) = ready {
            bail!("{error}\n{}\n{}", slurm.said("ctl.log"), slurm.said("node.log"));
        }
        Ok(slurm)
    }

    fn said(&self, name: &str) -> String {
        let text = fs::read_to_string(self._dir.path().join(name)).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(12)..].join("\n")
    }

    fn client(&self, name: &str) -> Command {
        let mut command = Command::new(name);
        command.env("SLURM_CONF", &self.config).current_dir("/");
        command
    }

    /// Seconds from before `sbatch` until the queue is empty.
    fn array(&self) -> Result<f64> {
        let begun = Instant::now();
        let mut sbatch = self.client("sbatch");
        let array = format!("--array=0-{}", ARRAY - 1);
        let output = sbatch.args([&array, "-n1", "-o", "/dev/null", "--wrap", "true"]).output()?;
        ensure!(output.status.success(), "sbatch: {}", String::from_utf8_lossy(&output.stderr));
        until("the array ends", LIMIT, || {
            // Not so often that the asking slows the work.
            std::thread::sleep(Duration::from_millis(100));
            let output = self.client("squeue").args(["-h"]).output().ok()?;
            (output.status.success() && output.stdout.is_empty()).then_some(())
        })?;
        Ok(begun.elapsed().as_secs_f64())
    }
}

fn set_mode(path: &Path, mode: u32) -> std::io::Result<()> {
    fs::set_permissions(path, std::os::unix::fs::PermissionsExt::from_mode(mode))
}
