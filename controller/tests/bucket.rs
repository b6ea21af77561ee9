//! The depot in an S3 bucket, against a server that speaks S3: moto's. `BERTH_MOTO` names it, where it is not in PATH.

mod common;

use std::collections::BTreeMap;
use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use berth_controller::io::depot::{Bucket, Depot, Item, Kept};
use berth_protocol::checkpoint::{CheckpointKind, Needs};
use berth_protocol::chunk::{ChunkId, Encoding, Frame};
use berth_protocol::ids::{Digest, Epoch, JobName, JobUid, Namespace, Run};
use berth_protocol::job;
use berth_protocol::manifest::{MANIFEST_VERSION, Manifest, Piece, SavedFile, SavedVolume};
use berth_protocol::units::Timestamp;
use bytes::Bytes;
use http_body_util::Full;

use common::{free_port, wait_until};

struct Moto {
    child: Child,
    port: u16,
}

impl Moto {
    fn start() -> Option<Self> {
        let cached = std::env::home_dir().map(|home| home.join(".cache/berth/tools/bin/moto_server"));
        let named = std::env::var_os("BERTH_MOTO").filter(|name| !name.is_empty()).map(Into::into);
        let program = named.or(cached.filter(|path| path.exists())).unwrap_or_else(|| "moto_server".into());
        let port = free_port();
        let child = Command::new(&program)
            .args(["-H", "127.0.0.1", "-p", &port.to_string()])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn();
        let Ok(child) = child else {
            let why = format!(
                "the depot in a bucket: {} does not start, `pip install moto[server]`",
                program.display()
            );
            eprintln!("SKIPPED: {why}");
            let skipped = concat!(env!("CARGO_MANIFEST_DIR"), "/../target/skipped");
            let mut counted = std::fs::File::options().create(true).append(true).open(skipped).unwrap();
            writeln!(counted, "{why}").unwrap();
            return None;
        };
        let moto = Self { child, port };
        wait_until("moto listens", || TcpStream::connect(("127.0.0.1", port)).is_ok());
        let answer = moto.ask("PUT", "/berth");
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
        Some(moto)
    }

    fn ask(&self, method: &str, path: &str) -> String {
        let mut stream = TcpStream::connect(("127.0.0.1", self.port)).unwrap();
        write!(
            stream,
            "{method} {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
        )
        .unwrap();
        let mut answer = String::new();
        let _ = stream.read_to_string(&mut answer);
        answer
    }

    fn bucket(&self, url: &str) -> Bucket {
        let endpoint = format!("http://127.0.0.1:{}", self.port);
        let variables = [
            ("AWS_ENDPOINT_URL", endpoint.as_str()),
            ("AWS_ACCESS_KEY_ID", "testing"),
            ("AWS_SECRET_ACCESS_KEY", "testing"),
            ("AWS_REGION", "us-east-1"),
            ("HOME", "/"),
        ];
        Bucket::with_variables(url, variables.map(|(name, value)| (name.to_owned(), value.to_owned())))
            .unwrap()
    }
}

