//! Processors, memory, disk, load, and what the system says of itself; reads `/proc` and `/etc`, nothing else.
//!
//! sysinfo reads memory, load and processor time; the disk is one statvfs of the data directory, since listing all
//! mounts would hang with a dead network file system.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read};
use std::path::Path;

use berth_protocol::units::{Bytes, MilliCpu};
use sysinfo::{MemoryRefreshKind, System};

use super::bounded;
use crate::shim::sys::wide;

/// Features of a processor in the inventory, and the length of one: x86-64 has some 200 of at most 20 bytes.
const CPU_FEATURES_MAX: usize = 512;
const CPU_FEATURE_BYTES_MAX: usize = 32;
const TEXT_BYTES_MAX: usize = 128;
/// `/proc/cpuinfo` of a machine with thousands of processors.
const CPUINFO_BYTES_MAX: u64 = 32 << 20;
const LINE_BYTES_MAX: usize = 16 << 10;

/// What does not change while the machine is up.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Facts {
    pub hostname: String,
    /// As `uname -m` says.
    pub arch: String,
    pub kernel: String,
    pub os: String,
    pub cpu_model: String,
    pub cpu_features: BTreeSet<String>,
}

/// Reads what is known of the system; what cannot be read is empty.
pub fn facts(root: &Path) -> Facts {
    let release = fs::read_to_string(root.join("etc/os-release"))
        .or_else(|_| fs::read_to_string(root.join("usr/lib/os-release")))
        .unwrap_or_default();
    let cpu = File::open(root.join("proc/cpuinfo"))
        .map(|file| cpu_info(BufReader::new(file.take(CPUINFO_BYTES_MAX))))
        .unwrap_or_default();
    let board = || fs::read_to_string(root.join("proc/device-tree/model")).unwrap_or_default();
    let text = |text: &str| bounded(text, TEXT_BYTES_MAX);
    Facts {
        hostname: text(&System::host_name().unwrap_or_default()),
        arch: text(&System::cpu_arch()),
        kernel: text(&System::kernel_version().unwrap_or_default()),
        os: text(&os_name(&release)),
        cpu_model: text(&cpu.model.or_else(|| Some(board()).filter(|b| !b.is_empty())).unwrap_or(cpu.part)),
        cpu_features: cpu.features,
    }
}

#[derive(Debug, Default)]
struct CpuInfo {
    model: Option<String>,
    /// Implementer and part by number, for arm64, which has no model.
    part: String,
    features: BTreeSet<String>,
}

/// Reads `/proc/cpuinfo` of any architecture. The features are those that all processors share, since a restored
/// process may run on any of them.
fn cpu_info(mut lines: impl BufRead) -> CpuInfo {
    let mut info = CpuInfo::default();
    let mut first_features: Option<String> = None;
    let (mut implementer, mut part) = (None, None);
    let mut raw = Vec::new();
    loop {
        raw.clear();
        match lines.by_ref().take(LINE_BYTES_MAX as u64).read_until(b'\n', &mut raw) {
            Ok(1..) => {}
            _ => break,
        }
        let line = String::from_utf8_lossy(&raw);
        let Some((key, value)) = line.split_once(':') else { continue };
        let value = value.trim();
        match key.trim() {
            // x86; armv7 and loongarch; POWER; RISC-V
            "model name" | "Model Name" | "cpu" | "uarch" if info.model.is_none() && !value.is_empty() => {
                info.model = Some(value.to_owned());
            }
            "CPU implementer" if implementer.is_none() => implementer = Some(value.to_owned()),
            "CPU part" if part.is_none() => part = Some(value.to_owned()),
            // x86; arm and loongarch; s390x; RISC-V
            "flags" | "Features" | "features" | "isa" => match &first_features {
                None => {
                    info.features = features(value);
                    first_features = Some(value.to_owned());
                }
                Some(first) if first == value => {}
                Some(_) => info.features = &info.features & &features(value),
            },
            _ => {}
        }
    }
    if let (Some(implementer), Some(part)) = (implementer, part) {
        info.part = format!("implementer {implementer} part {part}");
    }
    info
}

