//! Checkpoints that somebody has had his hands on: cut, altered, another job's, an older one's. Whatever the depot
//! answers, nothing of it gets the name by which a shim would use it, and so criu never sees it.

#[allow(dead_code, reason = "each test binary uses its own part")]
#[path = "shim/world.rs"]
mod world;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};

use berth_agent::io::checkpoint::{Fetch, Order as Transfer, Said, Store, listen};
use berth_agent::shim::checkpoint::rpc::Message;
use berth_agent::task::{Order, Report, Saved, file};
use berth_protocol::checkpoint::Needs;
use berth_protocol::chunk::{ChunkId, Encoding, Frame, read_ids, write_ids};
use berth_protocol::ids::{Digest, PodId};
use berth_protocol::manifest::Manifest;
use berth_protocol::message::node::DepotAccess;
use berth_protocol::token::{self, Scope};
use berth_protocol::units::{Millis, Timestamp};
use world::*;

const MUTATIONS: u64 = 200;

/// A depot that believes everything, and gives what it was given, or what was put in its place.
#[derive(Default)]
struct Shelf {
    frames: BTreeMap<ChunkId, Vec<u8>>,
    manifests: BTreeMap<String, Vec<u8>>,
    /// Chunks fetched.
    asked: usize,
}

struct Depot {
    access: DepotAccess,
    shelf: Arc<Mutex<Shelf>>,
}

impl Depot {
    fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let shelf = Arc::new(Mutex::new(Shelf::default()));
        let own = shelf.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let shelf = own.clone();
                std::thread::spawn(move || while answer(&stream, &shelf).is_some() {});
            }
        });
        let expires = Timestamp(u64::MAX >> 12);
        Self { access: DepotAccess { url, token: "any".to_owned(), expires, tls: None, peer: None }, shelf }
    }
}

/// One request of a connection; `None`: it was closed.
fn answer(stream: &TcpStream, shelf: &Mutex<Shelf>) -> Option<()> {
    let mut reader = BufReader::new(stream);
    let mut line = String::new();
    reader.read_line(&mut line).ok()?;
    let mut words = line.split_whitespace().map(str::to_owned);
    let (method, path) = (words.next()?, words.next()?);
    let mut length = 0;
    loop {
        let mut header = String::new();
        reader.read_line(&mut header).ok()?;
        if header.trim().is_empty() {
            break;
        }
        if let Some(value) = header.to_ascii_lowercase().strip_prefix("content-length:") {
            length = value.trim().parse().unwrap();
        }
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body).ok()?;
    let mut shelf = shelf.lock().unwrap();
    let levels: Vec<&str> = path.split('/').skip(2).collect();
    let (status, text) = match (method.as_str(), &levels[..]) {
        ("POST", ["chunks", "lacking"]) => {
            let ids = read_ids(&body).unwrap();
            (200, write_ids(ids.iter().filter(|id| !shelf.frames.contains_key(*id))))
        }
        ("POST", ["chunks"]) => {
            let mut rest = &body[..];
            while let Ok((frame, length)) = Frame::read(rest) {
                shelf.frames.insert(frame.id, rest[..length].to_vec());
                rest = &rest[length..];
            }
            (201, Vec::new())
        }
        ("PUT", ["checkpoints", hex]) => {
            shelf.manifests.insert((*hex).to_owned(), body);
            (201, Vec::new())
        }
        ("GET", ["checkpoints", hex]) => match shelf.manifests.get(*hex) {
            Some(found) => (200, found.clone()),
            None => (404, Vec::new()),
        },
        ("POST", ["checkpoints", _, "chunks"]) => {
            let ids = read_ids(&body).unwrap();
            shelf.asked += ids.len();
            (200, ids.iter().flat_map(|id| shelf.frames.get(id).cloned().unwrap_or_default()).collect())
        }
        _ => (405, Vec::new()),
    };
    let head = format!("HTTP/1.1 {status} X\r\ncontent-length: {}\r\n\r\n", text.len());
    let mut stream = stream;
    stream.write_all(head.as_bytes()).ok()?;
    stream.write_all(&text).ok()
}

