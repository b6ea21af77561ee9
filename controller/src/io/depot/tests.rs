//! The depot against a model: nothing that a checkpoint names is ever lost, whatever is collected and wherever it
//! crashes; and what nothing names goes in the end.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use berth_protocol::checkpoint::{CheckpointKind, Needs};
use berth_protocol::chunk::{self, ChunkId, Encoding, Frame};
use berth_protocol::ids::{ContainerName, JobName, JobUid, NodeId, Run};
use berth_protocol::job;
use berth_protocol::limits::{CHUNK_BYTES_MAX, PACK_BYTES_MAX};
use berth_protocol::manifest::{MANIFEST_VERSION, Manifest, Piece, SavedContainer, SavedFile};
use berth_protocol::units::Timestamp;
use proptest::prelude::*;

use super::*;

fn content(n: u8) -> Vec<u8> {
    vec![n; 1000 + usize::from(n)]
}

fn frames(chunks: &BTreeSet<u8>) -> Bytes {
    let mut out = Vec::new();
    for n in chunks {
        let content = content(*n);
        let content_bytes = u32::try_from(content.len()).unwrap();
        Frame { id: ChunkId::of(&content), encoding: Encoding::Raw, content_bytes, bytes: &content }
            .write(&mut out);
    }
    out.into()
}

const SECRET: [u8; 32] = [7; 32];

fn lab() -> Namespace {
    Namespace::default_namespace()
}

fn manifest(n: u64, chunks: &BTreeSet<u8>) -> Manifest {
    let name = JobName::parse("j").unwrap();
    let piece = |n: &u8| {
        let content = content(*n);
        Piece::Chunk { id: ChunkId::of(&content), bytes: u32::try_from(content.len()).unwrap() }
    };
    let pieces: Vec<Piece> = chunks.iter().map(piece).collect();
    let bytes = pieces.iter().map(Piece::bytes).sum();
    let dump = vec![SavedFile { name: "pages-1.img".to_owned(), bytes, pieces }];
    let template = job::parse(b"{\"image\": \"host\", \"name\": \"j\", \"command\": [\"true\"]}", None);
    Manifest {
        version: MANIFEST_VERSION,
        namespace: lab(),
        name: name.pod(0),
        pod: JobUid::parse("u").unwrap().pod(0),
        epoch: Epoch(1),
        run: Run(1),
        at: Timestamp(n),
        kind: CheckpointKind::Criu,
        node: NodeId::parse("n1").ok(),
        spec: Digest::of(b"spec"),
        template: template.unwrap().spec.pod,
        log_records: 0,
        needs: Needs::default(),
        versions: BTreeMap::new(),
        containers: vec![SavedContainer {
            name: ContainerName::parse("main").unwrap(),
            image: None,
            dump,
            config: None,
            layer: None,
            notes: BTreeMap::new(),
        }],
        volumes: Vec::new(),
    }
}

async fn open(dir: &std::path::Path) -> Depot {
    let depot = Depot::open(dir.to_owned(), None, &SECRET, None).unwrap();
    depot.survey().await.unwrap();
    depot
}

/// All files below a folder, with what is in them.
fn files(dir: &std::path::Path, folder: &str) -> Vec<(PathBuf, Vec<u8>)> {
    let mut all = Vec::new();
    for entry in std::fs::read_dir(dir.join(folder)).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            all.extend(files(&path, ""));
        } else {
            all.push((path.clone(), std::fs::read(path).unwrap()));
        }
    }
    all
}

#[derive(Debug, Clone)]
enum Op {
    /// Chunks come; a manifest may never follow.
    Upload(BTreeSet<u8>),
    /// A checkpoint as agents make it: what lacks, then the manifest, again where it lacks after all.
    Save(BTreeSet<u8>),
    /// Of those kept, the one of this number.
    Delete(prop::sample::Index),
    Collect,
    /// The process ends here and a new one looks at the directory.
    Crash,
    /// A pack comes back that was being removed, as a crash before its removal leaves it.
    Unremove,
}

fn op() -> impl Strategy<Value = Op> {
    let chunks = proptest::collection::btree_set(0..24_u8, 1..8);
    prop_oneof![
        chunks.clone().prop_map(Op::Upload),
        chunks.prop_map(Op::Save),
        any::<prop::sample::Index>().prop_map(Op::Delete),
        Just(Op::Collect),
        Just(Op::Crash),
        Just(Op::Unremove),
    ]
}

