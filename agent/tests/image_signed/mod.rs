//! Images that must be signed, as cosign signs them: Debian's docker-registry, signatures by openssl.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::image_support::*;
use berth_agent::io::image::{
    CosignKey, ImageError, ImageRef, ImageStore, RegistryConfig, Signer, StoreConfig,
};
use berth_protocol::policy::ImagePattern;
use serde_json::{Value, json};

/// A key pair in files, of `openssl genpkey`'s algorithm.
struct Pair {
    secret: PathBuf,
    public: CosignKey,
    edwards: bool,
}

impl Pair {
    fn new(dir: &Path, name: &str, edwards: bool) -> Pair {
        let (secret, public) = (dir.join(name), dir.join(format!("{name}.pub")));
        let at = |path: &PathBuf| path.to_str().unwrap().to_owned();
        match edwards {
            true => run("openssl", &["genpkey", "-algorithm", "ed25519", "-out", &at(&secret)]),
            false => {
                run("openssl", &["ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", &at(&secret)])
            }
        }
        run("openssl", &["pkey", "-in", &at(&secret), "-pubout", "-out", &at(&public)]);
        let public = CosignKey::from_pem(&fs::read_to_string(public).unwrap()).unwrap();
        Pair { secret, public, edwards }
    }

    /// In base64, as the annotation has it.
    fn sign(&self, payload: &[u8]) -> String {
        let (from, to) = (self.secret.with_extension("payload"), self.secret.with_extension("sig"));
        fs::write(&from, payload).unwrap();
        let [secret, from, to] = [&self.secret, &from, &to].map(|path| path.to_str().unwrap());
        match self.edwards {
            true => {
                run("openssl", &["pkeyutl", "-sign", "-inkey", secret, "-rawin", "-in", from, "-out", to])
            }
            false => run("openssl", &["dgst", "-sha256", "-sign", secret, "-out", to, from]),
        }
        let text = Command::new("openssl").args(["base64", "-A", "-in", to]).output().unwrap();
        String::from_utf8(text.stdout).unwrap()
    }

    fn signs(&self, images: &str) -> Signer {
        Signer { images: vec![ImagePattern::parse(images).unwrap()], key: self.public.clone() }
    }
}

/// What cosign signs: its JSON, to the letter.
fn payload(image: &str) -> Vec<u8> {
    format!(
        "{{\"critical\":{{\"identity\":{{\"docker-reference\":\"registry.lab/team/app\"}},\"image\":{{\"docker-manifest-digest\":\"{image}\"}},\
         \"type\":\"cosign container image signature\"}},\"optional\":null}}"
    )
    .into_bytes()
}

/// Puts signatures, each a payload with its annotation, beside the image of that digest.
fn attach(registry: &Registry, image: &str, signatures: &[(Vec<u8>, String)]) {
    let mut layout = Layout::new();
    let layers: Vec<Value> = signatures
        .iter()
        .map(|(payload, signature)| {
            let mut layer = layout.blob("application/vnd.dev.cosign.simplesigning.v1+json", payload);
            layer["annotations"] = json!({"dev.cosignproject.cosign/signature": signature});
            layer
        })
        .collect();
    let diff_ids: Vec<&Value> = layers.iter().map(|layer| &layer["digest"]).collect();
    let config = json!({"architecture": "", "os": "", "config": {}, "rootfs": {"type": "layers", "diff_ids": diff_ids}});
    let config = layout.blob("application/vnd.oci.image.config.v1+json", config.to_string().as_bytes());
    let kind = "application/vnd.oci.image.manifest.v1+json";
    let manifest = json!({"schemaVersion": 2, "mediaType": kind, "config": config, "layers": layers});
    let manifest = layout.blob(kind, manifest.to_string().as_bytes());
    layout.tag("sig", manifest);
    registry.push(layout.path(), "sig", &format!("team/app:{}.sig", image.replace(':', "-")));
}

