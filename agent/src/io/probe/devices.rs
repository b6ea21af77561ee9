//! How an allotted GPU reaches a container: by its CDI name where a specification is installed, otherwise by its
//! device nodes and driver libraries. Looks files up; the shim mounts them.
//!
//! Libraries are bound at the host's own path: a container whose distribution keeps libraries elsewhere wants CDI.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};

use berth_protocol::resources::{GpuShare, GpuVendor};

use super::cdi;
use super::gpus::Found;
use crate::cdi::Specs;
use crate::task::DeviceGrant;

/// Libraries of NVIDIA's driver that a program needs for computing, coding video, and looking at devices.
const NVIDIA_LIBRARIES: [&str; 13] = [
    "libcuda.so",
    "libcudadebugger.so",
    "libnvcuvid.so",
    "libnvidia-allocator.so",
    "libnvidia-cfg.so",
    "libnvidia-encode.so",
    "libnvidia-gpucomp.so",
    "libnvidia-ml.so",
    "libnvidia-nvvm.so",
    "libnvidia-opencl.so",
    "libnvidia-opticalflow.so",
    "libnvidia-pkcs11.so",
    "libnvidia-ptxjitcompiler.so",
];
const NVIDIA_TOOLS: [&str; 1] = ["/usr/bin/nvidia-smi"];
const NVIDIA_SHARED_NODES: [&str; 4] =
    ["/dev/nvidiactl", "/dev/nvidia-uvm", "/dev/nvidia-uvm-tools", "/dev/nvidia-modeset"];
const LIBRARY_DIRS: [&str; 8] = [
    "/usr/lib/x86_64-linux-gnu",
    "/usr/lib/aarch64-linux-gnu",
    "/usr/lib/arm-linux-gnueabihf",
    "/usr/lib64",
    "/usr/lib",
    "/usr/local/nvidia/lib64",
    "/usr/lib/wsl/lib",
    "/opt/cuda/lib64",
];
const LD_CACHE_BYTES_MAX: u64 = 16 << 20;
/// Bound files: versions and links of each library.
const FILES_MAX: usize = 128;

/// Why a share cannot be handed out.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum GrantError {
    #[error("this node has no GPU `{uuid}`")]
    Unknown { uuid: String },
    #[error("GPU `{uuid}` is unhealthy: {reason}")]
    Unhealthy { uuid: String, reason: String },
    #[error("GPU `{uuid}` is split by MIG and cannot be handed out whole")]
    Split { uuid: String },
    #[error("GPU `{uuid}` has no device node {path}: is its driver loaded?")]
    NoNode { uuid: String, path: PathBuf },
    #[error("libcuda.so is not on this node: install NVIDIA's driver libraries, or a CDI specification")]
    NoLibraries,
}

/// One grant for each share. What several devices need together is in the first grant of their vendor, so that the
/// grants can be applied one after the other.
pub fn grants(root: &Path, found: &[Found], shares: &[GpuShare]) -> Result<Vec<DeviceGrant>, GrantError> {
    if shares.is_empty() {
        return Ok(Vec::new());
    }
    let specs = Specs::read(root);
    let chosen: Vec<_> = shares.iter().map(|share| choose(found, &share.uuid)).collect::<Result<_, _>>()?;
    let mut given = BTreeSet::new();
    let mut grants = Vec::new();
    for device in &chosen {
        let mut grant = one(root, device, &specs)?;
        let vendor = device.gpu.vendor;
        if grant.cdi.is_none() {
            if vendor == GpuVendor::Nvidia {
                let plain =
                    |other: &&Found| other.gpu.vendor == vendor && cdi::name_of(other, &specs).is_none();
                let uuids: Vec<_> =
                    chosen.iter().copied().filter(plain).map(|d| d.gpu.uuid.as_str()).collect();
                let all = format!("NVIDIA_VISIBLE_DEVICES={}", uuids.join(","));
                grant.env = vec![all, "NVIDIA_DRIVER_CAPABILITIES=compute,utility,video".to_owned()];
                grant.env.retain(|env| given.insert(PathBuf::from(env)));
            }
            grant.nodes.retain(|path| given.insert(path.clone()));
            grant.files.retain(|path| given.insert(path.clone()));
        }
        grants.push(grant);
    }
    Ok(grants)
}