async fn check(depot: &Depot, kept: &BTreeMap<Digest, BTreeSet<u8>>) {
    for (id, chunks) in kept {
        let bytes = depot.manifest(id).await.unwrap().expect("a manifest that is kept");
        Manifest::parse(id, &bytes).unwrap();
        for n in chunks {
            let frame = depot
                .frame(&lab(), &ChunkId::of(&content(*n)))
                .await
                .unwrap()
                .expect("a chunk that is named");
            assert_eq!(Frame::read(&frame).unwrap().0.bytes, content(*n));
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    #[test]
    fn nothing_that_is_named_is_lost_and_the_rest_goes(ops in proptest::collection::vec(op(), 1..24)) {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        runtime.block_on(async {
            let dir = tempfile::tempdir().unwrap();
            let mut depot = open(dir.path()).await;
            let mut kept: BTreeMap<Digest, BTreeSet<u8>> = BTreeMap::new();
            let mut before = Vec::new();
            for (n, op) in ops.into_iter().enumerate() {
                match op {
                    Op::Upload(chunks) => depot.add_chunks(&lab(), frames(&chunks)).await.unwrap(),
                    Op::Save(chunks) => {
                        let saved = manifest(n as u64, &chunks);
                        let (id, bytes) = saved.render().unwrap();
                        let ids: Vec<ChunkId> = chunks.iter().map(|n| ChunkId::of(&content(*n))).collect();
                        let lacking = depot.lacking(&lab(), &ids);
                        let sent = chunks.iter().filter(|n| lacking.contains(&ChunkId::of(&content(**n))));
                        // Some of them come, and the manifest too early.
                        let first: BTreeSet<u8> = sent.clone().take(2).copied().collect();
                        depot.add_chunks(&lab(), frames(&first)).await.unwrap();
                        if lacking.len() > 2 {
                            let early = depot.keep_manifest(id, bytes.clone().into(), &saved).await.unwrap();
                            let Kept::Lacking(lacks) = early else { panic!("{early:?}") };
                            assert_eq!(lacks.len(), lacking.len() - 2);
                        }
                        depot.add_chunks(&lab(), frames(&sent.copied().collect())).await.unwrap();
                        assert_eq!(depot.keep_manifest(id, bytes.clone().into(), &saved).await.unwrap(), Kept::New);
                        assert_eq!(depot.keep_manifest(id, bytes.into(), &saved).await.unwrap(), Kept::Known);
                        kept.insert(id, chunks);
                    }
                    Op::Delete(which) if !kept.is_empty() => {
                        let id = *kept.keys().nth(which.index(kept.len())).unwrap();
                        depot.delete_manifest(&id).await.unwrap();
                        kept.remove(&id);
                    }
                    Op::Delete(_) => {}
                    Op::Collect => {
                        before = files(dir.path(), "packs");
                        depot.collect(Duration::ZERO).await.unwrap();
                    }
                    Op::Crash => depot = open(dir.path()).await,
                    Op::Unremove => {
                        for (path, bytes) in before.drain(..) {
                            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
                            std::fs::write(path, bytes).unwrap();
                        }
                        depot = open(dir.path()).await;
                    }
                }
                check(&depot, &kept).await;
            }
            let named: BTreeSet<u8> = kept.values().flatten().copied().collect();
            depot = open(dir.path()).await;
            depot.collect(Duration::ZERO).await.unwrap();
            depot.collect(Duration::ZERO).await.unwrap();
            check(&depot, &kept).await;
            let (bytes, manifests) = depot.totals();
            assert_eq!(manifests, kept.len() as u64);
            let needed: u64 = named.iter().map(|n| content(*n).len() as u64 + 41).sum();
            assert!(bytes <= 2 * needed, "{bytes} bytes are kept of {needed}");
            if kept.is_empty() {
                assert_eq!((files(dir.path(), "packs"), files(dir.path(), "checkpoints")), (vec![], vec![]));
            }
        });
    }
}

#[tokio::test]
async fn what_was_asked_for_is_not_collected_for_a_while() {
    let dir = tempfile::tempdir().unwrap();
    let depot = open(dir.path()).await;
    let chunks = [1, 2].into();
    depot.add_chunks(&lab(), frames(&chunks)).await.unwrap();
    let ids = [ChunkId::of(&content(1))];
    assert_eq!(depot.lacking(&lab(), &ids), []);
    assert_eq!(depot.collect(GRACE).await.unwrap(), 0);
    assert_eq!(depot.lacking(&lab(), &ids), []);
    assert_eq!(depot.collect(Duration::ZERO).await.unwrap(), 1);
    assert_eq!(depot.lacking(&lab(), &ids), ids);
}

#[tokio::test]
async fn a_chunk_that_is_not_what_its_id_says_is_refused_with_all_that_came_with_it() {
    let dir = tempfile::tempdir().unwrap();
    let depot = open(dir.path()).await;
    let mut bytes = frames(&[1, 2].into()).to_vec();
    *bytes.last_mut().unwrap() ^= 1;
    assert!(matches!(
        depot.add_chunks(&lab(), bytes.into()).await,
        Err(DepotError::Pack(PackError::Digest { .. }))
    ));
    assert_eq!(depot.lacking(&lab(), &[ChunkId::of(&content(1))]).len(), 1);
    assert_eq!(files(dir.path(), "packs"), []);
}

#[tokio::test]
async fn a_namespace_takes_no_more_than_its_quota() {
    let dir = tempfile::tempdir().unwrap();
    let depot = Depot::open(dir.path().to_owned(), None, &SECRET, Some(2500)).unwrap();
    depot.add_chunks(&lab(), frames(&[1, 2, 3].into())).await.unwrap();
    let mut outcomes = Vec::new();
    for (n, chunks) in [[1].into(), [1, 2].into(), [3].into()].iter().enumerate() {
        let saved = manifest(n as u64, chunks);
        let (id, bytes) = saved.render().unwrap();
        outcomes.push(depot.keep_manifest(id, bytes.into(), &saved).await);
    }
    assert!(
        matches!(outcomes[..], [Ok(Kept::New), Ok(Kept::New), Err(DepotError::Quota { .. })]),
        "{outcomes:?}"
    );
}

/// A checkpoint of chunk 1 for `namespace`, as agents make it.
async fn save(depot: &Depot, namespace: &Namespace) -> Digest {
    let chunks = [1].into();
    depot.add_chunks(namespace, frames(&chunks)).await.unwrap();
    let saved = Manifest { namespace: namespace.clone(), ..manifest(1, &chunks) };
    let (id, bytes) = saved.render().unwrap();
    assert_eq!(depot.keep_manifest(id, bytes.into(), &saved).await.unwrap(), Kept::New);
    id
}

#[tokio::test]
async fn who_reads_the_files_reads_nothing_of_a_checkpoint() {
    let dir = tempfile::tempdir().unwrap();
    let depot = open(dir.path()).await;
    save(&depot, &lab()).await;
    let all = [files(dir.path(), "packs"), files(dir.path(), "checkpoints")].concat();
    assert_eq!(all.len(), 2);
    let (content, chunk) = (content(1), ChunkId::of(&content(1)));
    let hex = chunk.hex();
    for (path, bytes) in all {
        let plain: [&[u8]; 4] = [&content[..16], chunk.as_bytes(), hex.as_bytes(), b"template"];
        for plain in plain {
            assert!(!bytes.windows(plain.len()).any(|window| window == plain), "{}", path.display());
        }
        assert!(!path.ends_with(&hex));
    }
}

#[tokio::test]
async fn no_namespace_learns_what_another_has_kept() {
    let dir = tempfile::tempdir().unwrap();
    let depot = open(dir.path()).await;
    save(&depot, &lab()).await;
    let (other, ids) = (Namespace::parse("other").unwrap(), [ChunkId::of(&content(1))]);
    assert_eq!(depot.lacking(&lab(), &ids), []);
    assert_eq!(depot.lacking(&other, &ids), ids);
    assert_eq!(depot.frame(&other, &ids[0]).await.unwrap(), None);
    // Its manifest cannot name what it has not brought itself.
    let saved = Manifest { namespace: other.clone(), ..manifest(1, &[1].into()) };
    let (id, bytes) = saved.render().unwrap();
    let kept = depot.keep_manifest(id, bytes.into(), &saved).await.unwrap();
    assert_eq!(kept, Kept::Lacking(ids.to_vec()));
    save(&depot, &other).await;
    // Equal content, and neither the name nor a byte tells.
    let packs = files(dir.path(), "packs");
    assert_eq!(packs.len(), 2);
    assert_ne!(packs[0].0.file_name(), packs[1].0.file_name());
    let same = packs[0].1.iter().zip(&packs[1].1).filter(|(a, b)| a == b).count();
    assert!(same < packs[0].1.len() / 10, "{same} bytes are the same");
}

/// Chunk 2 of `content`, said by what it differs from chunk `base`, whatever that is.
fn difference(base: &[u8]) -> Bytes {
    let whole = content(2);
    let mut differs = whole.clone();
    chunk::xor(&mut differs, base);
    let packed = zstd::bulk::compress(&differs, 1).unwrap();
    let body = [ChunkId::of(base).as_bytes(), &packed[..]].concat();
    let (id, content_bytes) = (ChunkId::of(&whole), whole.len() as u32);
    let mut out = Vec::new();
    Frame { id, encoding: Encoding::Xor, content_bytes, bytes: &body }.write(&mut out);
    out.into()
}

#[tokio::test]
async fn a_difference_from_what_is_here_is_kept_whole() {
    let dir = tempfile::tempdir().unwrap();
    let depot = open(dir.path()).await;
    let (other, two) = (Namespace::parse("other").unwrap(), ChunkId::of(&content(2)));
    save(&depot, &lab()).await;
    // Another namespace's chunks are as good as none.
    for namespace in [&other, &lab()] {
        let base = if *namespace == lab() { content(9) } else { content(1) };
        let refused = depot.add_chunks(namespace, difference(&base)).await;
        let Err(DepotError::Bases(lacking)) = refused else { panic!("{refused:?}") };
        assert_eq!(lacking, [ChunkId::of(&base)]);
        assert_eq!(depot.lacking(namespace, &[two]), [two]);
    }
    depot.add_chunks(&lab(), difference(&content(1))).await.unwrap();
    let frame = depot.frame(&lab(), &two).await.unwrap().unwrap();
    assert_eq!(packs::verify(&frame).unwrap()[0].id, two);
    // What it differed from may go.
    let all = depot.manifests();
    depot.delete_manifest(&all[0].0).await.unwrap();
    let saved = manifest(2, &[2].into());
    let (id, bytes) = saved.render().unwrap();
    assert_eq!(depot.keep_manifest(id, bytes.into(), &saved).await.unwrap(), Kept::New);
    depot.collect(Duration::ZERO).await.unwrap();
    assert_eq!(depot.lacking(&lab(), &[two, ChunkId::of(&content(1))]), [ChunkId::of(&content(1))]);
}

#[tokio::test]
async fn differences_grow_to_a_pack_at_most() {
    let dir = tempfile::tempdir().unwrap();
    let depot = open(dir.path()).await;
    let zeros = vec![0; CHUNK_BYTES_MAX];
    let packed = zstd::bulk::compress(&zeros, 1).unwrap();
    let body = [ChunkId::of(b"base").as_bytes(), &packed[..]].concat();
    let content_bytes = CHUNK_BYTES_MAX as u32;
    let frame = Frame { id: ChunkId::of(&zeros), encoding: Encoding::Xor, content_bytes, bytes: &body };
    let mut out = Vec::new();
    for _ in 0..=PACK_BYTES_MAX / CHUNK_BYTES_MAX {
        frame.write(&mut out);
    }
    assert!(out.len() < 10_000);
    let refused = depot.add_chunks(&lab(), out.into()).await;
    assert!(matches!(refused, Err(DepotError::TooLarge { .. })), "{refused:?}");
}

#[tokio::test]
async fn a_file_that_was_changed_or_put_elsewhere_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let depot = open(dir.path()).await;
    let (other, chunk) = (Namespace::parse("other").unwrap(), ChunkId::of(&content(1)));
    let (ours, theirs) = (save(&depot, &lab()).await, save(&depot, &other).await);
    let pack_of = |namespace: &Namespace| {
        let all = files(dir.path(), &format!("packs/{namespace}"));
        all.into_iter().next().unwrap()
    };
    let ((our_pack, sound), (_, other_pack)) = (pack_of(&lab()), pack_of(&other));
    let mut changed = sound.clone();
    changed[500] ^= 1;
    for bad in [&changed, &other_pack] {
        std::fs::write(&our_pack, bad).unwrap();
        let read = depot.frame(&lab(), &chunk).await;
        assert!(matches!(read, Err(DepotError::Altered { .. })), "{read:?}");
        assert!(depot.frame(&other, &chunk).await.unwrap().is_some());
        // The next life finds it, or finds it at the read.
        let again = open(dir.path()).await;
        assert!(!matches!(again.frame(&lab(), &chunk).await, Ok(Some(_))));
    }
    std::fs::write(&our_pack, &sound).unwrap();
    assert!(depot.frame(&lab(), &chunk).await.unwrap().is_some());

    let file = |id: &Digest| {
        let all = files(dir.path(), "checkpoints");
        all.into_iter().find(|(path, _)| path.ends_with(id.hex())).unwrap()
    };
    let (our_file, their_bytes) = (file(&ours).0, file(&theirs).1);
    std::fs::write(&our_file, their_bytes).unwrap();
    assert!(matches!(depot.manifest(&ours).await, Err(DepotError::Altered { .. })));
    assert!(open(dir.path()).await.manifest(&ours).await.unwrap().is_none());
    assert!(depot.manifest(&theirs).await.unwrap().is_some());
}

#[tokio::test]
async fn another_stores_depot_is_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    let id = save(&open(dir.path()).await, &lab()).await;
    let before = (files(dir.path(), "packs"), files(dir.path(), "checkpoints"));
    let other = Depot::open(dir.path().to_owned(), None, &[8; 32], None).unwrap();
    other.survey().await.unwrap();
    assert_eq!((other.totals(), other.manifest(&id).await.unwrap()), ((0, 0), None));
    other.collect(Duration::ZERO).await.unwrap();
    assert_eq!((files(dir.path(), "packs"), files(dir.path(), "checkpoints")), before);
}