/// What the agent's own worker says last.
fn transfer(order: &Transfer) -> Said {
    let mut child = Command::new(env!("CARGO_BIN_EXE_berth-agent"))
        .arg("checkpoint")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(&serde_json::to_vec(order).unwrap()).unwrap();
    let output = child.wait_with_output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    serde_json::from_str(text.lines().last().expect("a word")).unwrap()
}

/// Seeded, so that a failure comes again (splitmix64).
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) % sides as u64) as usize
    }

    fn flip(&mut self, bytes: &mut [u8]) {
        let at = self.roll(bytes.len());
        bytes[at] ^= 1 << self.roll(8);
    }
}

struct Scene {
    depot: Depot,
    pod: Pod,
    tmp: tempfile::TempDir,
}

impl Scene {
    fn store(&self, dir: &Path, saved: &Saved) -> Digest {
        let task = &self.pod.task;
        let order = Transfer::Store(Box::new(Store {
            access: Some(self.depot.access.clone()),
            dir: dir.to_owned(),
            cache: self.tmp.path().join("none"),
            saved: saved.clone(),
            node: task.node.clone(),
            pod: task.pod.clone(),
            epoch: task.epoch,
            run: task.run,
            spec: Digest::of(b"spec"),
            template: task.template.clone(),
            images: vec![None],
            needs: Needs::default(),
            versions: BTreeMap::new(),
            rate: 0,
        }));
        match transfer(&order) {
            Said::Stored(info) => info.id,
            other => panic!("{other:?}"),
        }
    }

    fn fetch(&self, checkpoint: Digest, dir: &Path, cache: &Path) -> Said {
        self.bring(checkpoint, dir.to_owned(), None, cache)
    }

    /// Ahead of the pod, to be kept in the cache.
    fn stage(&self, checkpoint: Digest, cache: &Path) -> Said {
        let pod = Some(self.pod.task.pod.clone());
        self.bring(checkpoint, cache.join(checkpoint.hex()), pod, cache)
    }

    fn bring(&self, checkpoint: Digest, dir: PathBuf, keep: Option<PodId>, cache: &Path) -> Said {
        self.bring_from(self.depot.access.clone(), checkpoint, dir, keep, cache)
    }

    fn bring_from(
        &self,
        access: DepotAccess,
        checkpoint: Digest,
        dir: PathBuf,
        keep: Option<PodId>,
        cache: &Path,
    ) -> Said {
        transfer(&Transfer::Fetch(Box::new(Fetch {
            access,
            checkpoint,
            dir,
            keep,
            cache: cache.to_owned(),
            template: self.pod.task.template.clone(),
            images: vec![None],
            rate: 0,
        })))
    }

    fn dir(&self, name: &str) -> PathBuf {
        self.tmp.path().join(name)
    }
}

