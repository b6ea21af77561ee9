//! Another key for the controller, by the root's word.

use berth_protocol::delegation::{Delegation, LIFE, WARNED_BEFORE};
use berth_protocol::ids::{ClientId, ClusterName, RequestId};
use berth_protocol::message::query::{Query, QueryReply, QueryRequest};
use berth_protocol::sign::{Key, PublicKey};
use berth_protocol::topic::Topic;
use berth_protocol::units::Millis;

use super::super::keys::{NotRotated, SigningKey, in_entries, stored};
use super::super::manage::{Change, NotChanged};
use super::super::members::first_admin;
use super::super::notes::Note;
use super::super::{Actor, Config, Controller, Effect, Event, Write};
use super::world::{at, config};

const DAY: u64 = 86_400_000;

fn key(n: u8) -> Key {
    Key::from_seed(&[n; 32])
}

/// By the root `root` of a cluster, for the key `n`.
fn delegated(root: u8, cluster: &str, n: u8, serial: u64) -> Delegation {
    let cluster = ClusterName::parse(cluster).unwrap();
    Delegation::new(&key(root), &cluster, key(n).public(), Some(serial - 1), at(0).wall, LIFE)
}

fn admin() -> Actor {
    Actor { party: Some("user:root".parse().unwrap()), from: None }
}

fn entries(key_record: Option<Write>) -> Vec<(String, Option<Vec<u8>>)> {
    let admin = first_admin(&"user:root".parse().unwrap(), PublicKey::from_bytes([1; 32]), at(0));
    let records = [Some(admin), key_record].into_iter().flatten();
    records.map(|write| (write.key, write.value)).collect()
}

fn first() -> SigningKey {
    let delegation = delegated(1, "lab", 2, serial_now());
    SigningKey { root: key(1).public(), delegation, sealed: "sealed-2".to_owned() }
}

/// What is made now, counts from here.
fn serial_now() -> u64 {
    at(0).wall.0 / 1000
}

fn load(entries: Vec<(String, Option<Vec<u8>>)>) -> Controller {
    Controller::load(Config { ca: Some("pem".to_owned()), ..config(1) }, entries, at(0)).unwrap()
}

fn rotate(delegation: Delegation, sealed: &str) -> Change {
    Change::Rotate(Box::new(delegation), sealed.to_owned())
}

#[test]
fn a_later_key_of_the_roots_takes_the_place_of_the_one_in_use() {
    let mut controller = load(entries(Some(stored(&first()))));
    let next = delegated(1, "lab", 3, serial_now() + 5);
    let change = rotate(next.clone(), "sealed-3");
    assert_eq!(controller.may_change(&admin(), &change), Ok(()));
    let writes = controller.step(at(1), Event::Change(admin(), change)).writes;
    // With the entry about it, in the very transaction.
    let audit = writes.iter().find(|write| write.key.starts_with("audit/")).expect("it is written down");
    let audit = String::from_utf8_lossy(audit.value.as_deref().unwrap_or_default()).into_owned();
    assert!(audit.contains("\"rotate\"") && audit.contains(&key(3).public().short()), "{audit}");
    assert!(!audit.contains("sealed"), "{audit}");
    let kept = writes.into_iter().find(|write| write.key == "key/signing");
    let expected = SigningKey { delegation: next.clone(), sealed: "sealed-3".to_owned(), ..first() };
    assert_eq!(in_entries(&entries(kept.clone())).unwrap(), Some(expected));
    // A controller that begins with these records has it too.
    controller = load(entries(kept));
    controller.step(at(2), Event::Tick);
    assert_eq!(controller.key_told(&admin()).unwrap().delegation, Some(next.clone()));
    assert_eq!(controller.counters().key_expires, Some(next.expires));
}

