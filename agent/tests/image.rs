//! Images for real: Debian's docker-registry, umoci's and skopeo's images, overlayfs mounts. Root is needed.

mod image_signed;
mod image_support;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;
use std::process::Command;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use berth_agent::io::image::{
    Digest, ImageError, ImageRecord, ImageRef, ImageStore, Progress, RegistryConfig, StoreConfig,
};
use berth_protocol::image::Images;
use image_support::*;
use serde_json::json;

fn now_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_millis() as u64
}

async fn fails(store: &ImageStore, reference: &ImageRef, reason: &str) -> ImageError {
    let error = store.ensure(reference, |_| {}).await.expect_err(reason);
    assert_eq!(error.reason(), reason, "{error}");
    error
}

fn top_layer(store: &ImageStore, record: &ImageRecord) -> std::path::PathBuf {
    store.layer_dir(record.layers.last().unwrap())
}

/// An overlayfs mount of an image, gone with this value.
struct Mount(tempfile::TempDir);

impl Mount {
    fn new(store: &ImageStore, record: &ImageRecord) -> Mount {
        let base = tempfile::tempdir().unwrap();
        for name in ["upper", "work", "merged"] {
            fs::create_dir(base.path().join(name)).unwrap();
        }
        let lower: Vec<String> =
            record.layers.iter().rev().map(|layer| store.layer_dir(layer).display().to_string()).collect();
        let at = |name: &str| base.path().join(name).display().to_string();
        let options = format!("lowerdir={},upperdir={},workdir={}", lower.join(":"), at("upper"), at("work"));
        run("mount", &["-t", "overlay", "overlay", "-o", &options, &at("merged")]);
        Mount(base)
    }

    fn root(&self) -> std::path::PathBuf {
        self.0.path().join("merged")
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(self.root()).status();
    }
}

/// A file system of its own, which can be filled.
struct Tmpfs(tempfile::TempDir);

impl Tmpfs {
    fn new(size: &str) -> Tmpfs {
        let directory = tempfile::tempdir().unwrap();
        run(
            "mount",
            &["-t", "tmpfs", "-o", &format!("size={size}"), "tmpfs", directory.path().to_str().unwrap()],
        );
        Tmpfs(directory)
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(self.0.path()).status();
    }
}

#[tokio::test]
async fn a_real_image_from_a_real_registry_runs() {
    let (images, home) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let layout = busybox_layout(images.path());
    let registry = Registry::start(false);
    registry.push(&layout, "v1", "team/busybox:1");
    registry.push(&layout, "v1", "team/busybox:latest");
    let store = store(home.path());
    let mut seen = Progress::default();
    let record = store.ensure(&registry.image("team/busybox:1"), |progress| seen = progress).await.unwrap();
    assert_eq!(record.config.cmd, ["/bin/sh"]);
    assert_eq!(record.config.env.last().map(String::as_str), Some("A=1"));
    assert!(record.unpacked_bytes > 1 << 20);
    assert_tidy(home.path(), record.layers.iter().collect::<BTreeSet<_>>().len());
    let mount = Mount::new(&store, &record);
    let shell = Command::new("chroot")
        .arg(mount.root())
        .args(["/bin/sh", "-c", "echo out; read line </added; echo $line; ls /"])
        .output();
    let shell = String::from_utf8(shell.unwrap().stdout).unwrap();
    assert_eq!(shell.lines().collect::<Vec<_>>(), ["out", "new", "added", "bin"]);
    let (shell, busybox) = (mount.root().join("bin/sh"), mount.root().join("bin/busybox"));
    assert_eq!(fs::metadata(shell).unwrap().ino(), fs::metadata(busybox).unwrap().ino());
    drop(mount);

    let latest = store.ensure(&registry.image("team/busybox"), |_| {}).await.unwrap();
    assert_eq!(latest.layers, record.layers);
    fails(&store, &registry.image("team/busybox:2"), "ImageNotFound").await;
    fails(&store, &registry.image("team/nobody:2"), "ImageNotFound").await;
    let (known, unknown) = (registry.image("team/busybox:1"), registry.image("team/busybox:3"));
    let floating = registry.image("team/busybox:latest");
    drop(registry);
    // A tag that is here is not asked for; latest is, and does without an answer.
    assert_eq!(store.ensure(&known, |_| {}).await.unwrap().layers, record.layers);
    assert_eq!(store.ensure(&floating, |_| {}).await.unwrap().layers, record.layers);
    let error = fails(&store, &unknown, "ImageUnreachable").await;
    assert!(error.retriable());
    assert_tidy(home.path(), record.layers.iter().collect::<BTreeSet<_>>().len());

    let archive = images.path().join("saved.tar");
    let (from, to) =
        (format!("oci:{}:v1", layout.display()), format!("docker-archive:{}", archive.display()));
    run("skopeo", &["--insecure-policy", "copy", &from, &format!("{to}:busybox:1")]);
    let saved = store.ensure(&reference(&to), |_| {}).await.unwrap();
    assert_eq!((saved.layers, saved.config), (record.layers.clone(), record.config.clone()));
    let direct = store.ensure(&reference(&from), |_| {}).await.unwrap();
    assert_eq!((direct.layers, direct.manifest_digest), (record.layers, record.manifest_digest));
}