/// `cache` keeps the checkpoint, and the node there serves it.
fn chunks_come_from_another_node(
    scene: &Scene,
    cache: &Path,
    checkpoint: Digest,
    expected: &BTreeMap<String, Vec<u8>>,
) {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let served = scene.dir("served");
    copy(cache, &served);
    let manifest = scene.depot.shelf.lock().unwrap().manifests[&checkpoint.hex()].clone();
    fs::write(served.join(checkpoint.hex()).join("manifest.json"), manifest).unwrap();
    let server = runtime.block_on(listen(([127, 0, 0, 1], 0).into(), served.clone(), None)).unwrap();
    let expires = Timestamp(u64::MAX >> 12);
    let access = |checkpoint, secret: &[u8; 32]| {
        let token = token::mint(secret, &Scope::Load { checkpoint }, expires);
        let peer =
            Some(Box::new(DepotAccess { url: server.url.clone(), token, expires, tls: None, peer: None }));
        DepotAccess { peer, ..scene.depot.access.clone() }
    };
    let fetched = |access, name: &str| {
        let (dir, nothing) = (scene.dir(name), scene.dir("nothing"));
        scene.depot.shelf.lock().unwrap().asked = 0;
        assert_eq!(scene.bring_from(access, checkpoint, dir.clone(), None, &nothing), Said::Fetched);
        assert!(tree(&dir) == *expected, "{name}");
        fs::remove_dir_all(&dir).unwrap();
        scene.depot.shelf.lock().unwrap().asked
    };
    let right = access(checkpoint, &server.secret);
    assert_eq!(fetched(right.clone(), "by a node"), 0, "the depot was not asked");
    // It gives nothing to whoever has another's token, or another checkpoint's; the depot does.
    let whole = fetched(access(checkpoint, &[0; 32]), "a forged token");
    assert!(whole > 0);
    assert_eq!(fetched(access(Digest::of(b"x"), &server.secret), "of another"), whole);
    // What it gives is held against its name.
    let pages = served.join(checkpoint.hex()).join("containers/main/images/pages-1.img");
    let length = fs::metadata(&pages).unwrap().len();
    fs::write(&pages, vec![7; length as usize]).unwrap();
    assert!(fetched(right.clone(), "altered") > 0);
    runtime.shutdown_background();
    assert_eq!(fetched(right, "gone"), whole);
}

fn copy(from: &Path, to: &Path) {
    assert!(Command::new("cp").arg("-a").args([from, to]).status().unwrap().success());
}

fn tree(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut found = BTreeMap::new();
    let mut dirs = vec![dir.to_owned()];
    while let Some(next) = dirs.pop() {
        for entry in fs::read_dir(next).unwrap().flatten() {
            match entry.path() {
                path if path.is_dir() => dirs.push(path),
                path => {
                    let name = path.strip_prefix(dir).unwrap().display().to_string();
                    found.insert(name, fs::read(path).unwrap());
                }
            }
        }
    }
    found
}

/// `core-9.img` of a thread that the job's own container could never be.
fn stronger_thread(variant: usize) -> Vec<u8> {
    let (mut creds, mut thread, mut core) = (Message::default(), Message::default(), Message::default());
    for field in [1, 3, 5, 7] {
        creds.number(field, 0);
    }
    let powers = if variant == 0 { u64::MAX } else { 0 };
    for set in 10..=12 {
        creds.number(set, powers & 0xffff_ffff).number(set, powers >> 32);
    }
    creds.number(18, u64::from(variant != 1));
    thread.message(10, &creds).number(11, if variant == 2 { 0 } else { 2 });
    core.number(1, 1).message(5, &thread);
    let bytes = if variant == 3 { b"\xff\xff\xff".to_vec() } else { core.as_bytes().to_vec() };
    let mut image = vec![0; 8];
    image.extend_from_slice(&(bytes.len() as u32).to_le_bytes());
    image.extend_from_slice(&bytes);
    image
}

/// The manifest of another job, or of none, with a digest of its own.
fn foreign(manifest: &Manifest, dice: &mut Dice) -> (Digest, Vec<u8>) {
    let mut other = manifest.clone();
    match dice.roll(7) {
        0 => other.template.containers[0].command = shell("id"),
        1 => other.template.containers[0].user = Some("0".to_owned()),
        2 => drop(other.template.containers[0].capabilities.insert("SYS_ADMIN".to_owned())),
        3 => other.template.network = berth_protocol::job::Network::Host,
        4 => other.template.namespace = berth_protocol::ids::Namespace::parse("other").unwrap(),
        5 => other.containers[0].dump.retain(|file| !file.name.starts_with("core-")),
        _ => other.containers[0].dump.retain(|file| file.name != "saved.json"),
    }
    other.render().unwrap()
}

