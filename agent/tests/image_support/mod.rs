//! Registries, images and cut connections for the tests of images; everything listens on loopback only.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use berth_agent::io::image::{Digest, ImageRef, ImageStore, RegistryConfig, StoreConfig};
use serde_json::{Value, json};
use tar::{EntryType, Header};

pub const ARCHITECTURE: &str = if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" };

pub fn reference(text: impl AsRef<str>) -> ImageRef {
    ImageRef::parse(text.as_ref()).unwrap()
}

pub fn store(directory: &Path) -> ImageStore {
    store_with(directory, RegistryConfig::default())
}

pub fn store_with(directory: &Path, registry: RegistryConfig) -> ImageStore {
    let worker = env!("CARGO_BIN_EXE_berth-agent").into();
    ImageStore::open(directory, StoreConfig { registry, worker, ..StoreConfig::default() }).unwrap()
}

/// Waits until `true`, for a generous time.
pub fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(30);
    while !condition() {
        assert!(Instant::now() < deadline, "never {what}");
        thread::sleep(Duration::from_millis(20));
    }
}

pub fn count(directory: &Path) -> usize {
    fs::read_dir(directory).unwrap().count()
}

/// Nothing half-made is in the store, and `layers` whole ones are.
pub fn assert_tidy(store: &Path, layers: usize) {
    assert_eq!(count(&store.join("tmp")), 0, "leftovers in tmp");
    assert_eq!(count(&store.join("layers")), layers, "layers");
}

pub fn run(program: &str, args: &[&str]) {
    let output = Command::new(program).args(args).stdin(Stdio::null()).output();
    let output = output.unwrap_or_else(|error| panic!("{program} is needed for this test: {error}"));
    assert!(output.status.success(), "{program} {args:?}: {}", String::from_utf8_lossy(&output.stderr));
}

/// Bytes that do not compress, the same ones for the same seed.
pub fn noise(bytes: usize, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    std::iter::repeat_with(next).flat_map(u64::to_le_bytes).take(bytes).collect()
}

/// A tar stream of plain files.
pub fn tar(files: &[(&str, &[u8])]) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    for (name, data) in files {
        let mut header = Header::new_gnu();
        header.set_entry_type(EntryType::Regular);
        header.set_size(data.len() as u64);
        header.set_mode(0o644);
        header.set_mtime(1);
        builder.append_data(&mut header, name, *data).unwrap();
    }
    builder.into_inner().unwrap()
}

pub fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

/// An OCI layout made by hand, so that it may be wrong.
pub struct Layout {
    pub directory: tempfile::TempDir,
    manifests: Vec<Value>,
}

impl Layout {
    pub fn new() -> Layout {
        let directory = tempfile::tempdir().unwrap();
        fs::create_dir_all(directory.path().join("blobs/sha256")).unwrap();
        fs::write(directory.path().join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).unwrap();
        Layout { directory, manifests: Vec::new() }
    }

    pub fn path(&self) -> &Path {
        self.directory.path()
    }

    pub fn blob_path(&self, digest: &str) -> PathBuf {
        self.path().join("blobs/sha256").join(digest.trim_start_matches("sha256:"))
    }

    pub fn blob(&self, media_type: &str, bytes: &[u8]) -> Value {
        let digest = Digest::of(bytes).to_string();
        fs::write(self.blob_path(&digest), bytes).unwrap();
        json!({"mediaType": media_type, "digest": digest, "size": bytes.len()})
    }

    /// The descriptor of an image of `layers`, each as (compressed, uncompressed).
    pub fn image(&self, architecture: &str, layers: &[(Vec<u8>, Vec<u8>)]) -> Value {
        let diff_ids: Vec<String> = layers.iter().map(|(_, plain)| Digest::of(plain).to_string()).collect();
        let config = json!({"architecture": architecture, "os": "linux", "rootfs": {"type": "layers", "diff_ids": diff_ids},
            "config": {"Entrypoint": ["/bin/run"], "Cmd": ["now"], "Env": ["A=1"], "WorkingDir": "/srv", "User": "7:8"}});
        let config = self.blob("application/vnd.oci.image.config.v1+json", config.to_string().as_bytes());
        let layers: Vec<Value> = layers
            .iter()
            .map(|(blob, _)| self.blob("application/vnd.oci.image.layer.v1.tar+gzip", blob))
            .collect();
        let manifest = json!({"schemaVersion": 2, "config": config, "layers": layers});
        self.blob("application/vnd.oci.image.manifest.v1+json", manifest.to_string().as_bytes())
    }

