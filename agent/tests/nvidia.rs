//! NVIDIA's devices through the real nvml-wrapper, against a library that the test builds.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use berth_agent::io::probe::gpus::Gpus;
use berth_agent::io::probe::{Probe, ProbeConfig};
use berth_protocol::resources::GpuShare;
use berth_protocol::units::Bytes;

const WAIT: Duration = Duration::from_secs(10);
const LOST: u32 = 15;
const VERSION_MISMATCH: u32 = 18;

/// A machine with the stub as its driver's library.
struct Machine {
    dir: tempfile::TempDir,
    library: PathBuf,
}

impl Machine {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let library = dir.path().join("libnvidia-ml.so.1");
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/nvml-stub/nvml.c");
        let built = Command::new("cc")
            .args(["-shared", "-fPIC", "-O1", "-Wall", "-Werror", "-o"])
            .args([library.as_os_str(), source.as_os_str()])
            .arg("-ldl")
            .status()
            .expect("a C compiler is needed: apt install gcc");
        assert!(built.success());
        Self { dir, library }
    }

    fn state(&self, words: &str) {
        // Renamed into place: the stub reads it at any time.
        let new = self.dir.path().join("state.new");
        std::fs::write(&new, words).unwrap();
        std::fs::rename(new, self.dir.path().join("state")).unwrap();
    }

    fn gpus(&self) -> Gpus {
        Gpus::new(self.dir.path().to_owned(), Some(self.library.clone()), None, Duration::from_millis(50))
    }
}

/// Each device's reason, or `ok`.
fn health(gpus: &Gpus) -> Vec<&str> {
    gpus.snapshot().found.iter().map(|found| found.gpu.unhealthy.as_deref().unwrap_or("ok")).collect()
}

async fn recovers(gpus: &mut Gpus) {
    let deadline = Instant::now() + WAIT;
    while health(gpus) != ["ok", "ok"] {
        assert!(Instant::now() < deadline, "{:?}", health(gpus));
        gpus.refresh(Duration::from_millis(10)).await;
        tokio::task::yield_now().await;
    }
}

#[tokio::test(flavor = "current_thread")]
async fn inventory_and_usage() {
    let machine = Machine::new();
    machine.state("0.used=1073741824");
    let config = ProbeConfig {
        nvml: Some(machine.library.clone()),
        data_dir: machine.dir.path().into(),
        ..ProbeConfig::default()
    };
    let mut probe = Probe::new(config).await;
    let inventory = probe.inventory();
    assert_eq!(inventory.gpu_driver.as_deref(), Some("550.54.15"));
    assert_eq!(inventory.cuda.as_deref(), Some("12.4"));
    assert_eq!(inventory.gpus.len(), 2);
    let gpu = &inventory.gpus[0];
    assert_eq!(gpu.uuid, "GPU-00000000-0000-0000-0000-000000000000");
    assert_eq!((gpu.model.as_str(), gpu.memory), ("NVIDIA Stub 0", Bytes(16 << 30)));
    assert_eq!((gpu.pci.as_deref(), gpu.mig), (Some("0000:3b:00.0"), false));

    let sample = probe.sample().await;
    assert!(!sample.changed);
    let usage = &sample.usage.gpus;
    assert_eq!((usage[0].memory, usage[0].percent), (Bytes(1 << 30), 40));
    assert_eq!((usage[0].celsius, usage[0].watts), (Some(50), Some(123)));
    assert_eq!(usage[1].watts, None, "not supported");

    machine.state(&format!("1.fail={LOST}"));
    let sample = probe.sample().await;
    assert!(sample.changed, "told at the next heartbeat");
    assert!(probe.inventory().gpus[1].unhealthy.as_ref().unwrap().contains("fell off the bus"));
    assert_eq!(sample.usage.gpus.len(), 1);
    let lost = GpuShare { uuid: probe.inventory().gpus[1].uuid.clone(), milli: 1000 };
    assert!(probe.grants(&[lost]).unwrap_err().to_string().contains("unhealthy"));

    machine.state("0.mig=0");
    probe.sample().await;
    machine.state(&format!("0.draw={} 1.hold={}", 1 << 30, 9_u64 << 30));
    assert!(probe.sample().await.changed);
    let outside =
        |probe: &Probe| probe.inventory().gpus.iter().map(|gpu| gpu.outside.0 >> 30).collect::<Vec<_>>();
    assert_eq!(outside(&probe), [0, 8], "a desktop is let pass; others' work counts, in steps");

    machine.state("0.mig=1");
    assert!(probe.sample().await.changed);
    assert!(probe.inventory().gpus[0].mig);
}