/// An image with one file, pushed as `team/app:TAG`: its digest.
fn push(registry: &Registry, tag: &str) -> String {
    let mut layout = Layout::new();
    let plain = tar(&[("tag", tag.as_bytes())]);
    let image = layout.image(ARCHITECTURE, &[(gzip(&plain), plain)]);
    let digest = image["digest"].as_str().unwrap().to_owned();
    layout.tag(tag, image);
    registry.push(layout.path(), tag, &format!("team/app:{tag}"));
    digest
}

fn asking(dir: &Path, signers: Vec<Signer>) -> ImageStore {
    let worker = env!("CARGO_BIN_EXE_berth-agent").into();
    ImageStore::open(dir, StoreConfig { signers, worker, ..StoreConfig::default() }).unwrap()
}

async fn refused(store: &ImageStore, image: &ImageRef, says: &str) {
    let error = store.ensure(image, |_| {}).await.expect_err(says);
    assert_eq!(error.reason(), "ImageUnsigned", "{error}");
    assert!(error.to_string().contains(says), "{error}");
    // Another node may have another policy, and time does not help.
    assert!(error.elsewhere() && !error.retriable());
    assert!(store.lookup(image).unwrap().is_none());
}

#[tokio::test]
async fn an_image_needs_a_signature_of_its_own_by_a_key_that_is_named() {
    let (keys, home) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let registry = Registry::start(false);
    let (team, other) = (Pair::new(keys.path(), "team", false), Pair::new(keys.path(), "other", false));
    let edwards = Pair::new(keys.path(), "edwards", true);
    let pattern = format!("{}/team/*", registry.address);
    let store = asking(home.path(), vec![team.signs(&pattern), edwards.signs(&pattern)]);
    let image = |tag: &str| registry.image(&format!("team/app:{tag}"));
    let by = |pair: &Pair, payload: Vec<u8>| {
        let signature = pair.sign(&payload);
        (payload, signature)
    };

    push(&registry, "unsigned");
    refused(&store, &image("unsigned"), "it has no signature").await;
    let digest = push(&registry, "stranger");
    attach(&registry, &digest, &[by(&other, payload(&digest))]);
    refused(&store, &image("stranger"), "none of the keys").await;
    // The right key's word on another image, put beside this one.
    let borrowed = payload(&push(&registry, "signed"));
    let digest = push(&registry, "borrowed");
    attach(&registry, &digest, &[by(&team, borrowed.clone())]);
    refused(&store, &image("borrowed"), "is of another image, sha256:").await;
    // And with this one's name written over the other's.
    let digest = push(&registry, "altered");
    let (_, signature) = by(&team, borrowed);
    attach(&registry, &digest, &[(payload(&digest), signature)]);
    refused(&store, &image("altered"), "not of its payload").await;
    let digest = push(&registry, "garbage");
    attach(&registry, &digest, &[(payload(&digest), "!".into()), (b"{}".to_vec(), "AAAA".into())]);
    refused(&store, &image("garbage"), "none of the keys").await;
    // Nothing of any was unpacked.
    assert_tidy(home.path(), 0);

    let digest = push(&registry, "signed");
    attach(&registry, &digest, &[by(&other, payload(&digest)), by(&team, payload(&digest))]);
    let record = store.ensure(&image("signed"), |_| {}).await.unwrap();
    assert_eq!((record.signed_by, record.manifest_digest), (Some(team.public.id()), digest.parse().unwrap()));
    let digest = push(&registry, "edwards");
    attach(&registry, &digest, &[by(&edwards, payload(&digest))]);
    let record = store.ensure(&image("edwards"), |_| {}).await.unwrap();
    assert_eq!(record.signed_by, Some(edwards.public.id()));
    // By its digest it is the same image.
    let pinned = registry.image(&format!("team/app@{digest}"));
    assert_eq!(store.ensure(&pinned, |_| {}).await.unwrap().signed_by, Some(edwards.public.id()));

    // However the registry is spelled; images of other names need none.
    let (host, port) = registry.address.split_once(':').unwrap();
    assert_eq!(host, "127.0.0.1");
    let other = format!("LocalHost:{port}");
    let insecure = RegistryConfig { insecure: vec![other.clone()], ..RegistryConfig::default() };
    let signers = vec![team.signs(&format!("localhost:{port}/team/*"))];
    let worker = env!("CARGO_BIN_EXE_berth-agent").into();
    let config = StoreConfig { signers, worker, registry: insecure, ..StoreConfig::default() };
    let named = ImageStore::open(&home.path().join("named"), config).unwrap();
    refused(&named, &reference(format!("{other}/team/app:unsigned")), "it has no signature").await;
    assert_eq!(named.ensure(&image("unsigned"), |_| {}).await.unwrap().signed_by, None);
}