    /// Gives a name to a manifest or index.
    pub fn tag(&mut self, tag: &str, mut descriptor: Value) {
        self.manifests.retain(|known| known["annotations"]["org.opencontainers.image.ref.name"] != tag);
        descriptor["annotations"] = json!({"org.opencontainers.image.ref.name": tag});
        self.manifests.push(descriptor);
        let index = json!({"schemaVersion": 2, "manifests": self.manifests});
        fs::write(self.path().join("index.json"), index.to_string()).unwrap();
    }

    pub fn simple(files: &[(&str, &[u8])]) -> Layout {
        let mut layout = Layout::new();
        let plain = tar(files);
        let image = layout.image(ARCHITECTURE, &[(gzip(&plain), plain)]);
        layout.tag("v1", image);
        layout
    }

    pub fn reference(&self, tag: &str) -> ImageRef {
        reference(format!("oci:{}:{tag}", self.path().display()))
    }
}

/// An image of busybox as umoci makes it, in two layers, the upper one with whiteouts.
pub fn busybox_layout(directory: &Path) -> PathBuf {
    let layout = directory.join("busybox");
    let image = format!("{}:v1", layout.display());
    let bundle = directory.join("bundle");
    let rootfs = bundle.join("rootfs");
    let bundle = bundle.to_str().unwrap();
    run("umoci", &["init", "--layout", layout.to_str().unwrap()]);
    run("umoci", &["new", "--image", &image]);
    run("umoci", &["unpack", "--image", &image, bundle]);
    fs::create_dir_all(rootfs.join("bin")).unwrap();
    fs::create_dir_all(rootfs.join("old/dir")).unwrap();
    fs::write(rootfs.join("old/dir/file"), "old").unwrap();
    fs::write(rootfs.join("removed"), "old").unwrap();
    fs::copy("/bin/busybox", rootfs.join("bin/busybox")).unwrap();
    fs::hard_link(rootfs.join("bin/busybox"), rootfs.join("bin/sh")).unwrap();
    run("umoci", &["repack", "--image", &image, bundle]);
    fs::remove_dir_all(bundle).unwrap();
    run("umoci", &["unpack", "--image", &image, bundle]);
    fs::remove_file(rootfs.join("removed")).unwrap();
    fs::remove_dir_all(rootfs.join("old")).unwrap();
    fs::write(rootfs.join("added"), "new\n").unwrap();
    run("umoci", &["repack", "--image", &image, bundle]);
    run("umoci", &["config", "--image", &image, "--config.cmd", "/bin/sh", "--config.env", "A=1"]);
    layout
}

/// Debian's docker-registry on a free port.
pub struct Registry {
    child: Child,
    pub address: String,
    _directory: tempfile::TempDir,
}

impl Registry {
    pub fn start(auth: bool) -> Registry {
        Registry::launch(auth, None)
    }

    /// With the directory of [`certificates`].
    pub fn start_with_tls(certificates: &Path) -> Registry {
        Registry::launch(false, Some(certificates))
    }

    fn launch(auth: bool, tls: Option<&Path>) -> Registry {
        let directory = tempfile::tempdir().unwrap();
        let at = |name: &str| directory.path().join(name);
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let address = format!("127.0.0.1:{port}");
        let tls = tls.map_or(String::new(), |at| {
            format!(", tls: {{certificate: {0}/leaf.pem, key: {0}/leaf.key}}", at.display())
        });
        let mut config = format!(
            "version: 0.1\nlog: {{level: error}}\nstorage: {{filesystem: {{rootdirectory: {}}}}}\nhttp: {{addr: {address}{tls}}}\n",
            at("data").display()
        );
        if auth {
            // berth:secret
            fs::write(at("htpasswd"), "berth:$2b$04$jnvERGsUJGEXMUObqFwQhOmGSzyCeOSL1Sw2VqJFTB3yJAAjyVSk6\n")
                .unwrap();
            config += &format!("auth: {{htpasswd: {{realm: r, path: {}}}}}\n", at("htpasswd").display());
        }
        fs::write(at("config.yml"), config).unwrap();
        let log = fs::File::create(at("log")).unwrap();
        let mut command = Command::new("docker-registry");
        command.arg("serve").arg(at("config.yml")).stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        let child = command.spawn().expect("docker-registry is needed for this test");
        eventually("listening", || TcpStream::connect(&address).is_ok());
        Registry { child, address, _directory: directory }
    }

