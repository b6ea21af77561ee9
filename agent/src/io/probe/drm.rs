//! AMD's and Intel's devices from `/sys/class/drm`; reads, and changes nothing. A device that was seen once stays
//! listed, unhealthy while it is not there.
//!
//! Sources: the kernel's "AMDGPU driver misc information" and "Ras support"; drivers i915 and xe.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};

use berth_protocol::limits::GPUS_PER_NODE_MAX;
use berth_protocol::resources::{Gpu, GpuUsage, GpuVendor};
use berth_protocol::units::Bytes;

use super::bounded;
use super::gpus::Found;

const NAME_BYTES_MAX: usize = 96;
/// Connectors (`card0-DP-1`) and nodes in `/sys/class/drm` that are looked at.
const ENTRIES_MAX: usize = 4096;

/// The devices seen so far.
#[derive(Debug)]
pub struct Drm {
    root: PathBuf,
    known: BTreeMap<String, Found>,
}

impl Drm {
    pub fn new(root: &Path) -> Self {
        Self { root: root.to_owned(), known: BTreeMap::new() }
    }

    /// Whether there is a card of a driver that is read here.
    pub fn present(root: &Path) -> bool {
        cards(root).iter().any(|card| Identity::of(card).is_some())
    }

    pub fn sample(&mut self) -> Vec<Found> {
        let now: Vec<Found> = cards(&self.root).iter().filter_map(|card| self.look(card)).collect();
        for (uuid, known) in &mut self.known {
            if !now.iter().any(|found| found.gpu.uuid == *uuid) {
                *known = known.clone().lost("it is gone from /sys/class/drm".to_owned());
            }
        }
        self.known.extend(now.into_iter().map(|found| (found.gpu.uuid.clone(), found)));
        self.known.values().cloned().collect()
    }

    fn look(&self, card: &Path) -> Option<Found> {
        let identity = Identity::of(card)?;
        let device = card.join("device");
        let amd = identity.vendor == GpuVendor::Amd;
        let uuid = text(&device, "unique_id")
            .filter(|_| amd)
            .map_or_else(|| identity.pci.clone(), |id| format!("GPU-{}", bounded(&id, 32)));
        let memory = if amd { number(&device, "mem_info_vram_total") } else { intel_memory(card) };
        let model = match self.known.get(&uuid) {
            Some(known) => known.gpu.model.clone(),
            None => self.model(&device, &identity),
        };
        let gpu = Gpu {
            uuid: uuid.clone(),
            vendor: identity.vendor,
            model,
            memory: Bytes(memory.unwrap_or(0)),
            pci: Some(identity.pci),
            unhealthy: memory_errors(&device),
            mig: false,
            outside: Bytes::ZERO,
        };
        let sensors = first_dir(&device.join("hwmon"));
        let sensor = |name: &str| sensors.as_ref().and_then(|dir| number(dir, name));
        let usage = GpuUsage {
            uuid,
            memory: Bytes(number(&device, "mem_info_vram_used").unwrap_or(0)),
            percent: number(&device, "gpu_busy_percent").map_or(0, |percent| percent.min(100) as u8),
            celsius: sensor("temp1_input").and_then(|milli| u16::try_from(milli / 1000).ok()),
            watts: sensor("power1_average")
                .or_else(|| sensor("power1_input"))
                .and_then(|micro| u32::try_from(micro / 1_000_000).ok()),
        };
        Some(Found { gpu, usage: Some(usage), nodes: nodes(&device) })
    }

    /// What the board calls itself, else the list of PCI ids, else the bare numbers.
    fn model(&self, device: &Path, identity: &Identity) -> String {
        let name = text(device, "product_name")
            .or_else(|| {
                ["usr/share/misc/pci.ids", "usr/share/hwdata/pci.ids"]
                    .iter()
                    .find_map(|path| File::open(self.root.join(path)).ok())
                    .and_then(|file| pci_name(BufReader::new(file), &identity.ids.0, &identity.ids.1))
            })
            .unwrap_or_else(|| format!("{:?} {}:{}", identity.vendor, identity.ids.0, identity.ids.1));
        bounded(&name, NAME_BYTES_MAX)
    }
}

/// What a card's `uevent` says: its driver, and its place and kind on the PCI bus.
#[derive(Debug, PartialEq, Eq)]
struct Identity {
    vendor: GpuVendor,
    pci: String,
    /// Vendor and device, four hexadecimal digits each, lowercase.
    ids: (String, String),
}