fn choose<'a>(found: &'a [Found], uuid: &str) -> Result<&'a Found, GrantError> {
    let uuid = || uuid.to_owned();
    let device =
        found.iter().find(|d| d.gpu.uuid == uuid()).ok_or_else(|| GrantError::Unknown { uuid: uuid() })?;
    if let Some(reason) = &device.gpu.unhealthy {
        return Err(GrantError::Unhealthy { uuid: uuid(), reason: reason.clone() });
    }
    if device.gpu.mig {
        return Err(GrantError::Split { uuid: uuid() });
    }
    Ok(device)
}

fn one(root: &Path, device: &Found, specs: &Specs) -> Result<DeviceGrant, GrantError> {
    let uuid = device.gpu.uuid.clone();
    let mut grant =
        DeviceGrant { uuid: uuid.clone(), cdi: None, nodes: Vec::new(), files: Vec::new(), env: Vec::new() };
    grant.cdi = cdi::name_of(device, specs);
    if grant.cdi.is_some() {
        return Ok(grant);
    }
    let exists = |path: &Path| root.join(path.strip_prefix("/").unwrap_or(path)).exists();
    let own = device.nodes.first().cloned();
    for path in &device.nodes {
        // A render node is enough; `card` nodes come along where they are.
        if exists(path) {
            grant.nodes.push(path.clone());
        }
    }
    if grant.nodes.is_empty() || own.as_ref().is_some_and(|path| !exists(path)) {
        return Err(GrantError::NoNode { uuid, path: own.unwrap_or_else(|| PathBuf::from("/dev/nvidiaN")) });
    }
    let shared: &[&str] = match device.gpu.vendor {
        GpuVendor::Nvidia => &NVIDIA_SHARED_NODES,
        GpuVendor::Amd => &["/dev/kfd"],
        GpuVendor::Intel => &[],
    };
    grant.nodes.extend(shared.iter().map(PathBuf::from).filter(|path| exists(path)));
    if device.gpu.vendor == GpuVendor::Nvidia {
        grant.files = nvidia_files(root);
        let is_cuda = |path: &PathBuf| path.to_string_lossy().contains("/libcuda.so");
        if !grant.files.iter().any(is_cuda) {
            return Err(GrantError::NoLibraries);
        }
    }
    Ok(grant)
}

/// The driver's libraries and tools, by the dynamic loader's cache and in the usual directories.
fn nvidia_files(root: &Path) -> Vec<PathBuf> {
    let wanted = |path: &Path| {
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        NVIDIA_LIBRARIES.iter().any(|library| {
            name.strip_prefix(library).is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
        })
    };
    let mut files = BTreeSet::new();
    for cached in ld_cache(root).into_iter().filter(|path| wanted(path)) {
        // Beside the name that the loader knows (libcuda.so.1) are the file itself and the linker's name.
        files.extend(cached.parent().map(|dir| list(root, dir, wanted)).unwrap_or_default());
    }
    if files.is_empty() {
        files.extend(LIBRARY_DIRS.iter().flat_map(|dir| list(root, Path::new(dir), wanted)));
    }
    files.extend(NVIDIA_TOOLS.iter().map(PathBuf::from).filter(|p| inside(root, p).exists()));
    files.into_iter().take(FILES_MAX).collect()
}

fn inside(root: &Path, path: &Path) -> PathBuf {
    root.join(path.strip_prefix("/").unwrap_or(path))
}

fn list(root: &Path, dir: &Path, wanted: impl Fn(&Path) -> bool) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(inside(root, dir)) else { return Vec::new() };
    let paths = entries.filter_map(|entry| Some(dir.join(entry.ok()?.file_name())));
    paths.filter(|path| wanted(path) && is_native(&inside(root, path))).collect()
}

