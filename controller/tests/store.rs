//! The store against a model, against `kill -9`, and on a full disk.

use std::collections::BTreeMap;
use std::io::{BufRead as _, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use berth_controller::io::store::{Compare, Op, Store, StoreError};
use berth_protocol::ids::Term;
use proptest::prelude::*;

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap()
}

fn put(key: &str, value: &[u8]) -> Op {
    Op::Put { key: key.to_owned(), value: value.to_vec() }
}

#[derive(Debug, Clone)]
enum Action {
    Txn { expect: Option<(String, bool)>, ops: Vec<Op> },
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
        8 => (prop::option::of((key(), any::<bool>())), prop::collection::vec(op, 0..4))
            .prop_map(|(expect, ops)| Action::Txn { expect, ops }),
        1 => Just(Action::Campaign),
        1 => Just(Action::Reopen),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, ..ProptestConfig::default() })]

    #[test]
    fn it_does_what_a_map_does(actions in prop::collection::vec(action(), 1..30)) {
        runtime().block_on(async {
            let dir = tempfile::tempdir().unwrap();
            let mut store = Store::open(dir.path()).unwrap();
            let (id, secret) = (store.id().clone(), *store.secret());
            let mut model: BTreeMap<String, (Vec<u8>, u64)> = BTreeMap::new();
            let (mut revision, mut term) = (0, Term(0));
            for action in actions {
                match action {
                    Action::Txn { expect, ops } => {
                        let compare = expect.map(|(key, right)| {
                            let is = model.get(&key).map_or(0, |(_, revision)| *revision);
                            (right, Compare::Revision { key, is: if right { is } else { is + 1 } })
                        });
                        let holds = compare.as_ref().is_none_or(|(right, _)| *right);
                        let compares = compare.into_iter().map(|(_, compare)| compare);
                        let compares = compares.chain([Compare::Term(term)]).collect();
                        let result = store.txn(compares, ops.clone()).await;
                        if !holds {
                            assert!(matches!(result, Err(StoreError::Conflict(_))));
                            continue;
                        }
                        revision += u64::from(!ops.is_empty());
                        assert_eq!(result.unwrap(), revision);
                        for op in ops {
                            match op {
                                Op::Put { key, value } => drop(model.insert(key, (value, revision))),
                                Op::Delete { key } => drop(model.remove(&key)),
                            }
                        }
                    }
                    Action::Campaign => {
                        let old = term;
                        term = store.campaign().await.unwrap();
                        assert_eq!(term, old.next());
                        let late = store.txn(vec![Compare::Term(old)], vec![put("a", b"late")]).await;
                        assert!(matches!(late, Err(StoreError::Conflict(Compare::Term(t))) if t == old));
                    }
                    Action::Reopen => {
                        drop(store);
                        store = Store::open(dir.path()).unwrap();
                        assert_eq!((store.id(), store.secret()), (&id, &secret));
                    }
                }
            }
            for prefix in ["", "a", "a/", "b/", "c"] {
                let listing = store.list(prefix).await.unwrap();
                let expected = model.iter().filter(|(key, _)| key.starts_with(prefix));
                let expected: Vec<_> = expected.map(|(key, (value, _))| (key.clone(), value.clone())).collect();
                assert_eq!((listing.revision, listing.entries), (revision, expected));
            }
        });
    }
}

#[test]
fn a_second_controller_is_told_to_go_away() {
    let dir = tempfile::tempdir().unwrap();
    let first = Store::open(dir.path()).unwrap();
    let Err(error) = Store::open(dir.path()) else { panic!("two have it open") };
    assert!(matches!(error, StoreError::Locked { .. }), "{error}");
    drop(first);
    Store::open(dir.path()).unwrap();
}

#[test]
fn transactions_at_once_share_commits_and_a_backup_is_whole() {
    let dir = tempfile::tempdir().unwrap();
    runtime().block_on(async {
        let store = std::sync::Arc::new(Store::open(&dir.path().join("a")).unwrap());
        let tasks: Vec<_> = (0..500)
            .map(|n| {
                let store = store.clone();
                tokio::spawn(
                    async move { store.txn(Vec::new(), vec![put(&format!("k/{n:03}"), b"v")]).await },
                )
            })
            .collect();
        for task in tasks {
            task.await.unwrap().unwrap();
        }
        std::fs::create_dir(dir.path().join("b")).unwrap();
        store.backup(&dir.path().join("b/store.sqlite")).unwrap();
        let copy = Store::open(&dir.path().join("b")).unwrap();
        assert_eq!(copy.list("").await.unwrap(), store.list("").await.unwrap());
        assert_eq!(copy.id(), store.id());
    });
}

#[test]
fn a_damaged_file_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    runtime().block_on(async {
        let store = Store::open(dir.path()).unwrap();
        let ops = (0..200).map(|n| put(&format!("{n:04}"), &[7; 500])).collect();
        store.txn(Vec::new(), ops).await.unwrap();
    });
    let file = dir.path().join("store.sqlite");
    let mut bytes = std::fs::read(&file).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle..middle + 4096].fill(0xa5);
    std::fs::write(&file, bytes).unwrap();
    let Err(error) = Store::open(dir.path()) else { panic!("it opened") };
    assert!(matches!(error, StoreError::Damaged { .. } | StoreError::Sqlite { .. }), "{error}");
}

/// The child of the next test: writes, and says each number once it is durable.
#[test]
fn child_that_writes() {
    let Some(dir) = std::env::var_os("BERTH_TEST_STORE") else { return };
    runtime().block_on(async {
        let store = Store::open(Path::new(&dir)).unwrap();
        let first = store.list("").await.unwrap().entries.len();
        for n in first.. {
            store.txn(Vec::new(), vec![put(&format!("{n:08}"), &[1; 200])]).await.unwrap();
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
    let store = Store::open(dir.path()).unwrap();
    let entries = runtime().block_on(store.list("")).unwrap().entries;
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
        let store = Store::open(dir.path()).unwrap();
        let mut answered = 0;
        let error = loop {
            match store.txn(Vec::new(), vec![put(&format!("{answered:08}"), &[9; 8000])]).await {
                Ok(_) => answered += 1,
                Err(error) => break error,
            }
            assert!(answered < 1000);
        };
        let chain = berth_controller::run::chain(&error);
        assert!(chain.contains("full") || chain.contains("I/O"), "{chain}");
        let after =
            tokio::time::timeout(Duration::from_secs(5), store.txn(Vec::new(), vec![put("x", b"")])).await;
        assert!(after.unwrap().is_err(), "nothing is answered any more");
        drop(store);
        assert!(mount(&["-o", "remount,size=8m"]));
        let store = Store::open(dir.path()).unwrap();
        assert!(store.list("").await.unwrap().entries.len() >= answered);
    });
}
