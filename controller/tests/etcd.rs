//! The store in a real etcd: who leads, what a deposed leader may do, transactions larger than etcd takes at once.

#[path = "etcd/line.rs"]
mod line;
#[path = "../../tests/src/etcd.rs"]
mod members;
#[path = "../../tests/src/ports.rs"]
mod ports;

use std::path::{Path, PathBuf};

use berth_controller::io::store::{self, Entries, Op, Store, StoreChoice, StoreError};
use berth_protocol::ids::{ClusterName, Term};
use line::Line;
use members::{Etcd, Tls};
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair};
use tempfile::TempDir;

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap()
}

fn put(key: &str, value: &[u8]) -> Op {
    Op::Put { key: key.to_owned(), value: value.to_vec() }
}

fn delete(key: &str) -> Op {
    Op::Delete { key: key.to_owned() }
}

fn cluster() -> ClusterName {
    ClusterName::parse("lab").unwrap()
}

/// Three members, and directories for controllers.
struct Ground {
    etcd: Etcd,
    dir: TempDir,
}

impl Ground {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        Self { etcd: Etcd::start(3, dir.path(), None), dir }
    }

    fn choice(&self) -> StoreChoice {
        StoreChoice::parse(&self.etcd.url()).unwrap()
    }

    fn data(&self, controller: &str) -> std::path::PathBuf {
        self.dir.path().join(controller)
    }

    async fn open(&self, controller: &str) -> Store {
        Store::open(&self.choice(), &self.data(controller), &cluster()).await.unwrap()
    }

    /// A leader that reaches one member alone, and that by a line.
    async fn lead_over_a_line(&self) -> (Line, Store, Term) {
        let line = Line::to(&self.etcd.members[0]);
        let choice = StoreChoice::parse(&members::url([line.address.as_str()].into_iter())).unwrap();
        let mut leader = Store::open(&choice, &self.data("a"), &cluster()).await.unwrap();
        let term = leader.campaign().await.unwrap();
        (line, leader, term)
    }

    async fn client(&self) -> etcd_client::Client {
        etcd_client::Client::connect(&self.etcd.members, None).await.unwrap()
    }
}

fn entries(of: &[(&str, &[u8])]) -> Entries {
    of.iter().map(|(key, value)| ((*key).to_owned(), Some(value.to_vec()))).collect()
}

#[test]
fn one_leads_and_a_deposed_leader_writes_nothing() {
    let ground = Ground::new();
    runtime().block_on(async {
        let mut first = ground.open("a").await;
        let term = first.campaign().await.unwrap();
        first.txn(term, vec![put("job/a", b"1"), put("job/b", b"2")]).await.unwrap();
        first.txn(term, vec![put("job/a", b"3"), delete("job/b")]).await.unwrap();
        first.leads().await.unwrap();

        // Another stands by for as long as the lease is renewed: it does not lead now, nor after the lease's time.
        let mut second = ground.open("b").await;
        assert_eq!(second.identity(), first.identity());
        let standing_by = tokio::time::timeout(std::time::Duration::from_secs(4), second.campaign()).await;
        assert!(standing_by.is_err(), "two lead");

        // An operator's hand, or a lease that ran out while the first was cut off: it still believes that it leads.
        ground.client().await.delete("/berth/lab/leader", None).await.unwrap();
        assert_eq!(second.campaign().await.unwrap(), term.next());
        let late = first.txn(term, vec![put("job/a", b"late")]).await;
        assert!(matches!(late, Err(StoreError::Deposed(deposed)) if deposed == term), "{late:?}");
        let large = (0..300).map(|n| put(&format!("late/{n}"), b"late")).collect();
        assert!(matches!(first.txn(term, large).await, Err(StoreError::Deposed(_))));
        assert_eq!(second.list().await.unwrap(), entries(&[("job/a", b"3")]));
    });
}