/// An ELF file of this program's word size: the class is the fifth byte (elf(5)).
fn is_native(path: &Path) -> bool {
    let mut head = [0; 5];
    let class = if cfg!(target_pointer_width = "64") { 2 } else { 1 };
    let read = File::open(path).and_then(|mut file| file.read_exact(&mut head));
    read.is_ok() && head == [0x7f, b'E', b'L', b'F', class]
}

/// Absolute paths in `/etc/ld.so.cache`. In every version of its format they are plain strings that end with NUL.
fn ld_cache(root: &Path) -> Vec<PathBuf> {
    let mut bytes = Vec::new();
    let file = File::open(root.join("etc/ld.so.cache"));
    if file.and_then(|file| file.take(LD_CACHE_BYTES_MAX).read_to_end(&mut bytes)).is_err() {
        return Vec::new();
    }
    let strings = bytes.split(|byte| *byte == 0).filter(|string| string.starts_with(b"/"));
    strings.filter_map(|string| Some(PathBuf::from(std::str::from_utf8(string).ok()?))).collect()
}

#[cfg(test)]
mod tests {
    use berth_protocol::resources::Gpu;
    use berth_protocol::units::Bytes;

    use super::*;

    fn found(vendor: GpuVendor, uuid: &str, nodes: &[&str]) -> Found {
        let gpu = Gpu {
            uuid: uuid.to_owned(),
            vendor,
            model: "x".to_owned(),
            memory: Bytes(1),
            pci: None,
            unhealthy: None,
            mig: false,
            outside: Bytes::ZERO,
        };
        Found { gpu, usage: None, nodes: nodes.iter().map(PathBuf::from).collect() }
    }