    /// Copies an image of a layout to `name:tag`.
    pub fn push(&self, layout: &Path, tag: &str, name: &str) {
        let from = format!("oci:{}:{tag}", layout.display());
        let to = format!("docker://{}/{name}", self.address);
        let plain = "--dest-tls-verify=false";
        run(
            "skopeo",
            &["--insecure-policy", "copy", "--all", "--dest-creds", "berth:secret", plain, &from, &to],
        );
    }

    pub fn image(&self, name: &str) -> ImageRef {
        reference(format!("{}/{name}", self.address))
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// An authority (`ca.pem`) and a certificate for 127.0.0.1 (`leaf.pem`, `leaf.key`).
pub fn certificates() -> tempfile::TempDir {
    let directory = tempfile::tempdir().unwrap();
    let script = "cd \"$1\" && exec 2>&1 && openssl req -x509 -newkey rsa:2048 -nodes -subj /CN=ca -keyout ca.key -out ca.pem \
        && openssl req -newkey rsa:2048 -nodes -subj /CN=leaf -keyout leaf.key -out leaf.csr \
        && echo subjectAltName=IP:127.0.0.1 >ext \
        && openssl x509 -req -in leaf.csr -CA ca.pem -CAkey ca.key -CAcreateserial -extfile ext -out leaf.pem";
    run("sh", &["-c", script, "sh", directory.path().to_str().unwrap()]);
    directory
}

/// A proxy that ends connections after so many bytes of answers, until it has cut so many.
pub struct CuttingProxy {
    pub address: String,
    pub connections: Arc<AtomicU32>,
    pub bytes: Arc<AtomicU64>,
}

impl CuttingProxy {
    pub fn start(target: &str, cut_after_bytes: u64, cuts: u32) -> CuttingProxy {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let (connections, bytes) = (Arc::new(AtomicU32::new(0)), Arc::new(AtomicU64::new(0)));
        let (target, counts) = (target.to_owned(), (connections.clone(), bytes.clone()));
        let cuts_left = Arc::new(AtomicU32::new(cuts));
        thread::spawn(move || {
            for client in listener.incoming() {
                let (client, server) = (client.unwrap(), TcpStream::connect(&target).unwrap());
                counts.0.fetch_add(1, Ordering::Relaxed);
                let (bytes, cuts_left) = (counts.1.clone(), cuts_left.clone());
                let (mut up, mut down) = (client.try_clone().unwrap(), server.try_clone().unwrap());
                thread::spawn(move || io::copy(&mut up, &mut down));
                thread::spawn(move || {
                    let mut copied =
                        io::copy(&mut (&server).take(cut_after_bytes), &mut &client).unwrap_or(0);
                    let cut = |left: u32| left.checked_sub(1);
                    if copied == cut_after_bytes
                        && cuts_left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, cut).is_err()
                    {
                        copied += io::copy(&mut &server, &mut &client).unwrap_or(0);
                    }
                    bytes.fetch_add(copied, Ordering::Relaxed);
                    let _ = client.shutdown(Shutdown::Both);
                    let _ = server.shutdown(Shutdown::Both);
                });
            }
        });
        CuttingProxy { address, connections, bytes }
    }
}

/// A registry in a few lines, for what docker-registry does not do: tokens, misbehaviour, counting.
pub struct TinyRegistry {
    pub address: String,
    pub state: Arc<TinyState>,
}

#[derive(Default)]
pub struct TinyState {
    documents: Mutex<BTreeMap<String, (String, Vec<u8>)>>,
    /// Full paths of the requests that were answered with content.
    pub served: Mutex<Vec<String>>,
    /// While this is true blobs wait after their first half.
    gate: Mutex<bool>,
    opened: Condvar,
    pub blobs_begun: AtomicU32,
    with_token: bool,
    ignores_ranges: bool,
}

impl TinyRegistry {
    pub fn start(layout: &Layout, tag: &str, with_token: bool, ignores_ranges: bool) -> TinyRegistry {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let state = Arc::new(TinyState { with_token, ignores_ranges, ..TinyState::default() });
        let index: Value =
            serde_json::from_slice(&fs::read(layout.path().join("index.json")).unwrap()).unwrap();
        for entry in fs::read_dir(layout.path().join("blobs/sha256")).unwrap() {
            let (path, name) =
                entry.map(|entry| (entry.path(), entry.file_name().into_string().unwrap())).unwrap();
            let bytes = fs::read(path).unwrap();
            state.add(&format!("/v2/team/app/blobs/sha256:{name}"), "application/octet-stream", &bytes);
            for manifest in index["manifests"].as_array().unwrap() {
                let found = manifest["digest"] == format!("sha256:{name}");
                if found && manifest["annotations"]["org.opencontainers.image.ref.name"] == tag {
                    let kind = manifest["mediaType"].as_str().unwrap();
                    state.add(&format!("/v2/team/app/manifests/{tag}"), kind, &bytes);
                }
            }
        }
        let (shared, name) = (state.clone(), address.clone());
        thread::spawn(move || {
            for client in listener.incoming() {
                let (shared, name) = (shared.clone(), name.clone());
                thread::spawn(move || shared.answer(client.unwrap(), &name));
            }
        });
        TinyRegistry { address, state }
    }