#[test]
fn a_leader_that_resigns_or_is_gone_is_followed() {
    let ground = Ground::new();
    runtime().block_on(async {
        let mut first = ground.open("a").await;
        let mut second = ground.open("b").await;
        assert_eq!(first.campaign().await.unwrap(), Term(1));
        first.resign().await;
        assert_eq!(second.campaign().await.unwrap(), Term(2));
        assert!(matches!(first.deposed().await, StoreError::Deposed(Term(1))));
        // Gone without a word: its lease runs out.
        drop(second);
        assert_eq!(first.campaign().await.unwrap(), Term(3));
    });
}

#[test]
fn a_large_transaction_happens_whole() {
    let ground = Ground::new();
    runtime().block_on(async {
        let mut leader = ground.open("a").await;
        let term = leader.campaign().await.unwrap();
        leader.txn(term, vec![put("x/gone", b"")]).await.unwrap();
        // Larger than one request by its count and by its bytes.
        let value = |n: usize| vec![n as u8; 30_000];
        let ops = (0..200).map(|n| put(&format!("x/{n:03}"), &value(n))).chain([delete("x/gone")]);
        leader.txn(term, ops.collect()).await.unwrap();
        let all: Entries = (0..200).map(|n| (format!("x/{n:03}"), Some(value(n)))).collect();
        assert_eq!(leader.list().await.unwrap(), all);
        let left = etcd_client::GetOptions::new().with_prefix();
        assert_eq!(ground.client().await.get("/berth/lab/journal/", Some(left)).await.unwrap().count(), 0);
    });
}

/// As a leader leaves it that dies with its journal written: whole, or but for its end.
#[test]
fn a_journal_is_completed_by_the_next_leader_if_it_was_written_whole() {
    for whole in [true, false] {
        let ground = Ground::new();
        runtime().block_on(async {
            let mut leader = ground.open("a").await;
            let term = leader.campaign().await.unwrap();
            let large: Vec<Op> = (0..300).map(|n| put(&format!("x/{n:03}"), &[7; 20])).collect();
            leader.txn(term, large.clone()).await.unwrap();
            let stored = ground.client().await.get("/berth/lab/entry/x/007", None).await.unwrap();
            let bytes: Vec<u8> = ["x/007", "x/500"]
                .iter()
                .flat_map(|key| {
                    // `x/500` is sealed as `x/007`: what was written down is taken as it is, and found to be damaged.
                    let value = stored.kvs()[0].value();
                    let lengths = [(key.len() as u32).to_le_bytes(), (value.len() as u32).to_le_bytes()];
                    [&lengths[0][..], key.as_bytes(), &lengths[1], value].concat()
                })
                .collect();
            let mut client = ground.client().await;
            client.delete("/berth/lab/entry/x/007", None).await.unwrap();
            client.put("/berth/lab/journal/000000", bytes, None).await.unwrap();
            if whole {
                client.put("/berth/lab/journal/end", "1", None).await.unwrap();
                // Who reads before it is carried out sees it carried out.
                let seen = store::read(&ground.choice(), Path::new("/"), &cluster()).await.unwrap();
                assert!(seen.entries.contains(&("x/007".to_owned(), Some(vec![7; 20]))));
            }
            leader.resign().await;
            leader.campaign().await.unwrap();
            let entries = leader.list().await.unwrap();
            assert_eq!(entries.contains(&("x/007".to_owned(), Some(vec![7; 20]))), whole);
            assert_eq!(entries.contains(&("x/500".to_owned(), None)), whole);
            let left = etcd_client::GetOptions::new().with_prefix();
            assert_eq!(client.get("/berth/lab/journal/", Some(left)).await.unwrap().count(), 0);
        });
    }
}

