//! The store against a model, against `kill -9`, and on a full disk.

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead as _, BufReader};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use berth_controller::io::store::{self, Op, Sqlite, Store, StoreChoice, StoreError};
use berth_protocol::ids::{ClusterName, Term};
use proptest::prelude::*;

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap()
}

fn put(key: &str, value: &[u8]) -> Op {
    Op::Put { key: key.to_owned(), value: value.to_vec() }
}

#[derive(Debug, Clone)]
enum Action {
    Txn(Vec<Op>),
    Campaign,
    Reopen,
}

fn action() -> impl Strategy<Value = Action> {
    let key = || prop::sample::select(vec!["a", "a/1", "a/2", "b/é", "b/\u{10FFFE}"]).prop_map(str::to_owned);
    let op = prop_oneof![
        (key(), prop::collection::vec(any::<u8>(), 0..20)).prop_map(|(key, value)| Op::Put { key, value }),
        key().prop_map(|key| Op::Delete { key }),
    ];
    prop_oneof![
        8 => prop::collection::vec(op, 0..4).prop_map(Action::Txn),
        1 => Just(Action::Campaign),
        1 => Just(Action::Reopen),
    ]
}

/// Of a store and of a map the same is asked, and the same is found.
async fn compare(mut open: impl AsyncFnMut() -> Store, actions: Vec<Action>) {
    let mut store = open().await;
    let identity = store.identity().clone();
    let mut model: BTreeMap<String, Option<Vec<u8>>> = BTreeMap::new();
    let mut term = store.campaign().await.unwrap();
    for action in actions {
        match action {
            Action::Txn(ops) => {
                // Of several changes of a key the last one counts, as in the controller's loop.
                let ops: BTreeMap<String, Op> = ops
                    .into_iter()
                    .map(|op| match &op {
                        Op::Put { key, .. } | Op::Delete { key } => (key.clone(), op),
                    })
                    .collect();
                store.txn(term, ops.values().cloned().collect()).await.unwrap();
                for (key, op) in ops {
                    match op {
                        Op::Put { value, .. } => drop(model.insert(key, Some(value))),
                        Op::Delete { .. } => drop(model.remove(&key)),
                    }
                }
            }
            Action::Campaign => {
                let old = term;
                store.resign().await;
                term = store.campaign().await.unwrap();
                assert_eq!(term, old.next());
                let late = store.txn(old, vec![put("a", b"late")]).await;
                assert!(matches!(late, Err(StoreError::Deposed(deposed)) if deposed == old));
            }
            Action::Reopen => {
                store.resign().await;
                drop(store);
                store = open().await;
                assert_eq!(store.identity(), &identity);
                let old = term;
                term = store.campaign().await.unwrap();
                assert_eq!(term, old.next());
            }
        }
    }
    assert_eq!(store.list().await.unwrap(), model.into_iter().collect::<Vec<_>>());
    store.resign().await;
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, ..ProptestConfig::default() })]

    #[test]
    fn it_does_what_a_map_does(actions in prop::collection::vec(action(), 1..30)) {
        let dir = tempfile::tempdir().unwrap();
        let open = async || Store::Embedded(Sqlite::open(dir.path()).unwrap());
        runtime().block_on(compare(open, actions));
    }
}

#[test]
fn a_second_controller_is_told_to_go_away() {
    let dir = tempfile::tempdir().unwrap();
    let first = Sqlite::open(dir.path()).unwrap();
    let Err(error) = Sqlite::open(dir.path()) else { panic!("two have it open") };
    assert!(matches!(error, StoreError::Locked { .. }), "{error}");
    drop(first);
    Sqlite::open(dir.path()).unwrap();
}

#[test]
fn transactions_at_once_share_commits_and_a_backup_is_whole() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("backup.sqlite");
    runtime().block_on(async {
        let store = Arc::new(Sqlite::open(&dir.path().join("a")).unwrap());
        let term = store.campaign().await.unwrap();
        let tasks: Vec<_> = (0..500)
            .map(|n| {
                let store = store.clone();
                tokio::spawn(async move { store.txn(term, vec![put(&format!("k/{n:03}"), b"v")]).await })
            })
            .collect();
        for task in tasks {
            task.await.unwrap().unwrap();
        }
        let embedded = StoreChoice::Embedded;
        let contents = store::read(&embedded, &dir.path().join("a"), &cluster()).await.unwrap();
        assert_eq!((contents.term, contents.entries.len()), (term, 500));
        store::write(&file, &contents).unwrap();
        assert_eq!(store::read_file(&file).unwrap(), contents);
        assert_eq!(contents.identity, *store.identity());
    });
}