impl Identity {
    fn of(card: &Path) -> Option<Self> {
        Self::parse(&fs::read_to_string(card.join("device/uevent")).ok()?)
    }

    fn parse(uevent: &str) -> Option<Self> {
        let field = |name: &str| uevent.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix('='));
        let vendor = match field("DRIVER")? {
            "amdgpu" => GpuVendor::Amd,
            "i915" | "xe" => GpuVendor::Intel,
            _ => return None,
        };
        let (maker, device) = field("PCI_ID")?.split_once(':')?;
        let ids = (maker.to_ascii_lowercase(), device.to_ascii_lowercase());
        Some(Self { vendor, pci: bounded(field("PCI_SLOT_NAME")?, 32), ids })
    }
}

/// The directories of `card0`, `card1`, …, without connectors.
fn cards(root: &Path) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(root.join("sys/class/drm")) else { return Vec::new() };
    let mut cards: Vec<_> = entries
        .take(ENTRIES_MAX)
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| {
            let number = path.file_name().and_then(|name| name.to_str()).and_then(|n| n.strip_prefix("card"));
            number.is_some_and(|n| !n.is_empty() && n.bytes().all(|b| b.is_ascii_digit()))
        })
        .collect();
    cards.sort();
    cards.truncate(GPUS_PER_NODE_MAX);
    cards
}

/// `/dev/dri/card0` and `/dev/dri/renderD128`, the render node first.
fn nodes(device: &Path) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(device.join("drm")) else { return Vec::new() };
    let mut names: Vec<String> = entries
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .filter(|name| name.starts_with("card") || name.starts_with("renderD"))
        .collect();
    names.sort();
    names.iter().rev().map(|name| Path::new("/dev/dri").join(name)).collect()
}

/// A discrete device's own memory: i915 tells it of the card, xe of each tile. Zero for one that shares the host's.
fn intel_memory(card: &Path) -> Option<u64> {
    number(card, "lmem_total_bytes").or_else(|| {
        let tiles = (0..8).filter_map(|tile| {
            let text = text(&card.join(format!("device/tile{tile}")), "physical_vram_size_bytes")?;
            u64::from_str_radix(text.trim_start_matches("0x"), if text.starts_with("0x") { 16 } else { 10 })
                .ok()
        });
        tiles.reduce(u64::saturating_add)
    })
}

/// Uncorrectable errors that AMD's driver counted since it was loaded, in blocks such as `umc` (memory).
fn memory_errors(device: &Path) -> Option<String> {
    let counts = text(&device.join("ras"), "umc_err_count")?;
    let uncorrected: u64 = counts.lines().find_map(|line| line.strip_prefix("ue:"))?.trim().parse().ok()?;
    (uncorrected > 0).then(|| format!("{uncorrected} uncorrected memory errors since its driver was loaded"))
}

fn text(dir: &Path, name: &str) -> Option<String> {
    let text = fs::read_to_string(dir.join(name)).ok()?;
    Some(text.trim().to_owned()).filter(|text| !text.is_empty())
}

fn number(dir: &Path, name: &str) -> Option<u64> {
    text(dir, name)?.parse().ok()
}

fn first_dir(dir: &Path) -> Option<PathBuf> {
    let mut dirs: Vec<_> = fs::read_dir(dir).ok()?.filter_map(|entry| Some(entry.ok()?.path())).collect();
    dirs.sort();
    dirs.into_iter().next()
}