#[test]
fn a_write_that_was_said_again_does_nothing_when_it_comes_late() {
    let ground = Ground::new();
    runtime().block_on(async {
        let (line, leader, term) = ground.lead_over_a_line().await;
        // A small one, what a large one writes down first, and a part of a large one.
        for (records, bytes) in [(1, "first"), (200, "first"), (200, "entry/x/000")] {
            let filled = |value: &str| {
                (0..records).map(|n| put(&format!("x/{n:03}"), value.as_bytes())).collect::<Vec<Op>>()
            };
            let held = line.keep_back(bytes);
            leader.txn(term, filled("first")).await.unwrap();
            leader.txn(term, filled("second")).await.unwrap();
            held.recv().unwrap().release();
            let all = leader.list().await.unwrap();
            assert!(all.iter().all(|(_, value)| value.as_deref() == Some(b"second")), "{all:?}");
        }
    });
}

#[test]
fn a_write_whose_answer_is_lost_has_happened() {
    let ground = Ground::new();
    runtime().block_on(async {
        let (line, leader, term) = ground.lead_over_a_line().await;
        for value in ["one", "two", "three"] {
            line.lose_answer(value);
            leader.txn(term, vec![put("x", value.as_bytes())]).await.unwrap();
            assert_eq!(leader.list().await.unwrap(), entries(&[("x", value.as_bytes())]));
        }
    });
}

#[test]
fn with_certificates_on_both_sides() {
    let dir = tempfile::tempdir().unwrap();
    let (ca, other) = (Authority::new(dir.path(), "ca"), Authority::new(dir.path(), "other"));
    let etcd = Etcd::start(1, dir.path(), Some(&ca.sign("member")));
    let choice = |ca: &Authority, shown: &Tls| {
        let (ca, cert, key) = (ca.file.display(), shown.cert.display(), shown.key.display());
        let url = format!("etcds://{}?ca={ca}&cert={cert}&key={key}", etcd.members[0]);
        StoreChoice::parse(&url).unwrap()
    };
    let lead = async |choice: &StoreChoice, data: &str| {
        let mut store = Store::open(choice, &dir.path().join(data), &cluster()).await?;
        let term = store.campaign().await?;
        store.txn(term, vec![put("job/a", b"1")]).await?;
        store.list().await
    };
    let shown = ca.sign("controller");
    runtime().block_on(async {
        let all = lead(&choice(&ca, &shown), "a").await.unwrap();
        assert_eq!(all, entries(&[("job/a", b"1")]));
        // A member that is not who it should be, a client that nobody has signed, and one that speaks in plain.
        let plain = StoreChoice::parse(&etcd.url()).unwrap();
        for (n, refused) in
            [choice(&other, &shown), choice(&ca, &other.sign("stranger")), plain].iter().enumerate()
        {
            let cluster = cluster();
            let read = store::read(refused, Path::new("/"), &cluster);
            // It is tried again for as long as it takes: the member may be about to get another certificate.
            let waits = tokio::time::timeout(std::time::Duration::from_secs(2), read).await;
            assert!(waits.is_err(), "{n}: {waits:?}");
        }
        let missing = Tls { key: dir.path().join("none"), ..ca.sign("x") };
        let error = lead(&choice(&ca, &missing), "b").await.unwrap_err();
        assert!(error.to_string().starts_with("cannot read /"), "{error}");
    });
}

/// Who signs certificates.
struct Authority {
    file: PathBuf,
    issuer: Issuer<'static, KeyPair>,
}

impl Authority {
    fn new(dir: &Path, name: &str) -> Self {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.distinguished_name.push(DnType::CommonName, name);
        let file = dir.join(format!("{name}.pem"));
        std::fs::write(&file, params.self_signed(&key).unwrap().pem()).unwrap();
        Self { file, issuer: Issuer::new(params, key) }
    }

    /// For this machine, as who asks and as who answers.
    fn sign(&self, name: &str) -> Tls {
        let key = KeyPair::generate().unwrap();
        let params = CertificateParams::new(vec!["127.0.0.1".to_owned()]).unwrap();
        let certificate = params.signed_by(&key, &self.issuer).unwrap();
        let path = |what: &str| self.file.with_extension(format!("{name}.{what}"));
        let tls = Tls { ca: self.file.clone(), cert: path("pem"), key: path("key") };
        std::fs::write(&tls.cert, certificate.pem()).unwrap();
        std::fs::write(&tls.key, key.serialize_pem()).unwrap();
        tls
    }
}