#[test]
fn two_hundred_hands_are_laid_on_checkpoints_and_each_is_refused() {
    let criu = Path::new(env!("CARGO_BIN_EXE_berth-agent")).parent().unwrap().join("criu/criu");
    if !Command::new(&criu).arg("check").output().is_ok_and(|output| output.status.success()) {
        // Counted by the tests of checkpoints themselves.
        return;
    }
    let mut pod = Pod::new("i=0; while :; do i=$((i+1)); echo $i; sleep 0.005; done");
    pod.task.criu = Some(criu);
    let mut agent = pod.start();
    agent.running();
    let mut scene = Scene { depot: Depot::start(), pod, tmp: tempfile::tempdir().unwrap() };
    let mut stored = Vec::new();
    for level in 1..=2 {
        agent.order(&Order::Save { level, hold: level == 2 });
        let saved = agent.until(|report| match report {
            Report::Saved { saved, .. } => Some(saved),
            Report::SaveFailed { why, .. } => panic!("{why}"),
            _ => None,
        });
        let dir = scene.pod.dir.join(file::CHECKPOINTS_DIR).join(level.to_string());
        stored.push((scene.store(&dir, &saved), dir, saved));
    }
    agent.order(&Order::Stop { grace: Millis::ZERO });
    agent.exited();
    scene.pod.wait();
    let (older, newer) = (stored[0].0, stored[1].0);
    let none = scene.dir("none");
    let right = scene.dir("right");
    assert_eq!(scene.fetch(newer, &right, &none), Said::Fetched);
    let expected = tree(&right);

    let bytes = |id: &Digest| scene.depot.shelf.lock().unwrap().manifests[&id.hex()].clone();
    let manifest = Manifest::parse(&newer, &bytes(&newer)).unwrap();
    let ids: Vec<ChunkId> = manifest.chunks().map(|(id, _)| id).collect();
    let mut dice = Dice(85);
    let mut harmless = 0;
    for n in 0..MUTATIONS {
        let mut asked = newer;
        let (frames, manifests) = {
            let shelf = scene.depot.shelf.lock().unwrap();
            (shelf.frames.clone(), shelf.manifests.clone())
        };
        let id = ids[dice.roll(ids.len())];
        let mut altered = frames[&id].clone();
        let mut written = manifests[&newer.hex()].clone();
        match n % 9 {
            0 => written.truncate(dice.roll(written.len())),
            1 => dice.flip(&mut written),
            2 => written = manifests[&older.hex()].clone(),
            3 => {
                let (digest, bytes) = foreign(&manifest, &mut dice);
                (asked, written) = (digest, bytes);
            }
            4 => dice.flip(&mut altered),
            5 => altered.truncate(dice.roll(altered.len())),
            6 => {
                let others: Vec<_> = frames.iter().filter(|(other, _)| **other != id).collect();
                altered = others[dice.roll(others.len())].1.clone();
            }
            7 => {
                // What it should be as long as, and is not.
                let (frame, _) = Frame::read(&frames[&id]).unwrap();
                let content = vec![n as u8; frame.content_bytes as usize];
                let content_bytes = frame.content_bytes;
                altered = Vec::new();
                Frame { id, encoding: Encoding::Raw, content_bytes, bytes: &content }.write(&mut altered);
            }
            _ => {
                // All digests right, and in it what no container of the job's may be.
                let (_, dir, saved) = &stored[1];
                let image = dir.join("containers/main/images/core-9.img");
                fs::write(&image, stronger_thread(dice.roll(4))).unwrap();
                // What was said of it before would be said again.
                fs::remove_file(dir.join("manifest.json")).unwrap();
                asked = scene.store(dir, saved);
                fs::remove_file(image).unwrap();
                let shelf = scene.depot.shelf.lock().unwrap();
                written = shelf.manifests[&asked.hex()].clone();
            }
        }
        {
            let mut shelf = scene.depot.shelf.lock().unwrap();
            shelf.manifests.insert(asked.hex(), written);
            shelf.frames.insert(id, altered);
        }
        let dir = scene.dir(&format!("{n}"));
        match scene.fetch(asked, &dir, &none) {
            Said::Failed { .. } => assert!(!dir.exists(), "mutation {n} left what a shim would use"),
            // A bit of a compressed chunk that stands for nothing.
            Said::Fetched if n % 9 == 4 => {
                assert!(tree(&dir) == expected, "mutation {n} came through");
                harmless += 1;
            }
            other => panic!("mutation {n}: {other:?}"),
        }
        let mut shelf = scene.depot.shelf.lock().unwrap();
        (shelf.frames, shelf.manifests) = (frames, manifests);
    }
    assert!(harmless * 20 < MUTATIONS, "{harmless} mutations changed nothing");

    // Of the checkpoint before, kept here, comes what is the same, and nothing that is not what its name says.
    let before = scene.pod.dir.join(file::CHECKPOINTS_DIR).join("before");
    let kept = before.join(older.hex());
    fs::create_dir(&before).unwrap();
    fs::rename(&stored[0].1, &kept).unwrap();
    // What is taken over of it is gone from it.
    let altered_before = scene.pod.dir.join(file::CHECKPOINTS_DIR).join("altered-before");
    copy(&before, &altered_before);
    let asked = || std::mem::take(&mut scene.depot.shelf.lock().unwrap().asked);
    asked();
    let distinct = ids.iter().collect::<BTreeSet<_>>().len();
    let whole = scene.dir("whole");
    assert_eq!(scene.fetch(newer, &whole, &before), Said::Fetched);
    assert!(tree(&whole) == expected);
    let lacked = asked();
    // On a busy machine more of so small a process has changed than half.
    assert!(lacked * 3 < distinct * 2, "{lacked} of {distinct} chunks were fetched again");
    let pages = altered_before.join(older.hex()).join("containers/main/images/pages-1.img");
    let length = fs::metadata(&pages).unwrap().len();
    fs::write(&pages, vec![7; length as usize]).unwrap();
    let whole = scene.dir("whole-again");
    assert_eq!(scene.fetch(newer, &whole, &altered_before), Said::Fetched);
    assert!(tree(&whole) == expected, "altered chunks were used");
    assert!(asked() > lacked);

    // One that was brought ahead of the pod serves as well, and is brought once.
    let ahead = scene.dir("ahead");
    fs::create_dir(&ahead).unwrap();
    asked();
    assert_eq!(scene.stage(older, &ahead), Said::Fetched);
    assert!(asked() > lacked);
    assert_eq!(scene.stage(older, &ahead), Said::Fetched);
    assert_eq!(asked(), 0);
    let whole = scene.dir("behind");
    assert_eq!(scene.fetch(newer, &whole, &ahead), Said::Fetched);
    assert!(tree(&whole) == expected);
    assert_eq!(asked(), lacked);
    assert_eq!(fs::read_dir(&ahead).unwrap().count(), 1, "nothing half-made is left");

    // What the node has kept is looked at as closely.
    let kept = none.join(newer.hex());
    fs::create_dir_all(&none).unwrap();
    fs::rename(&right, &kept).unwrap();
    chunks_come_from_another_node(&scene, &none, newer, &expected);
    let image = kept.join("containers/main/images/pstree.img");
    let mut altered = fs::read(&image).unwrap();
    dice.flip(&mut altered);
    fs::write(&image, altered).unwrap();
    // And after all that the right one still starts.
    let mut next = scene.pod.next_epoch();
    next.task.restore = true;
    let dir = next.dir.join(file::RESTORE_DIR);
    assert_eq!(scene.fetch(newer, &dir, &none), Said::Fetched);
    assert!(tree(&dir) == expected, "the altered copy was used");
    let mut agent = next.start();
    agent.running();
    agent.order(&Order::Stop { grace: Millis::ZERO });
    agent.exited();
    next.wait();
    fs::remove_dir_all(scene.pod.dir.join(file::CHECKPOINTS_DIR)).unwrap();
    scene.pod.assert_clean();
}