fn cluster() -> ClusterName {
    ClusterName::parse("lab").unwrap()
}

/// A store of 200 records, as its file.
fn filled(dir: &Path) -> PathBuf {
    runtime().block_on(async {
        let store = Sqlite::open(dir).unwrap();
        let term = store.campaign().await.unwrap();
        let ops = (0..200).map(|n| put(&format!("{n:04}"), &[n; 500])).collect();
        store.txn(term, ops).await.unwrap();
    });
    dir.join("store.sqlite")
}

/// As under systemd, where the controller's user is made up for it, and whoever administers is root.
#[test]
fn a_restored_store_belongs_to_whom_its_directory_belongs() {
    let dir = tempfile::tempdir().unwrap();
    let file = filled(dir.path());
    let (uid, gid) = (65_182, 65_183);
    if std::os::unix::fs::chown(dir.path(), Some(uid), Some(gid)).is_err() {
        eprintln!("SKIPPED: only root can give files away");
        return;
    }
    let contents = store::read_file(&file).unwrap();
    store::replace(dir.path(), &contents).unwrap();
    let restored = fs::metadata(&file).unwrap();
    assert_eq!((restored.uid(), restored.gid()), (uid, gid));
}

/// What is found of the 200: keys, and which of them are damaged.
async fn found(dir: &Path) -> Result<(usize, Vec<String>), StoreError> {
    let entries = Sqlite::open(dir)?.list().await?;
    let damaged = entries.iter().filter(|(_, value)| value.is_none()).map(|(key, _)| key.clone()).collect();
    Ok((entries.len(), damaged))
}

#[test]
fn one_changed_bit_is_found_and_costs_one_record() {
    let dir = tempfile::tempdir().unwrap();
    let file = filled(dir.path());
    let mut bytes = fs::read(&file).unwrap();
    // Wherever its value is, or once was.
    let places: Vec<usize> =
        (0..bytes.len() - 500).filter(|at| bytes[*at..].starts_with(&[77; 500])).collect();
    assert!(!places.is_empty());
    places.into_iter().for_each(|at| bytes[at] ^= 1);
    fs::write(&file, bytes).unwrap();
    let (records, damaged) = runtime().block_on(found(dir.path())).unwrap();
    assert_eq!((records, damaged), (200, vec!["0077".to_owned()]));
}

#[test]
fn a_damaged_page_is_refused_and_what_is_around_it_salvaged() {
    let dir = tempfile::tempdir().unwrap();
    let file = filled(dir.path());
    let mut bytes = fs::read(&file).unwrap();
    let middle = bytes.len() / 2 / 4096 * 4096;
    bytes[middle..middle + 4096].fill(0xa5);
    fs::write(&file, bytes).unwrap();
    let error = runtime().block_on(found(dir.path())).unwrap_err();
    assert!(matches!(error, StoreError::Damaged { .. }), "{error}");
    assert!(!store::structure(dir.path()).unwrap().is_empty());
    let salvaged = store::salvage(dir.path()).unwrap();
    let kept = salvaged.entries.len();
    assert!((150..200).contains(&kept), "{kept} of 200");
    let before = store::replace(dir.path(), &salvaged).unwrap().expect("the damaged file is kept");
    assert!(before.exists());
    assert_eq!(runtime().block_on(found(dir.path())).unwrap(), (kept, Vec::new()));
    assert!(store::structure(dir.path()).unwrap().is_empty());
}