#[test]
fn two_of_three_members_are_enough() {
    let mut ground = Ground::new();
    runtime().block_on(async {
        let mut leader = ground.open("a").await;
        let term = leader.campaign().await.unwrap();
        for member in 0..3 {
            ground.etcd.kill(member);
            for n in 0..20 {
                leader.txn(term, vec![put(&format!("{member}/{n:02}"), b"v")]).await.unwrap();
            }
            ground.etcd.revive(member);
            // It is behind for a moment: wait until all three have the last write.
            let last = leader.list().await.unwrap().len();
            let client =
                etcd_client::Client::connect(&ground.etcd.members[member..=member], None).await.unwrap();
            loop {
                let all = etcd_client::GetOptions::new().with_prefix().with_serializable().with_count_only();
                let seen = client.kv_client().get("/berth/lab/entry/", Some(all)).await;
                if seen.is_ok_and(|seen| seen.count() == last as i64) {
                    break;
                }
                tokio::time::sleep(std::time::Duration::from_millis(50)).await;
            }
        }
        assert_eq!(leader.list().await.unwrap().len(), 60);
        assert_eq!(leader.campaign().await.unwrap(), term.next(), "nobody else led");
    });
}

#[test]
fn records_move_to_etcd_and_back() {
    let ground = Ground::new();
    runtime().block_on(async {
        let dir = ground.data("a");
        let records: Vec<Op> =
            (0..500).map(|n| put(&format!("job/{n:03}"), format!("{n}").as_bytes())).collect();
        let mut embedded = Store::open(&StoreChoice::Embedded, &dir, &cluster()).await.unwrap();
        let term = embedded.campaign().await.unwrap();
        embedded.txn(term, records).await.unwrap();
        let contents = store::Contents {
            identity: embedded.identity().clone(),
            term,
            entries: embedded.list().await.unwrap(),
        };
        store::fill(&ground.choice(), &dir, &cluster(), &contents).await.unwrap();
        // Broken off before the source was retired, it is done again.
        store::fill(&ground.choice(), &dir, &cluster(), &contents).await.unwrap();
        embedded.retire(term, "etcd://there").await.unwrap();
        drop(embedded);
        let refused = Store::open(&StoreChoice::Embedded, &dir, &cluster()).await.err().unwrap();
        assert!(matches!(&refused, StoreError::Moved { to, .. } if to == "etcd://there"), "{refused}");

        let mut etcd = ground.open("a").await;
        assert_eq!(etcd.identity(), &contents.identity);
        let later = etcd.campaign().await.unwrap();
        assert_eq!((later, etcd.list().await.unwrap()), (term.next(), contents.entries.clone()));
        // It has a history of its own by now, which nobody writes over.
        let used = store::fill(&ground.choice(), &dir, &cluster(), &contents).await.unwrap_err();
        assert!(matches!(used, StoreError::Used { .. }), "{used}");

        etcd.txn(later, vec![delete("job/007")]).await.unwrap();
        let back = store::Contents { term: later, entries: etcd.list().await.unwrap(), ..contents };
        store::fill(&StoreChoice::Embedded, &dir, &cluster(), &back).await.unwrap();
        etcd.retire(later, "embedded").await.unwrap();
        drop(etcd);
        let mut embedded = Store::open(&StoreChoice::Embedded, &dir, &cluster()).await.unwrap();
        assert_eq!(embedded.campaign().await.unwrap(), later.next());
        assert_eq!(embedded.list().await.unwrap(), back.entries);
        assert!(matches!(
            Store::open(&ground.choice(), &ground.data("b"), &cluster()).await.err(),
            Some(StoreError::Moved { .. })
        ));
    });
}