/// The device's name in `pci.ids`: a vendor's line begins with its number, a device's with a tab and its number.
fn pci_name(lines: impl BufRead, vendor: &str, device: &str) -> Option<String> {
    let mut within = false;
    for line in lines.lines().map_while(Result::ok) {
        if line.starts_with(['#', 'C']) || line.is_empty() {
            continue;
        }
        match line.strip_prefix('\t') {
            None => {
                if within {
                    return None;
                }
                within = line.starts_with(vendor);
            }
            Some(rest) if within => {
                if let Some(name) = rest.strip_prefix(device) {
                    return Some(name.trim().to_owned());
                }
            }
            Some(_) => {}
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    fn put(root: &Path, path: &str, text: &str) {
        let path = root.join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    /// A card as the kernel shows it: the class directory links to the device's.
    fn card(root: &Path, number: u32, slot: &str, driver: &str, ids: &str, files: &[(&str, &str)]) {
        let device = format!("sys/devices/pci0000:00/{slot}");
        put(
            root,
            &format!("{device}/uevent"),
            &format!("DRIVER={driver}\nPCI_ID={ids}\nPCI_SLOT_NAME={slot}\n"),
        );
        for (name, text) in files {
            put(root, &format!("{device}/{name}"), text);
        }
        for node in [format!("card{number}"), format!("renderD{}", 128 + number)] {
            let dir = root.join(&device).join("drm").join(&node);
            fs::create_dir_all(&dir).unwrap();
            symlink("../..", dir.join("device")).unwrap();
            fs::create_dir_all(root.join("sys/class/drm")).unwrap();
            symlink(&dir, root.join("sys/class/drm").join(&node)).unwrap();
        }
        fs::create_dir_all(root.join(format!("sys/class/drm/card{number}-DP-1"))).unwrap();
    }

    const MI300: &[(&str, &str)] = &[
        ("unique_id", "3a0f1c2b4d5e6f70\n"),
        ("product_name", "AMD Instinct MI300X\n"),
        ("mem_info_vram_total", "206141652992\n"),
        ("mem_info_vram_used", "304087040\n"),
        ("gpu_busy_percent", "37\n"),
        ("ras/umc_err_count", "ue: 0\nce: 4\n"),
        ("hwmon/hwmon3/temp1_input", "41000\n"),
        ("hwmon/hwmon3/power1_average", "145000000\n"),
    ];

    #[test]
    fn amd_and_intel() {
        let root = tempfile::tempdir().unwrap();
        let root = root.path();
        assert!(!Drm::present(root));
        card(root, 0, "0000:03:00.0", "amdgpu", "1002:74A1", MI300);
        card(
            root,
            1,
            "0000:04:00.0",
            "xe",
            "8086:56A0",
            &[("tile0/physical_vram_size_bytes", "0x3fa000000\n")],
        );
        card(root, 2, "0000:05:00.0", "ast", "1A03:2000", &[]);
        put(
            root,
            "usr/share/misc/pci.ids",
            "# x\n1002  AMD\n\t56a0  Wrong\n8086  Intel\n\t56a0  DG2 [Arc A770]\n",
        );
        assert!(Drm::present(root));

        let mut drm = Drm::new(root);
        let found = drm.sample();
        assert_eq!(found.len(), 2, "{found:?}");
        let [intel, amd] = [&found[0], &found[1]];
        assert_eq!(amd.gpu.uuid, "GPU-3a0f1c2b4d5e6f70");
        assert_eq!(amd.gpu.model, "AMD Instinct MI300X");
        assert_eq!(amd.gpu.memory, Bytes(206_141_652_992));
        assert_eq!(amd.gpu.pci.as_deref(), Some("0000:03:00.0"));
        assert_eq!(amd.gpu.unhealthy, None);
        assert_eq!(amd.nodes, ["/dev/dri/renderD128", "/dev/dri/card0"].map(PathBuf::from));
        let usage = amd.usage.as_ref().unwrap();
        assert_eq!((usage.percent, usage.celsius, usage.watts), (37, Some(41), Some(145)));
        assert_eq!(intel.gpu.uuid, "0000:04:00.0");
        assert_eq!(intel.gpu.model, "DG2 [Arc A770]");
        assert_eq!(intel.gpu.memory, Bytes(0x3_fa00_0000));

        put(root, "sys/devices/pci0000:00/0000:03:00.0/ras/umc_err_count", "ue: 2\nce: 4\n");
        assert!(drm.sample()[1].gpu.unhealthy.as_ref().unwrap().contains("2 uncorrected"));
        put(root, "sys/devices/pci0000:00/0000:03:00.0/ras/umc_err_count", "ue: 0\nce: 0\n");
        fs::rename(root.join("sys/class/drm/card0"), root.join("gone")).unwrap();
        let lost = &drm.sample()[1];
        assert!(lost.gpu.unhealthy.as_ref().unwrap().contains("gone") && lost.usage.is_none());
        fs::rename(root.join("gone"), root.join("sys/class/drm/card0")).unwrap();
        assert_eq!(drm.sample()[1].gpu.unhealthy, None);
    }

    #[test]
    fn uevents() {
        let amd = "DRIVER=amdgpu\nPCI_CLASS=30000\nPCI_ID=1002:744C\nPCI_SLOT_NAME=0000:03:00.0\n";
        let identity = Identity::parse(amd).unwrap();
        assert_eq!(identity.ids, ("1002".to_owned(), "744c".to_owned()));
        for other in ["", "DRIVER=amdgpu\n", "DRIVER=nvidia\nPCI_ID=10DE:1EB8\nPCI_SLOT_NAME=0000:03:00.0\n"]
        {
            assert_eq!(Identity::parse(other), None);
        }
    }
}