#[tokio::test]
async fn an_archive_is_read_in_place() {
    let (images, home) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let layout = busybox_layout(images.path());
    let archive = images.path().join("saved.tar");
    let to = format!("docker-archive:{}", archive.display());
    run(
        "skopeo",
        &["--insecure-policy", "copy", &format!("oci:{}:v1", layout.display()), &format!("{to}:busybox:1")],
    );
    let store = store(home.path());
    let record = store.ensure(&reference(&to), |_| {}).await.unwrap();
    assert!(top_layer(&store, &record).join("added").exists());
    assert!(store.lookup(&reference(&to)).unwrap().is_some());
    assert_eq!(*store.held().borrow(), Images::cut([reference(&to).name()]));
    // Another archive of the same name is another image.
    fs::write(&archive, tar(&[("manifest.json", b"[]")])).unwrap();
    assert!(store.lookup(&reference(&to)).unwrap().is_none());
    assert!(store.held().borrow().is_empty());
    fails(&store, &reference(&to), "ImageMalformed").await;
    fs::write(&archive, "no archive at all").unwrap();
    fails(&store, &reference(&to), "ImageMalformed").await;
    fails(&store, &reference("docker-archive:/nonexistent.tar"), "ImageNotFound").await;
    fails(&store, &reference("docker-archive:/dev/zero"), "ImagePullFailed").await;
}

#[tokio::test]
async fn basic_authentication() {
    let (home, elsewhere) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let registry = Registry::start(true);
    let layout = Layout::simple(&[("hello", b"world")]);
    registry.push(layout.path(), "v1", "team/app:v1");
    let image = registry.image("team/app:v1");
    let auth_file = home.path().join("auth.json");
    let write = |password: &str| {
        let auths = json!({"auths": {&registry.address: {"username": "berth", "password": password}}});
        fs::write(&auth_file, auths.to_string()).unwrap();
    };
    let with =
        |auth_file| store_with(elsewhere.path(), RegistryConfig { auth_file, ..RegistryConfig::default() });
    fails(&with(None), &image, "ImageUnauthorized").await;
    write("wrong");
    let error = fails(&with(Some(auth_file.clone())), &image, "ImageUnauthorized").await;
    assert!(!error.to_string().contains("wrong"), "{error}");
    write("secret");
    with(Some(auth_file.clone())).ensure(&image, |_| {}).await.unwrap();
}