fn features(line: &str) -> BTreeSet<String> {
    line.split_ascii_whitespace()
        .filter(|feature| feature.len() <= CPU_FEATURE_BYTES_MAX)
        .take(CPU_FEATURES_MAX)
        .map(str::to_owned)
        .collect()
}

/// Name and version from `/etc/os-release`, such as `Debian GNU/Linux 12` (os-release(5)).
fn os_name(release: &str) -> String {
    let field = |name: &str| {
        release.lines().find_map(|line| {
            let value = line.trim().strip_prefix(name)?.strip_prefix('=')?;
            Some(value.trim_matches(['"', '\'']))
        })
    };
    let name = field("NAME").unwrap_or("Linux");
    match field("VERSION_ID").or_else(|| field("BUILD_ID")) {
        Some(version) => format!("{name} {version}"),
        None => name.to_owned(),
    }
}

/// One reading of the machine, berth's pods or not.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Reading {
    /// Processors that the agent may run on.
    pub cpu_total: MilliCpu,
    pub cpu_used: MilliCpu,
    pub memory_total: Bytes,
    pub memory_used: Bytes,
    pub disk_total: Bytes,
    pub disk_used: Bytes,
    pub load_milli: u64,
}

/// Reads what changes; keeps the processor times of the last reading.
#[derive(Debug)]
pub struct Meter {
    system: Option<System>,
}

impl Default for Meter {
    fn default() -> Self {
        Self::new()
    }
}

impl Meter {
    pub fn new() -> Self {
        Self { system: System::new().ok() }
    }

    /// What cannot be read is zero, so that nothing is offered that was not seen.
    pub fn read(&mut self, data_dir: &Path) -> Reading {
        let mut reading = Reading { cpu_total: cpu_total(), ..Reading::default() };
        if let Some(system) = &mut self.system {
            system.refresh_memory_specifics(MemoryRefreshKind::nothing().with_ram());
            system.refresh_cpu_usage();
            reading.memory_total = Bytes(system.total_memory());
            reading.memory_used = Bytes(system.total_memory().saturating_sub(system.available_memory()));
            let cores = system.cpus().len() as f64;
            reading.cpu_used = MilliCpu((f64::from(system.global_cpu_usage()) * cores * 10.0) as u64);
        }
        reading.load_milli = System::load_average().map_or(0, |load| (load.one * 1000.0) as u64);
        if let Ok(disk) = nix::sys::statvfs::statvfs(data_dir) {
            let bytes = |blocks: u64| Bytes(blocks.saturating_mul(wide(disk.fragment_size())));
            let blocks = wide(disk.blocks());
            reading.disk_total = bytes(blocks);
            reading.disk_used = bytes(blocks.saturating_sub(wide(disk.blocks_free())));
        }
        reading
    }
}

/// Processors in the agent's affinity mask, which follows its cpuset and processors going on- and offline.
fn cpu_total() -> MilliCpu {
    let this = nix::unistd::Pid::from_raw(0);
    let cores = match nix::sched::sched_getaffinity(this) {
        Ok(set) => {
            (0..nix::sched::CpuSet::count()).filter(|&cpu| set.is_set(cpu).unwrap_or(false)).count() as u64
        }
        // More processors than the mask has room for.
        Err(_) => std::thread::available_parallelism().map_or(1, |cores| cores.get() as u64),
    };
    MilliCpu(cores.saturating_mul(1000))
}

#[cfg(test)]
mod tests {
    use super::*;