impl Drop for Moto {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn frames(contents: &[&[u8]]) -> Bytes {
    let mut out = Vec::new();
    for content in contents {
        let content_bytes = u32::try_from(content.len()).unwrap();
        Frame { id: ChunkId::of(content), encoding: Encoding::Raw, content_bytes, bytes: content }
            .write(&mut out);
    }
    out.into()
}

fn manifest(contents: &[&[u8]]) -> Manifest {
    let piece = |content: &&[u8]| Piece::Chunk {
        id: ChunkId::of(content),
        bytes: u32::try_from(content.len()).unwrap(),
    };
    let pieces: Vec<Piece> = contents.iter().map(piece).collect();
    let bytes = pieces.iter().map(Piece::bytes).sum();
    let template = job::parse(b"{\"image\": \"host\", \"name\": \"j\", \"command\": [\"true\"]}", None)
        .unwrap()
        .spec
        .pod;
    Manifest {
        version: MANIFEST_VERSION,
        namespace: Namespace::default_namespace(),
        name: JobName::parse("j").unwrap().pod(0),
        pod: JobUid::parse("u").unwrap().pod(0),
        epoch: Epoch(1),
        run: Run(1),
        at: Timestamp(1),
        kind: CheckpointKind::Criu,
        node: None,
        spec: Digest::of(b"spec"),
        template,
        log_records: 0,
        needs: Needs::default(),
        versions: BTreeMap::new(),
        containers: Vec::new(),
        volumes: vec![SavedVolume {
            mount: "/data".to_owned(),
            name: None,
            archive: SavedFile { name: "data.tar".to_owned(), bytes, pieces },
        }],
    }
}

#[tokio::test]
async fn a_bucket_keeps_what_a_directory_does() {
    let Some(moto) = Moto::start() else { return };
    let dir = tempfile::tempdir().unwrap();
    let lab = Namespace::default_namespace();
    for url in ["s3://berth", "s3://berth/some/prefix/"] {
        let open = || Depot::open(dir.path().to_owned(), Some(moto.bucket(url)), &[7; 32], None).unwrap();
        let depot = open();
        depot.survey().await.unwrap();

        // More than one part of an upload.
        let large = vec![7; 12 << 20];
        let blob = Item::Blob(Digest::of(&large));
        assert!(depot.get(&blob).await.unwrap().is_none());
        depot.put(&blob, 1 << 30, Full::new(Bytes::from(large.clone()))).await.unwrap();
        assert_eq!(depot.get(&blob).await.unwrap().unwrap().whole().await.unwrap(), large);
        let wrong = depot.put(&Item::Blob(Digest::of(b"x")), 10, Full::new(Bytes::from_static(b"y"))).await;
        assert!(wrong.is_err());
        assert!(depot.get(&Item::Blob(Digest::of(b"x"))).await.unwrap().is_none());
        depot.delete(&blob).await.unwrap();
        depot.delete(&blob).await.unwrap();
        assert!(depot.get(&blob).await.unwrap().is_none());

        let (kept, idle): (&[&[u8]], &[&[u8]]) = (&[b"one", b"two"], &[b"three"]);
        depot.add_chunks(&lab, frames(kept)).await.unwrap();
        depot.add_chunks(&lab, frames(idle)).await.unwrap();
        let saved = manifest(kept);
        let (id, bytes) = saved.render().unwrap();
        assert_eq!(depot.keep_manifest(id, bytes.into(), &saved).await.unwrap(), Kept::New);

        // Another life of the controller finds it all, and collects what nothing names.
        let depot = open();
        depot.survey().await.unwrap();
        assert_eq!(depot.lacking(&lab, &[ChunkId::of(b"three")]), []);
        assert_eq!(depot.collect(Duration::ZERO).await.unwrap(), 1);
        assert_eq!(
            depot.lacking(&lab, &[ChunkId::of(b"three"), ChunkId::of(b"one")]),
            [ChunkId::of(b"three")]
        );
        let found = depot.manifest(&id).await.unwrap().unwrap();
        assert_eq!(Manifest::parse(&id, &found).unwrap(), saved);
        let frame = depot.frame(&lab, &ChunkId::of(b"two")).await.unwrap().unwrap();
        assert_eq!(Frame::read(&frame).unwrap().0.bytes, b"two");
        depot.delete_manifest(&id).await.unwrap();
        assert_eq!(depot.collect(Duration::ZERO).await.unwrap(), 1);
        assert_eq!(depot.totals(), (0, 0));
        let depot = open();
        depot.survey().await.unwrap();
        assert_eq!((depot.totals(), depot.manifest(&id).await.unwrap()), ((0, 0), None));
    }
}

#[tokio::test]
async fn a_bucket_that_cannot_be_used_says_so() {
    let Some(moto) = Moto::start() else { return };
    let dir = tempfile::tempdir().unwrap();
    let lab = Namespace::default_namespace();
    let depot =
        Depot::open(dir.path().to_owned(), Some(moto.bucket("s3://another")), &[7; 32], None).unwrap();
    let error = depot.add_chunks(&lab, frames(&[b"x"])).await.unwrap_err().to_string();
    assert!(error.contains("the depot cannot write packs/"), "{error}");
}