#[tokio::test]
async fn token_authentication_and_mirrors() {
    let home = tempfile::tempdir().unwrap();
    let layout = Layout::simple(&[("hello", b"world")]);
    let tiny = TinyRegistry::start(&layout, "v1", true, false);
    let auth_file = home.path().join("auth.json");
    // berth:secret
    let auths = json!({"auths": {format!("http://{}/v2/", tiny.address): {"auth": "YmVydGg6c2VjcmV0"}}});
    fs::write(&auth_file, auths.to_string()).unwrap();
    let nowhere = "http://127.0.0.1:1";
    let registry = RegistryConfig {
        auth_file: Some(auth_file),
        mirrors: BTreeMap::from([(
            "registry.invalid".into(),
            vec![nowhere.into(), format!("http://{}/team", tiny.address)],
        )]),
        insecure: Vec::new(),
    };
    fails(&store(&home.path().join("a")), &tiny.image("v1"), "ImageUnauthorized").await;
    let store = store_with(&home.path().join("b"), registry);
    store.ensure(&tiny.image("v1"), |_| {}).await.unwrap();
    let mirrored = store.ensure(&reference("registry.invalid/app:v1"), |_| {}).await.unwrap();
    assert_eq!(fs::read(top_layer(&store, &mirrored).join("hello")).unwrap(), b"world");
    let error = fails(&store, &reference("registry.invalid/app:v2"), "ImageUnreachable").await;
    assert!(error.to_string().contains("registry.invalid"), "{error}");
}

#[tokio::test]
async fn https_with_an_authority_of_ones_own() {
    let home = tempfile::tempdir().unwrap();
    let certificates = certificates();
    let registry = Registry::start_with_tls(certificates.path());
    let layout = Layout::simple(&[("hello", b"world")]);
    registry.push(layout.path(), "v1", "team/app:v1");
    let image = registry.image("team/app:v1");
    fails(&store(&home.path().join("a")), &image, "ImageUnreachable").await;
    // The worker takes the system's authorities, as this variable names them.
    let worker = home.path().join("worker");
    let (ca, program) = (certificates.path().join("ca.pem"), env!("CARGO_BIN_EXE_berth-agent"));
    fs::write(&worker, format!("#!/bin/sh\nSSL_CERT_FILE={} exec {program} \"$@\"\n", ca.display())).unwrap();
    fs::set_permissions(&worker, fs::Permissions::from_mode(0o755)).unwrap();
    let config = StoreConfig { worker, ..StoreConfig::default() };
    let store = ImageStore::open(&home.path().join("b"), config).unwrap();
    store.ensure(&image, |_| {}).await.unwrap();
}

#[tokio::test]
async fn a_cut_connection_is_resumed_where_it_was_cut() {
    let home = tempfile::tempdir().unwrap();
    let data = noise(6 << 20, 1);
    let layout = Layout::simple(&[("data", &data)]);
    let registry = Registry::start(false);
    registry.push(layout.path(), "v1", "team/app:v1");
    let proxy = CuttingProxy::start(&registry.address, 1 << 20, u32::MAX);
    let store = store(home.path());
    let mut last = Progress::default();
    let image = reference(format!("{}/team/app:v1", proxy.address));
    let record = store.ensure(&image, |progress| last = progress).await.unwrap();
    assert!(fs::read(top_layer(&store, &record).join("data")).unwrap() == data);
    let (connections, bytes) =
        (proxy.connections.load(Ordering::Relaxed), proxy.bytes.load(Ordering::Relaxed));
    assert!(connections >= 6, "{connections} connections");
    assert!(bytes < 7 << 20, "{bytes} bytes for {}: begun anew instead of resumed", data.len());
    assert_eq!(last.layers_total, 1);
    assert!(last.bytes_done > 1 << 20 && last.bytes_done <= last.bytes_total, "{last:?}");
    assert_tidy(home.path(), 1);
}

#[tokio::test]
async fn a_registry_without_ranges_is_begun_anew() {
    let home = tempfile::tempdir().unwrap();
    let data = noise(300 << 10, 2);
    let layout = Layout::simple(&[("data", &data)]);
    let tiny = TinyRegistry::start(&layout, "v1", false, true);
    let proxy = CuttingProxy::start(&tiny.address, 100 << 10, 1);
    let store = store(home.path());
    let image = reference(format!("{}/team/app:v1", proxy.address));
    let record = store.ensure(&image, |_| {}).await.unwrap();
    assert!(fs::read(top_layer(&store, &record).join("data")).unwrap() == data);
    assert!(proxy.bytes.load(Ordering::Relaxed) > 400 << 10);
}