    const X86: &str = "processor\t: 0\nvendor_id\t: AuthenticAMD\nmodel name\t: AMD EPYC 9654 96-Core Processor\n\
        flags\t\t: fpu sse2 avx512f\nbugs\t\t: spectre_v1\n\nprocessor\t: 1\nmodel name\t: other\n\
        flags\t\t: fpu sse2\n";
    const ARM64: &str = "processor\t: 0\nBogoMIPS\t: 108.00\nFeatures\t: fp asimd evtstrm crc32 cpuid\n\
        CPU implementer\t: 0x41\nCPU architecture: 8\nCPU variant\t: 0x0\nCPU part\t: 0xd08\nCPU revision\t: 3\n";
    const ARMV7: &str = "processor\t: 0\nmodel name\t: ARMv7 Processor rev 4 (v7l)\n\
        Features\t: half thumb neon vfpv4\nCPU implementer\t: 0x41\nCPU part\t: 0xd03\n\nHardware\t: BCM2835\n";
    const RISCV: &str =
        "processor\t: 0\nhart\t\t: 1\nisa\t\t: rv64imafdc\nmmu\t\t: sv39\nuarch\t\t: sifive,u74-mc\n";
    const POWER: &str =
        "processor\t: 0\ncpu\t\t: POWER9 (architected), altivec supported\nclock\t\t: 2200MHz\n";
    const S390: &str = "vendor_id       : IBM/S390\n# processors    : 4\nfeatures\t: esan3 zarch stfle\n";

    #[test]
    fn cpuinfo_of_many_architectures() {
        for (text, model, part, features) in [
            (X86, Some("AMD EPYC 9654 96-Core Processor"), "", "fpu sse2"),
            (ARM64, None, "implementer 0x41 part 0xd08", "asimd cpuid crc32 evtstrm fp"),
            (
                ARMV7,
                Some("ARMv7 Processor rev 4 (v7l)"),
                "implementer 0x41 part 0xd03",
                "half neon thumb vfpv4",
            ),
            (RISCV, Some("sifive,u74-mc"), "", "rv64imafdc"),
            (POWER, Some("POWER9 (architected), altivec supported"), "", ""),
            (S390, None, "", "esan3 stfle zarch"),
            ("", None, "", ""),
            ("garbage \u{fffd}\n::\nflags", None, "", ""),
        ] {
            let info = cpu_info(text.as_bytes());
            assert_eq!(info.model.as_deref(), model, "{text}");
            assert_eq!(info.part, part, "{text}");
            assert_eq!(info.features.iter().map(String::as_str).collect::<Vec<_>>().join(" "), features);
        }
    }

    #[test]
    fn features_are_bounded() {
        let many: String = (0..10_000).map(|n| format!("f{n} ")).collect();
        assert_eq!(features(&many).len(), CPU_FEATURES_MAX);
        assert!(features(&"x".repeat(CPU_FEATURE_BYTES_MAX + 1)).is_empty());
    }

    #[test]
    fn os_release() {
        for (text, expect) in [
            (
                "PRETTY_NAME=\"Debian 12\"\nNAME=\"Debian GNU/Linux\"\nVERSION_ID=\"12\"\n",
                "Debian GNU/Linux 12",
            ),
            ("NAME=\"Arch Linux\"\nBUILD_ID=rolling\n", "Arch Linux rolling"),
            ("NAME=Fedora\nVERSION_ID=41\n", "Fedora 41"),
            ("NAME=Alpine\n", "Alpine"),
            ("", "Linux"),
        ] {
            assert_eq!(os_name(text), expect);
        }
    }

    #[test]
    fn a_board_names_a_processor_that_does_not() {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir_all(root.path().join("proc/device-tree")).unwrap();
        fs::write(root.path().join("proc/cpuinfo"), ARM64).unwrap();
        assert_eq!(facts(root.path()).cpu_model, "implementer 0x41 part 0xd08");
        fs::write(root.path().join("proc/device-tree/model"), "Raspberry Pi 4 Model B Rev 1.1\0").unwrap();
        assert_eq!(facts(root.path()).cpu_model, "Raspberry Pi 4 Model B Rev 1.1");
    }
}