/// Asked of libcuda by the agent's own program, again whenever the driver was loaded anew.
#[tokio::test(flavor = "current_thread")]
async fn whether_memory_can_be_saved_is_part_of_the_inventory() {
    let machine = Machine::new();
    machine.state("");
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/cuda-stub/cuda.c");
    let mut cc = Command::new("cc");
    cc.args(["-shared", "-fPIC", "-o"]).arg(machine.dir.path().join("libcuda.so.1")).arg(source).arg("-ldl");
    assert!(cc.status().unwrap().success());
    // In place of the program itself, which knows no other place to look for libraries.
    let program = machine.dir.path().join("berth-agent");
    let dir = machine.dir.path().display();
    let script =
        format!("#!/bin/sh\nLD_LIBRARY_PATH={dir} exec {} \"$@\"\n", env!("CARGO_BIN_EXE_berth-agent"));
    std::fs::write(&program, script).unwrap();
    std::fs::set_permissions(&program, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let config = ProbeConfig {
        nvml: Some(machine.library.clone()),
        program: Some(program),
        data_dir: machine.dir.path().into(),
        ..ProbeConfig::default()
    };
    let mut probe = Probe::new(config).await;
    assert!(probe.inventory().saves_gpus);
    machine.state(&format!("driver={VERSION_MISMATCH}"));
    probe.sample().await;
    assert!(!probe.inventory().saves_gpus);
    machine.state("cuda.version=12040");
    let deadline = Instant::now() + WAIT;
    while probe.inventory().gpus.iter().any(|gpu| gpu.unhealthy.is_some()) {
        assert!(Instant::now() < deadline, "{:?}", probe.inventory().gpus);
        probe.sample().await;
    }
    assert!(!probe.inventory().saves_gpus, "an older driver was loaded");
}

#[tokio::test(flavor = "current_thread")]
async fn devices_fall_ill_and_recover() {
    let machine = Machine::new();
    let mut gpus = machine.gpus();
    let lost = format!("1.fail={LOST}");
    for (state, expect) in [
        ("", ["ok", "ok"]),
        (lost.as_str(), ["ok", "fell off the bus"]),
        (lost.as_str(), ["ok", "fell off the bus"]),
        ("", ["ok", "ok"]),
        ("count=1", ["ok", "lists it no longer"]),
        ("", ["ok", "ok"]),
        ("0.ecc=3", ["3 uncorrected memory errors", "ok"]),
        ("0.remap=1 1.retire=1", ["to be remapped", "to be retired"]),
        ("", ["ok", "ok"]),
        // A program's own fault.
        ("1.xid=31", ["ok", "ok"]),
        ("1.xid=79", ["ok", "Xid 79"]),
        // It stands until the device was reset: gone, and back.
        ("", ["ok", "Xid 79"]),
        (lost.as_str(), ["ok", "fell off the bus"]),
        ("1.xid=79", ["ok", "ok"]),
        ("1.xid=119", ["ok", "Xid 119"]),
    ] {
        machine.state(state);
        gpus.refresh(WAIT).await;
        let health = health(&gpus);
        assert_eq!(health.len(), 2, "{state}: {health:?}");
        for (got, expect) in health.iter().zip(expect) {
            assert!(got.contains(expect), "{state}: {health:?}");
        }
    }
}

#[tokio::test(flavor = "current_thread")]
async fn one_that_never_worked_is_listed_without_a_name() {
    let machine = Machine::new();
    machine.state(&format!("count=3 2.fail={LOST}"));
    let mut gpus = machine.gpus();
    gpus.refresh(WAIT).await;
    let broken = &gpus.snapshot().found[2].gpu;
    assert_eq!((broken.uuid.as_str(), broken.memory), ("nvidia-2", Bytes::ZERO));
    assert!(broken.unhealthy.is_some());
    machine.state("count=3");
    gpus.refresh(WAIT).await;
    assert_eq!(health(&gpus), ["ok", "ok", "ok"]);
    assert!(gpus.snapshot().found.iter().all(|found| found.gpu.uuid.starts_with("GPU-")));
}

#[tokio::test(flavor = "current_thread")]
async fn the_whole_driver_goes_and_comes_back() {
    let machine = Machine::new();
    machine.state("");
    let mut gpus = machine.gpus();
    gpus.refresh(WAIT).await;
    assert_eq!(health(&gpus), ["ok", "ok"]);
    machine.state(&format!("driver={VERSION_MISMATCH}"));
    for _ in 0..2 {
        gpus.refresh(WAIT).await;
        assert!(
            health(&gpus).iter().all(|reason| reason.contains("version mismatch")),
            "{:?}",
            health(&gpus)
        );
    }
    machine.state("");
    recovers(&mut gpus).await;
}

#[tokio::test(flavor = "current_thread")]
async fn a_driver_that_hangs_holds_nobody_up() {
    let machine = Machine::new();
    machine.state("");
    let mut gpus = machine.gpus();
    gpus.refresh(WAIT).await;
    machine.state("1.hang=1");
    let short = Duration::from_millis(10);
    let deadline = Instant::now() + WAIT;
    while health(&gpus)[0] == "ok" {
        assert!(Instant::now() < deadline);
        gpus.refresh(short).await;
    }
    assert!(health(&gpus).iter().all(|reason| reason.contains("has not answered")), "{:?}", health(&gpus));
    machine.state("");
    recovers(&mut gpus).await;
}

#[tokio::test(flavor = "current_thread")]
async fn no_library_is_no_gpu() {
    let empty = tempfile::tempdir().unwrap();
    for library in [None, Some(empty.path().join("libnvidia-ml.so.1"))] {
        let mut gpus = Gpus::new(empty.path().to_owned(), library, None, WAIT);
        gpus.refresh(WAIT).await;
        assert!(gpus.snapshot().found.is_empty());
    }
}

#[tokio::test(flavor = "current_thread")]
async fn what_pods_hold_is_not_others() {
    let machine = Machine::new();
    let groups = machine.dir.path().join("proc/4242");
    std::fs::create_dir_all(&groups).unwrap();
    let mut gpus = machine.gpus();
    machine.state(&format!("0.hold={}", 4_u64 << 30));
    for (cgroup, held) in [
        ("0::/user.slice/session-1.scope", 4_u64 << 30),
        ("9:memory:/berth/a1.01234567/j-0.1\n0::/", 0),
        ("0::/berth/a1.01234567/j-0.1/main", 0),
    ] {
        std::fs::write(groups.join("cgroup"), cgroup).unwrap();
        gpus.refresh(WAIT).await;
        assert_eq!(gpus.snapshot().found[0].gpu.outside, Bytes(held), "{cgroup}");
    }
}