    fn put(root: &Path, path: &str, bytes: &[u8]) {
        let path = inside(root, Path::new(path));
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, bytes).unwrap();
    }

    fn share(uuid: &str) -> GpuShare {
        GpuShare { uuid: uuid.to_owned(), milli: 1000 }
    }

    fn paths(paths: &[&str]) -> Vec<PathBuf> {
        paths.iter().map(PathBuf::from).collect()
    }

    fn elf(class: u8) -> [u8; 6] {
        [0x7f, b'E', b'L', b'F', class, 1]
    }

    #[test]
    fn nvidia_by_nodes_and_libraries() {
        let root = tempfile::tempdir().unwrap();
        let root = root.path();
        let devices = [
            found(GpuVendor::Nvidia, "GPU-a", &["/dev/nvidia0"]),
            found(GpuVendor::Nvidia, "GPU-b", &["/dev/nvidia1"]),
        ];
        let missing = grants(root, &devices, &[share("GPU-a")]).unwrap_err();
        assert!(matches!(missing, GrantError::NoNode { .. }), "{missing}");
        for node in ["/dev/nvidia0", "/dev/nvidia1", "/dev/nvidiactl", "/dev/nvidia-uvm"] {
            put(root, node, b"");
        }
        assert_eq!(grants(root, &devices, &[share("GPU-a")]), Err(GrantError::NoLibraries));

        let native = if cfg!(target_pointer_width = "64") { 2 } else { 1 };
        put(root, "/usr/lib32/libcuda.so.1", &elf(3 - native));
        for file in ["/opt/nv/libcuda.so.1", "/opt/nv/libcuda.so.550.54", "/opt/nv/libnvidia-ml.so.1"] {
            put(root, file, &elf(native));
        }
        put(root, "/opt/nv/libcudart.so.12", &elf(native));
        put(root, "/etc/ld.so.cache", b"glibc-ld.so.cache1.1\x01\0\0libc.so.6\0/lib/libc.so.6\0libcuda.so.1\0/opt/nv/libcuda.so.1\0/usr/lib32/libcuda.so.1\0");
        let both = grants(root, &devices, &[share("GPU-a"), share("GPU-b")]).unwrap();
        assert_eq!(both[0].nodes, paths(&["/dev/nvidia0", "/dev/nvidiactl", "/dev/nvidia-uvm"]));
        let libraries = ["/opt/nv/libcuda.so.1", "/opt/nv/libcuda.so.550.54", "/opt/nv/libnvidia-ml.so.1"];
        assert_eq!(both[0].files, paths(&libraries));
        assert_eq!(both[0].env[0], "NVIDIA_VISIBLE_DEVICES=GPU-a,GPU-b");
        assert_eq!(both[1].nodes, paths(&["/dev/nvidia1"]));
        assert!(both[1].files.is_empty() && both[1].env.is_empty());

        let alone = grants(root, &devices, &[share("GPU-b")]).unwrap();
        assert!(!alone[0].nodes.contains(&PathBuf::from("/dev/nvidia0")), "no other is visible");
    }

    #[test]
    fn a_cdi_name_where_there_is_one() {
        let root = tempfile::tempdir().unwrap();
        let root = root.path();
        let spec = |name: &str, node: &str| {
            format!(
                r#"{{"cdiVersion":"0.5.0","kind":"nvidia.com/gpu","devices":[{{"name":"all","containerEdits":{{"deviceNodes":[{{"path":"/dev/nvidia0"}},
                {{"path":"/dev/nvidia1"}}]}}}},{{"name":"{name}","containerEdits":{{"deviceNodes":[{{"path":"{node}"}}]}}}}]}}"#
            )
        };
        let device = [found(GpuVendor::Nvidia, "GPU-a", &["/dev/nvidia0"])];
        for (name, node, expect) in [
            ("GPU-a", "/dev/other", Some("nvidia.com/gpu=GPU-a")),
            ("0", "/dev/nvidia0", Some("nvidia.com/gpu=0")),
            // A number that is another device now.
            ("0", "/dev/nvidia1", None),
        ] {
            put(root, "/etc/cdi/nvidia.json", spec(name, node).as_bytes());
            match expect {
                Some(expect) => {
                    let grants = grants(root, &device, &[share("GPU-a")]).unwrap();
                    assert_eq!(grants[0].cdi.as_deref(), Some(expect));
                    assert!(grants[0].nodes.is_empty() && grants[0].files.is_empty());
                }
                None => assert!(grants(root, &device, &[share("GPU-a")]).is_err()),
            }
        }
    }

    #[test]
    fn amd_and_intel_by_nodes() {
        let root = tempfile::tempdir().unwrap();
        let root = root.path();
        for node in ["/dev/kfd", "/dev/dri/renderD128", "/dev/dri/card0", "/dev/dri/renderD129"] {
            put(root, node, b"");
        }
        let devices = [
            found(GpuVendor::Amd, "GPU-1", &["/dev/dri/renderD128", "/dev/dri/card0"]),
            found(GpuVendor::Intel, "0000:04:00.0", &["/dev/dri/renderD129", "/dev/dri/card1"]),
        ];
        let got = grants(root, &devices, &[share("GPU-1"), share("0000:04:00.0")]).unwrap();
        assert_eq!(got[0].nodes, paths(&["/dev/dri/renderD128", "/dev/dri/card0", "/dev/kfd"]));
        assert_eq!(got[1].nodes, paths(&["/dev/dri/renderD129"]));
    }

    #[test]
    fn what_cannot_be_handed_out() {
        let mut sick = found(GpuVendor::Nvidia, "GPU-a", &["/dev/nvidia0"]);
        sick.gpu.unhealthy = Some("Xid 79".to_owned());
        let mut split = found(GpuVendor::Nvidia, "GPU-b", &["/dev/nvidia1"]);
        split.gpu.mig = true;
        let all = [sick, split];
        let refuse = |uuid: &str| grants(Path::new("/nonexistent"), &all, &[share(uuid)]).unwrap_err();
        assert!(matches!(refuse("GPU-a"), GrantError::Unhealthy { .. }));
        assert!(matches!(refuse("GPU-b"), GrantError::Split { .. }));
        assert!(matches!(refuse("GPU-c"), GrantError::Unknown { .. }));
    }
}