#[test]
fn no_other_is_taken() {
    let controller = load(entries(Some(stored(&first()))));
    let now = serial_now();
    let refused =
        |delegation: Delegation| controller.may_change(&admin(), &rotate(delegation, "sealed")).unwrap_err();
    let not_named = NotChanged::NotRotated(NotRotated::NotNamed);
    assert_eq!(refused(delegated(9, "lab", 3, now + 5)), not_named);
    assert_eq!(refused(delegated(1, "other", 3, now + 5)), not_named);
    let mut altered = delegated(1, "lab", 3, now + 5);
    altered.key = key(4).public();
    assert_eq!(refused(altered), not_named);
    let same = NotRotated::NotLater { serial: now, latest: now };
    assert_eq!(refused(delegated(1, "lab", 3, now)), same.into());
    // By the root's word, and by an admin's.
    let stranger = Actor { party: Some("user:eve".parse().unwrap()), from: None };
    let change = rotate(delegated(1, "lab", 3, now + 5), "sealed");
    for nobody in [stranger, Actor { party: Some("a1".parse().unwrap()), from: None }] {
        assert!(matches!(controller.may_change(&nobody, &change), Err(NotChanged::Denied(_))));
        assert!(matches!(controller.may_draw_key(&nobody), Err(NotChanged::Denied(_))));
    }
    assert_eq!(controller.may_draw_key(&admin()), Ok(()));
    // One of before there were roots has none to ask.
    let old = load(entries(None));
    assert_eq!(old.may_change(&admin(), &change), Err(NotRotated::NoRoot.into()));
    assert_eq!(old.may_draw_key(&admin()), Err(NotRotated::NoRoot.into()));
    // What is damaged is not taken for what is not there.
    let damaged = vec![("key/signing".to_owned(), None)];
    assert!(in_entries(&damaged).is_err());
}

/// The answer to `get nodes`, and what the log was told, at a time.
fn told(controller: &mut Controller, now: u64) -> (Option<String>, Vec<Note>) {
    let topic = Topic::QueryRequest { client: ClientId::parse("c1").unwrap() };
    let request = QueryRequest { id: RequestId::parse("q1").unwrap(), query: Query::Nodes { after: None } };
    let payload = berth_protocol::codec::encode(&topic, &request).unwrap();
    let by = Some(PublicKey::from_bytes([1; 32]).into());
    let effects = controller.step(at(now), Event::Message { topic, payload, by }).effects;
    let (mut notice, mut notes) = (None, Vec::new());
    for effect in effects {
        match effect {
            Effect::Publish { topic: Topic::QueryReply { .. }, payload, .. } => {
                let reply: QueryReply = serde_json::from_slice(&payload).unwrap();
                let result = reply.result.unwrap_or_else(|| panic!("{:?}", reply.error));
                notice = result.get("notice").and_then(|notice| notice.as_str()).map(str::to_owned);
            }
            Effect::Note(note @ Note::KeyEnds(_)) => notes.push(note),
            _ => {}
        }
    }
    (notice, notes)
}

#[test]
fn its_end_is_told_long_before_once_a_day() {
    let mut controller = load(entries(Some(stored(&first()))));
    let warned = LIFE.0 - WARNED_BEFORE.0;
    assert_eq!(told(&mut controller, warned - DAY), (None, Vec::new()));
    let (notice, notes) = told(&mut controller, warned + DAY);
    assert!(notice.is_some_and(|text| text.contains("berth keys rotate --root FILE")));
    assert_eq!(notes.len(), 1);
    assert_eq!(told(&mut controller, warned + DAY + DAY / 2).1.len(), 0);
    assert_eq!(told(&mut controller, warned + 2 * DAY).1.len(), 1);
    let (notice, _) = told(&mut controller, LIFE.0 + DAY);
    assert!(notice.is_some_and(|text| text.contains("has expired at")));

    let delegation = Delegation::new(
        &key(1),
        &ClusterName::parse("lab").unwrap(),
        key(3).public(),
        Some(serial_now()),
        at(LIFE.0 + DAY).wall,
        Millis(LIFE.0),
    );
    controller.step(at(LIFE.0 + DAY), Event::Change(admin(), rotate(delegation, "sealed-3")));
    assert_eq!(told(&mut controller, LIFE.0 + 2 * DAY), (None, Vec::new()));
}