#[tokio::test]
async fn a_signature_of_an_index_is_one_of_what_it_names() {
    let (keys, home) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let registry = Registry::start(false);
    let team = Pair::new(keys.path(), "team", false);
    let store = asking(home.path(), vec![team.signs("*")]);
    let mut layout = Layout::new();
    let image = |architecture: &str| {
        let plain = tar(&[("arch", architecture.as_bytes())]);
        let mut descriptor = layout.image(architecture, &[(gzip(&plain), plain)]);
        descriptor["platform"] = json!({"os": "linux", "architecture": architecture});
        descriptor
    };
    let kind = "application/vnd.oci.image.index.v1+json";
    let index =
        json!({"schemaVersion": 2, "mediaType": kind, "manifests": [image("s390x"), image(ARCHITECTURE)]});
    let index = layout.blob(kind, index.to_string().as_bytes());
    let digest = index["digest"].as_str().unwrap().to_owned();
    layout.tag("both", index);
    registry.push(layout.path(), "both", "team/app:both");
    refused(&store, &registry.image("team/app:both"), "it has no signature").await;
    attach(&registry, &digest, &[(payload(&digest), team.sign(&payload(&digest)))]);
    let record = store.ensure(&registry.image("team/app:both"), |_| {}).await.unwrap();
    assert_eq!(record.signed_by, Some(team.public.id()));
    assert_ne!(record.manifest_digest.to_string(), digest);
}

#[tokio::test]
async fn what_was_brought_here_under_another_policy_is_verified_anew() {
    let (keys, home) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let registry = Registry::start(false);
    let (team, next) = (Pair::new(keys.path(), "team", false), Pair::new(keys.path(), "next", false));
    let image = registry.image("team/app:v1");
    let digest = push(&registry, "v1");
    let plain = asking(home.path(), Vec::new());
    assert_eq!(plain.ensure(&image, |_| {}).await.unwrap().signed_by, None);
    let error =
        asking(home.path(), vec![team.signs("*")]).ensure(&image, |_| {}).await.expect_err("unsigned");
    assert!(matches!(error, ImageError::Unsigned { .. }), "{error}");
    attach(&registry, &digest, &[(payload(&digest), team.sign(&payload(&digest)))]);
    let store = asking(home.path(), vec![team.signs("*")]);
    let record = store.ensure(&image, |_| {}).await.unwrap();
    assert_eq!(record.signed_by, Some(team.public.id()));
    assert_tidy(home.path(), 1);
    // The key is another now.
    let error =
        asking(home.path(), vec![next.signs("*")]).ensure(&image, |_| {}).await.expect_err("of another key");
    assert!(matches!(error, ImageError::Unsigned { .. }), "{error}");
    // Verified once, it is used without its registry.
    drop(registry);
    asking(home.path(), vec![next.signs("docker.io"), team.signs("*")]).ensure(&image, |_| {}).await.unwrap();
}

#[tokio::test]
async fn files_have_no_signature() {
    let (keys, home) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let team = Pair::new(keys.path(), "team", false);
    let layout = Layout::simple(&[("hello", b"world")]);
    let store = asking(home.path(), vec![team.signs("*")]);
    refused(&store, &layout.reference("v1"), "it is a file").await;
    assert_tidy(home.path(), 0);
    let asks_others = asking(home.path(), vec![team.signs("docker.io")]);
    asks_others.ensure(&layout.reference("v1"), |_| {}).await.unwrap();
}