#[tokio::test]
async fn one_pull_however_many_wait() {
    let home = tempfile::tempdir().unwrap();
    let plain = tar(&[("data", &noise(100 << 10, 3))]);
    let mut layout = Layout::new();
    let image = layout.image(ARCHITECTURE, &[(gzip(&plain), plain.clone())]);
    layout.tag("v1", image);
    let layer = Digest::of(&gzip(&plain)).to_string();
    let tiny = TinyRegistry::start(&layout, "v1", false, false);
    // Two daemons over one directory: their workers meet only at the layer's lock.
    let (one, other) = (store(home.path()), store(home.path()));
    let image = tiny.image("v1");
    tiny.close_gate();
    let pulls = async {
        tokio::join!(one.ensure(&image, |_| {}), one.ensure(&image, |_| {}), other.ensure(&image, |_| {}))
    };
    let gate = async {
        let manifests = |tiny: &TinyRegistry| tiny.served("/manifests/");
        let deadline = Instant::now() + Duration::from_secs(30);
        while manifests(&tiny) < 2 {
            assert!(Instant::now() < deadline, "the second worker never came");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        tiny.open_gate();
    };
    let ((first, second, third), ()) = tokio::join!(pulls, gate);
    assert_eq!(first.unwrap(), second.unwrap());
    third.unwrap();
    assert_eq!((tiny.served("/manifests/"), tiny.served(&layer)), (2, 1));
    assert_tidy(home.path(), 1);
}

#[tokio::test]
async fn a_pull_that_nobody_wants_ends_and_leaves_nothing() {
    let home = tempfile::tempdir().unwrap();
    let layout = Layout::simple(&[("data", &noise(100 << 10, 4))]);
    let tiny = TinyRegistry::start(&layout, "v1", false, false);
    let store = store(home.path());
    tiny.close_gate();
    let image = tiny.image("v1");
    {
        let mut pull = std::pin::pin!(store.ensure(&image, |_| {}));
        let deadline = Instant::now() + Duration::from_secs(30);
        while tiny.state.blobs_begun.load(Ordering::Relaxed) == 0 {
            assert!(Instant::now() < deadline);
            let nap = tokio::time::sleep(Duration::from_millis(20));
            tokio::select! { _ = &mut pull => panic!("it cannot end"), () = nap => {} }
        }
        assert_eq!(count(&home.path().join("tmp")), 1);
    }
    let deadline = Instant::now() + Duration::from_secs(30);
    while count(&home.path().join("tmp")) > 0 {
        assert!(Instant::now() < deadline, "the worker stays");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert_tidy(home.path(), 0);
    tiny.open_gate();
    store.ensure(&image, |_| {}).await.unwrap();
}

#[tokio::test]
async fn the_platform_is_chosen_from_an_index() {
    let home = tempfile::tempdir().unwrap();
    let mut layout = Layout::new();
    let image = |architecture: &str| {
        let plain = tar(&[("arch", architecture.as_bytes())]);
        let mut descriptor = layout.image(architecture, &[(zstd::encode_all(&plain[..], 1).unwrap(), plain)]);
        descriptor["platform"] = json!({"os": "linux", "architecture": architecture});
        descriptor
    };
    let kind = "application/vnd.oci.image.index.v1+json";
    let both =
        json!({"schemaVersion": 2, "mediaType": kind, "manifests": [image("s390x"), image(ARCHITECTURE)]});
    let foreign =
        json!({"schemaVersion": 2, "mediaType": kind, "manifests": [image("s390x"), image("mips")]});
    let (both, foreign) =
        (layout.blob(kind, both.to_string().as_bytes()), layout.blob(kind, foreign.to_string().as_bytes()));
    let alone = image("s390x");
    layout.tag("both", both);
    layout.tag("foreign", foreign);
    layout.tag("alone", alone);
    let registry = Registry::start(false);
    registry.push(layout.path(), "both", "team/app:both");
    let store = store(home.path());
    for image in [layout.reference("both"), registry.image("team/app:both")] {
        let record = store.ensure(&image, |_| {}).await.unwrap();
        assert_eq!(fs::read(top_layer(&store, &record).join("arch")).unwrap(), ARCHITECTURE.as_bytes());
    }
    let error = fails(&store, &layout.reference("foreign"), "ImagePlatformMissing").await;
    assert!(error.to_string().contains("linux/mips, linux/s390x"), "{error}");
    fails(&store, &layout.reference("alone"), "ImagePlatformMissing").await;
    let error = fails(&store, &reference(format!("oci:{}", layout.path().display())), "ImageNotFound").await;
    assert!(error.to_string().contains("alone, both, foreign"), "{error}");
    fails(&store, &layout.reference("missing"), "ImageNotFound").await;
}

#[tokio::test]
async fn what_was_tampered_with_is_refused() {
    let home = tempfile::tempdir().unwrap();
    let mut layout = Layout::new();
    let good = tar(&[("good", b"good")]);
    let bad = tar(&[("bad", b"bad")]);
    let damaged = tar(&[("damaged", &noise(10_000, 5))]);
    let image = layout.image(ARCHITECTURE, &[(gzip(&good), good.clone()), (gzip(&damaged), damaged.clone())]);
    layout.tag("damaged", image);
    // The blob is what the manifest says, its content is not what the configuration says.
    let other = tar(&[("other", b"other")]);
    let image = layout.image(ARCHITECTURE, &[(gzip(&bad), other)]);
    layout.tag("swapped", image);
    let image = layout.image(ARCHITECTURE, &[(b"BZh91AY".to_vec(), bad.clone())]);
    layout.tag("bzip2", image);
    let image = layout.image(ARCHITECTURE, &[(gzip(&bad)[..60].to_vec(), bad.clone())]);
    layout.tag("cut", image);
    let mut escape = tar::Header::new_gnu();
    escape.as_mut_bytes()[..4].copy_from_slice(b"../x");
    escape.set_size(0);
    escape.set_mode(0o644);
    escape.set_uid(0);
    escape.set_gid(0);
    escape.set_mtime(0);
    escape.set_entry_type(tar::EntryType::Regular);
    escape.set_cksum();
    let escape = escape.as_bytes().to_vec();
    let image = layout.image(ARCHITECTURE, &[(escape.clone(), escape)]);
    layout.tag("escape", image);
    let path = layout.blob_path(&Digest::of(&gzip(&damaged)).to_string());
    let mut blob = fs::read(&path).unwrap();
    blob[5000] ^= 1;
    fs::write(&path, blob).unwrap();
    let store = store(home.path());
    for (tag, reason) in [
        ("damaged", "ImageDigestMismatch"),
        ("swapped", "ImageDigestMismatch"),
        ("bzip2", "ImageMalformed"),
        ("cut", "ImageMalformed"),
        ("escape", "ImageMalformed"),
    ] {
        let error = fails(&store, &layout.reference(tag), reason).await;
        assert!(!error.retriable());
        assert!(store.lookup(&layout.reference(tag)).unwrap().is_none());
        assert_eq!(count(&home.path().join("tmp")), 0);
    }
    // The good layer of the damaged image may have been kept; nothing else was.
    assert!(count(&home.path().join("layers")) <= 1);
    assert_eq!(count(&home.path().join("records")), 0);
}

#[tokio::test]
async fn a_layout_that_moved_on_is_read_again() {
    let home = tempfile::tempdir().unwrap();
    let mut layout = Layout::simple(&[("file", b"1")]);
    let store = store(home.path());
    let image = layout.reference("v1");
    let first = store.ensure(&image, |_| {}).await.unwrap();
    assert!(store.lookup(&image).unwrap().is_some());
    let plain = tar(&[("file", b"2")]);
    // Uncompressed, twice the same layer: it is stored once.
    let next = layout.image(ARCHITECTURE, &[(plain.clone(), plain.clone()), (plain.clone(), plain)]);
    layout.tag("v1", next);
    assert!(store.lookup(&image).unwrap().is_none());
    let second = store.ensure(&image, |_| {}).await.unwrap();
    assert_eq!(second.layers.len(), 2);
    assert_eq!(fs::read(top_layer(&store, &second).join("file")).unwrap(), b"2");
    assert_ne!(first.manifest_digest, second.manifest_digest);
    assert_tidy(home.path(), 2);
    // What is here stays usable when its source is gone.
    drop(layout);
    assert_eq!(store.ensure(&image, |_| {}).await.unwrap().layers, second.layers);
}

#[tokio::test]
async fn a_full_disk_is_said_and_left_as_it_was() {
    let disk = Tmpfs::new("8m");
    let store_path = disk.0.path().join("images");
    let store = store(&store_path);
    let layout = Layout::simple(&[("small", b"1"), ("large", &vec![0; 20 << 20])]);
    let error = fails(&store, &layout.reference("v1"), "DiskFull").await;
    assert!(error.retriable() && error.to_string().contains("free space"), "{error}");
    assert_tidy(&store_path, 0);
    let used = |path: &Path| {
        nix::sys::statvfs::statvfs(path).map(|stat| stat.blocks() - stat.blocks_free()).unwrap()
    };
    assert!(used(&store_path) < 64, "{} blocks are still taken", used(&store_path));
    let layout = Layout::simple(&[("fits", &vec![0; 1 << 20])]);
    store.ensure(&layout.reference("v1"), |_| {}).await.unwrap();
}

#[tokio::test]
async fn the_longest_unused_is_collected_first() {
    let disk = Tmpfs::new("16m");
    let store_path = disk.0.path().join("images");
    let store = store(&store_path);
    let shared = tar(&[("base", &noise(1 << 20, 9))]);
    let mut layout = Layout::new();
    let mut records = Vec::new();
    for number in 0..3_u64 {
        let own = tar(&[("own", &noise(3 << 20, 10 + number))]);
        let image = layout.image(ARCHITECTURE, &[(gzip(&shared), shared.clone()), (gzip(&own), own)]);
        layout.tag(&format!("v{number}"), image);
    }
    let mut held = store.held();
    let named = |numbers: &[u64]| {
        Images::cut(numbers.iter().map(|number| layout.reference(&format!("v{number}")).name()))
    };
    for number in 0..3 {
        records.push(store.ensure(&layout.reference(&format!("v{number}")), |_| {}).await.unwrap());
        assert!(held.has_changed().unwrap());
        assert_eq!(held.borrow_and_update().iter().count(), records.len());
    }
    // What is used again is no news, and whoever opens the store finds the same.
    store.ensure(&layout.reference("v2"), |_| {}).await.unwrap();
    assert!(!held.has_changed().unwrap());
    assert_eq!(*held.borrow(), named(&[2, 1, 0]));
    assert_eq!(*store_with(&store_path, RegistryConfig::default()).held().borrow(), named(&[2, 1, 0]));
    // A dead worker's leftovers.
    fs::create_dir_all(store_path.join("tmp/1-1/layer/tree")).unwrap();
    assert_tidy_except_leftover(&store_path, 4);
    let none = BTreeSet::new();
    let soon = store.collect(&none, 10, now_ms()).await.unwrap();
    assert_eq!((soon.images, soon.layers, soon.leftovers), (0, 0, 1), "used a moment ago");
    assert!(!held.has_changed().unwrap());
    let later = now_ms() + 3_600_000;
    // 10 of 16 MiB are taken; the first image is in use, the second goes.
    let in_use: BTreeSet<_> = records[0].layers.iter().copied().collect();
    let collected = store.collect(&in_use, 50, later).await.unwrap();
    assert_eq!((collected.images, collected.layers, collected.bytes), (1, 1, 3 << 20));
    assert_eq!(*held.borrow_and_update(), named(&[2, 0]));
    let here = |number: usize| store.lookup(&layout.reference(&format!("v{number}"))).unwrap().is_some();
    assert_eq!([here(0), here(1), here(2)], [true, false, true]);
    let collected = store.collect(&none, 0, later).await.unwrap();
    assert_eq!((collected.images, collected.layers), (2, 3));
    assert!(held.borrow_and_update().is_empty());
    assert_tidy(&store_path, 0);
    assert_eq!((count(&store_path.join("locks")), count(&store_path.join("records"))), (0, 0));
}

fn assert_tidy_except_leftover(store: &Path, layers: usize) {
    assert_eq!((count(&store.join("tmp")), count(&store.join("layers"))), (1, layers));
}

/// Files of a layer that is all entries and no content.
const ENTRIES: u64 = 50_000;
const ENTRIES_A_SECOND_MIN: u64 = 10_000;
const WORKER_BYTES_MAX: u64 = 64 << 20;

#[tokio::test]
async fn many_entries_take_neither_time_nor_memory() {
    let home = tempfile::tempdir().unwrap();
    let mut builder =
        tar::Builder::new(flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast()));
    let mut header = tar::Header::new_gnu();
    header.set_size(0);
    header.set_mode(0o644);
    for number in 0..ENTRIES {
        let path = format!("directory-{}/{}-{number}", number / 1000, "long".repeat(20));
        builder.append_data(&mut header, path, &b""[..]).unwrap();
    }
    let packed = builder.into_inner().unwrap().finish().unwrap();
    let mut layout = Layout::new();
    let mut plain = Vec::new();
    std::io::Read::read_to_end(&mut flate2::read::GzDecoder::new(&packed[..]), &mut plain).unwrap();
    let image = layout.image(ARCHITECTURE, &[(packed, plain)]);
    layout.tag("v1", image);
    let store = store(home.path());
    let record = store.ensure(&layout.reference("v1"), |_| {}).await.unwrap();
    assert_eq!(count(&top_layer(&store, &record)) as u64, ENTRIES / 1000);
    // What its worker took: a busy machine makes it wait, and not work more.
    let usage = nix::sys::resource::getrusage(nix::sys::resource::UsageWho::RUSAGE_CHILDREN).unwrap();
    let time = usage.user_time() + usage.system_time();
    let ms = time.tv_sec() as u64 * 1000 + time.tv_usec() as u64 / 1000;
    let (rate, kib) = (ENTRIES * 1000 / ms.max(1), usage.max_rss() as u64);
    println!("{rate} entries a second, {kib} KiB at most");
    assert!(rate >= ENTRIES_A_SECOND_MIN, "{rate} entries a second");
    assert!(kib << 10 <= WORKER_BYTES_MAX, "{kib} KiB");
}

#[tokio::test]
async fn an_image_that_is_too_large_is_refused() {
    let home = tempfile::tempdir().unwrap();
    let layout = Layout::simple(&[("zeros", &vec![0; 4 << 20])]);
    let config = StoreConfig {
        image_bytes_max: 1 << 20,
        worker: env!("CARGO_BIN_EXE_berth-agent").into(),
        ..StoreConfig::default()
    };
    let store = ImageStore::open(home.path(), config).unwrap();
    fails(&store, &layout.reference("v1"), "ImageTooLarge").await;
    assert_tidy(home.path(), 0);
}

#[tokio::test]
async fn a_worker_that_dies_is_an_error_not_a_wait() {
    let home = tempfile::tempdir().unwrap();
    let config = StoreConfig { worker: "/bin/false".into(), ..Default::default() };
    let store = ImageStore::open(home.path(), config).unwrap();
    let error = fails(&store, &reference("127.0.0.1:1/a:b"), "ImagePullFailed").await;
    assert!(error.retriable());
}