    pub fn image(&self, tag: &str) -> ImageRef {
        reference(format!("{}/team/app:{tag}", self.address))
    }

    pub fn close_gate(&self) {
        *self.state.gate.lock().unwrap() = true;
    }

    pub fn open_gate(&self) {
        *self.state.gate.lock().unwrap() = false;
        self.state.opened.notify_all();
    }

    pub fn served(&self, part: &str) -> usize {
        self.state.served.lock().unwrap().iter().filter(|path| path.contains(part)).count()
    }
}

impl TinyState {
    fn add(&self, path: &str, kind: &str, bytes: &[u8]) {
        self.documents.lock().unwrap().insert(path.to_owned(), (kind.to_owned(), bytes.to_vec()));
    }

    fn answer(&self, client: TcpStream, address: &str) -> io::Result<()> {
        let mut lines = BufReader::new(client.try_clone()?).lines();
        let first = lines.next().unwrap_or(Ok(String::new()))?;
        let path = first.split(' ').nth(1).unwrap_or("").to_owned();
        let mut headers = BTreeMap::new();
        for line in lines {
            let line = line?;
            let Some((name, value)) = line.split_once(": ") else { break };
            headers.insert(name.to_lowercase(), value.to_owned());
        }
        let mut client = client;
        let mut reply = |status: &str, headers: &str, body: &[u8]| {
            let head = format!(
                "HTTP/1.1 {status}\r\nContent-Length: {}\r\nConnection: close\r\n{headers}\r\n",
                body.len()
            );
            client.write_all(head.as_bytes())?;
            let half = body.len() / 2;
            client.write_all(&body[..half])?;
            if path.contains("/blobs/") {
                self.blobs_begun.fetch_add(1, Ordering::Relaxed);
                let mut closed = self.gate.lock().unwrap();
                while *closed {
                    closed = self.opened.wait(closed).unwrap();
                }
            }
            client.write_all(&body[half..])
        };
        let authorization = headers.get("authorization").map_or("", String::as_str);
        if path.starts_with("/token") {
            // Base64 of berth:secret.
            return match authorization {
                "Basic YmVydGg6c2VjcmV0" => reply("200 OK", "", br#"{"token":"the-token"}"#),
                _ => reply("401 Unauthorized", "", b"{}"),
            };
        }
        if self.with_token && authorization != "Bearer the-token" {
            let challenge =
                format!("WWW-Authenticate: Bearer realm=\"http://{address}/token\",service=\"tiny\"\r\n");
            return reply("401 Unauthorized", &challenge, b"{}");
        }
        if path == "/v2/" {
            return reply("200 OK", "", b"{}");
        }
        let Some((kind, bytes)) = self.documents.lock().unwrap().get(&path).cloned() else {
            return reply(
                "404 Not Found",
                "",
                br#"{"errors":[{"code":"MANIFEST_UNKNOWN","message":"unknown"}]}"#,
            );
        };
        self.served.lock().unwrap().push(path.clone());
        let range = headers
            .get("range")
            .and_then(|range| range.strip_prefix("bytes=")?.strip_suffix('-')?.parse().ok());
        let kind = format!("Content-Type: {kind}\r\n");
        match range {
            Some(start) if !self.ignores_ranges && start < bytes.len() => {
                reply("206 Partial Content", &kind, &bytes[start..])
            }
            _ => reply("200 OK", &kind, &bytes),
        }
    }
}