/// As the version before checksums left it.
#[test]
fn a_store_of_the_first_layout_is_brought_up_to_date() {
    let dir = tempfile::tempdir().unwrap();
    let secret = [9_u8; 32];
    let old = rusqlite::Connection::open(dir.path().join("store.sqlite")).unwrap();
    old.execute_batch(
        "CREATE TABLE entry (key TEXT PRIMARY KEY, value BLOB NOT NULL, revision INTEGER NOT NULL) WITHOUT ROWID;
         CREATE TABLE leader (store TEXT NOT NULL, secret BLOB NOT NULL, term INTEGER NOT NULL, revision INTEGER NOT NULL);
         INSERT INTO entry VALUES ('job/a', X'7b7d', 3);
         PRAGMA user_version = 1;",
    )
    .unwrap();
    old.execute("INSERT INTO leader VALUES ('store-1', ?1, 41, 3)", [secret]).unwrap();
    drop(old);
    runtime().block_on(async {
        for term in [42, 43] {
            let store = Sqlite::open(dir.path()).unwrap();
            assert_eq!((store.identity().id.as_str(), store.identity().secret), ("store-1", secret));
            assert_eq!(store.campaign().await.unwrap(), Term(term));
            assert_eq!(store.list().await.unwrap(), [("job/a".to_owned(), Some(b"{}".to_vec()))]);
        }
    });
}

/// The child of the next test: writes, and says each number once it is durable.
#[test]
fn child_that_writes() {
    let Some(dir) = std::env::var_os("BERTH_TEST_STORE") else { return };
    runtime().block_on(async {
        let store = Sqlite::open(Path::new(&dir)).unwrap();
        let first = store.list().await.unwrap().len();
        let term = store.campaign().await.unwrap();
        for n in first.. {
            store.txn(term, vec![put(&format!("{n:08}"), &[1; 200])]).await.unwrap();
            println!("durable {n}");
        }
    });
}

#[test]
fn what_was_acknowledged_survives_kill_9() {
    let dir = tempfile::tempdir().unwrap();
    let mut acknowledged = 0;
    for round in 0..15 {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "child_that_writes", "--nocapture"])
            .env("BERTH_TEST_STORE", dir.path())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines().map_while(Result::ok);
        let mut durable =
            lines.by_ref().filter_map(|line| line.strip_prefix("durable ")?.parse::<usize>().ok());
        acknowledged = durable.nth(20 + 7 * round).expect("the child writes") + 1;
        child.kill().unwrap();
        // What it said before the signal came counts as well.
        acknowledged = durable.last().map_or(acknowledged, |last| last + 1);
        child.wait().unwrap();
    }
    let store = Sqlite::open(dir.path()).unwrap();
    let entries = runtime().block_on(store.list()).unwrap();
    assert!(entries.len() >= acknowledged, "{} of {acknowledged} are there", entries.len());
    assert!(entries.iter().enumerate().all(|(n, (key, _))| *key == format!("{n:08}")), "without gaps");
}

#[test]
fn a_full_disk_is_an_error_and_what_was_answered_stays() {
    let dir = tempfile::tempdir().unwrap();
    let mount = |arguments: &[&str]| {
        Command::new("mount").args(arguments).arg(dir.path()).status().is_ok_and(|status| status.success())
    };
    if !mount(&["-t", "tmpfs", "-o", "size=1m", "tmpfs"]) {
        eprintln!("SKIPPED: cannot mount a tmpfs here");
        return;
    }
    struct Unmount<'a>(&'a Path);
    impl Drop for Unmount<'_> {
        fn drop(&mut self) {
            let _ = Command::new("umount").arg("-l").arg(self.0).status();
        }
    }
    let _unmount = Unmount(dir.path());
    runtime().block_on(async {
        let store = Sqlite::open(dir.path()).unwrap();
        let term = store.campaign().await.unwrap();
        let mut answered = 0;
        let error = loop {
            match store.txn(term, vec![put(&format!("{answered:08}"), &[9; 8000])]).await {
                Ok(_) => answered += 1,
                Err(error) => break error,
            }
            assert!(answered < 1000);
        };
        let chain = berth_protocol::chain::chain(&error);
        assert!(chain.contains("full") || chain.contains("I/O"), "{chain}");
        let after = tokio::time::timeout(Duration::from_secs(5), store.txn(term, vec![put("x", b"")])).await;
        assert!(after.unwrap().is_err(), "nothing is answered any more");
        drop(store);
        assert!(mount(&["-o", "remount,size=8m"]));
        let store = Sqlite::open(dir.path()).unwrap();
        assert!(store.list().await.unwrap().len() >= answered);
    });
}
