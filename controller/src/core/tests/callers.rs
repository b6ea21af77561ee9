//! Who may ask for what, and what is written down of it.

use std::net::IpAddr;

use berth_protocol::codec;
use berth_protocol::ids::{ClientId, JobName, Namespace, RequestId, UserName};
use berth_protocol::join::{InvitationId, Invited, Role, Roles, Secret, UserChange};
use berth_protocol::limits::REQUEST_AGE_MS_MAX;
use berth_protocol::message::query::{Query, QueryReply, QueryRequest};
use berth_protocol::sign::{Key, PublicKey};
use berth_protocol::tls::Party;
use berth_protocol::token::{self, Scope};
use berth_protocol::topic::{JobTopic, Topic};
use berth_protocol::units::{Millis, Timestamp};
use serde_json::Value;

use super::super::manage::{Change, NotChanged};
use super::super::members::{Invitation, Joined, first_admin};
use super::super::{Actor, Author, Config, Controller, Effect, Event, Signing, Step};
use super::world::{at, config};

const FROM: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(10, 1, 2, 3));

/// A cluster of `root`, an admin, and users with roles; each has the key of its number.
struct Closed {
    controller: Controller,
    audit: Vec<Value>,
    asked: u64,
}

fn key(n: u8) -> PublicKey {
    Key::from_seed(&[n; 32]).public()
}

fn user(name: &str) -> UserName {
    UserName::parse(name).unwrap()
}

fn party(name: &str) -> Party {
    Party::User(user(name))
}

fn namespace(name: &str) -> Namespace {
    Namespace::parse(name).unwrap()
}

fn roles(all: &[(&str, Role)]) -> Roles {
    all.iter().map(|(name, role)| (namespace(name), *role)).collect()
}

fn by(n: u8) -> Option<Author> {
    Some(Author { key: key(n), signed: None, from: Some(FROM) })
}

fn signed(n: u8, at: u64, id: &str) -> Option<Author> {
    let signed = Some(Signing { at: super::world::at(at).wall, id: RequestId::parse(id).unwrap() });
    Some(Author { key: key(n), signed, from: None })
}

const ROOT: u8 = 1;
const ADA: u8 = 2;
const BOB: u8 = 3;
const EVE: u8 = 9;

impl Closed {
    /// Ada submits in `a` and sees `b`; Bob is the admin of `b`.
    fn new() -> Self {
        let root = first_admin(&party("root"), key(ROOT), at(0));
        let config = Config { ca: Some("pem".to_owned()), ..config(1) };
        let controller = Controller::load(config, [(root.key, root.value)], at(0)).unwrap();
        let mut closed = Self { controller, audit: Vec::new(), asked: 0 };
        closed.join(ADA, "ada", roles(&[("a", Role::Submit), ("b", Role::View)]));
        closed.join(BOB, "bob", roles(&[("b", Role::Admin)]));
        closed.audit.clear();
        closed
    }

    fn step(&mut self, now: u64, event: Event) -> Vec<Effect> {
        let Step { writes, effects } = self.controller.step(at(now), event);
        let audit = writes.into_iter().filter(|write| write.key.starts_with("audit/"));
        self.audit.extend(audit.map(|write| serde_json::from_slice(&write.value.unwrap()).unwrap()));
        effects
    }

    fn join(&mut self, n: u8, name: &str, roles: Roles) {
        let id = InvitationId::from_bytes([n; 4]);
        let who = Invited::User { user: user(name), admin: false, roles };
        let invitation = Invitation::new(Secret::from_bytes([n; 16]).digest(), who, at(0), Millis(1));
        let root = Actor { party: Some(party("root")), from: None };
        self.step(0, Event::Change(root.clone(), Change::Invite(id, invitation)));
        self.step(0, Event::Joined(root, Joined { id, party: party(name), key: key(n) }));
    }

    fn says(&mut self, now: u64, by: Option<Author>, topic: Topic, payload: &[u8]) -> Vec<(Topic, Value)> {
        let effects = self.step(now, Event::Message { topic, payload: payload.to_vec(), by });
        let said = effects.into_iter().filter_map(|effect| match effect {
            Effect::Publish { topic, payload, .. } => Some((topic, serde_json::from_slice(&payload).ok()?)),
            _ => None,
        });
        said.collect()
    }

    /// The answer to a job file, and nothing but that where it is refused.
    fn submit(&mut self, now: u64, by: Option<Author>, space: &str, job: &str, cpu: u32) -> Value {
        let topic = Topic::job(&namespace(space), &JobName::parse(job).unwrap(), JobTopic::Submit);
        let file = format!("image: host\ncommand: [\"true\"]\nresources: {{cpu: {cpu}m}}\n");
        let mut said = self.says(now, by, topic, file.as_bytes());
        let (topic, answer) = said.remove(0);
        assert!(matches!(topic, Topic::Job { kind: JobTopic::Answer, .. }), "{topic}");
        assert!(answer["accepted"] == true || said.is_empty(), "a refused job is shown: {said:?}");
        answer
    }

    fn command(&mut self, by: Option<Author>, space: &str, job: &str, command: &str) -> Value {
        let topic = Topic::job(&namespace(space), &JobName::parse(job).unwrap(), JobTopic::Command);
        let command = format!(r#"{{"command":"{command}"}}"#);
        self.says(1, by, topic, command.as_bytes()).remove(0).1
    }

    fn ask(&mut self, by: Option<Author>, query: Query) -> Result<Value, String> {
        let client = ClientId::parse("c1").unwrap();
        let topic = Topic::QueryRequest { client };
        self.asked += 1;
        let id = RequestId::parse(&format!("q-{}", self.asked)).unwrap();
        let payload = codec::encode(&topic, &QueryRequest { id, query }).unwrap();
        let said = self.says(1, by, topic, &payload);
        let reply = said.into_iter().find(|(topic, _)| matches!(topic, Topic::QueryReply { .. })).unwrap().1;
        let reply: QueryReply = serde_json::from_value(reply).unwrap();
        reply.error.map_or(Ok(()), |error| Err(error.code))?;
        Ok(reply.result.unwrap())
    }

    fn jobs(&mut self, n: u8) -> Vec<String> {
        let page = self.ask(by(n), Query::Jobs { namespace: None, after: None }).unwrap();
        let name = |row: &Value| format!("{}/{}", row["namespace"], row["job"]).replace('"', "");
        page["rows"].as_array().unwrap().iter().map(name).collect()
    }
}

fn code(answer: &Value) -> &str {
    answer["rejected"]["code"].as_str().unwrap_or("accepted")
}

#[test]
fn jobs_are_directed_by_those_with_a_role_in_their_namespace() {
    let mut closed = Closed::new();
    assert_eq!(code(&closed.submit(1, by(ADA), "a", "j", 1)), "accepted");
    assert_eq!(code(&closed.submit(1, by(BOB), "b", "j", 1)), "accepted");
    for (author, space) in [(by(ADA), "b"), (by(ADA), "c"), (by(BOB), "a"), (by(EVE), "a"), (None, "a")] {
        assert_eq!(code(&closed.submit(1, author.clone(), space, "j", 2)), "Forbidden", "{author:?} {space}");
        assert_eq!(code(&closed.command(author, space, "j", "cancel")), "Forbidden");
    }
    assert_eq!(closed.jobs(ROOT), ["a/j", "b/j"]);
    assert_eq!(code(&closed.command(by(ADA), "a", "j", "cancel")), "accepted");
    assert_eq!(code(&closed.command(by(ROOT), "b", "j", "cancel")), "accepted");
}

#[test]
fn questions_are_answered_about_what_one_may_see() {
    let mut closed = Closed::new();
    for (n, space) in [(ADA, "a"), (BOB, "b"), (ROOT, "c")] {
        closed.submit(1, by(n), space, "j", 1);
    }
    assert_eq!((closed.jobs(ADA), closed.jobs(BOB)), (vec!["a/j".into(), "b/j".into()], vec!["b/j".into()]));
    let job = |space| Query::Job { namespace: namespace(space), job: JobName::parse("j").unwrap() };
    assert!(closed.ask(by(ADA), job("b")).is_ok());
    let forbidden = Err("Forbidden".to_owned());
    assert_eq!(closed.ask(by(ADA), job("c")), forbidden);
    assert_eq!(closed.ask(by(EVE), Query::Nodes { after: None }), forbidden);
    assert_eq!(closed.ask(None, Query::Nodes { after: None }), forbidden);
    let all = Query::Jobs { namespace: Some(namespace("c")), after: None };
    assert_eq!(closed.ask(by(BOB), all), forbidden);
    let node = || berth_protocol::ids::NodeId::parse("n1").unwrap();
    assert_eq!(closed.ask(by(BOB), Query::Cordon { node: node() }), forbidden);
    assert_eq!(closed.ask(by(ROOT), Query::Cordon { node: node() }), Err("NotFound".to_owned()));
    let defrag = Query::Defrag { moves: 1, execute: false };
    assert_eq!(closed.ask(by(ADA), defrag.clone()), forbidden);
    assert!(closed.ask(by(ROOT), defrag).is_ok());

    // Who may only see cannot put anything into the depot.
    let secret = config(1).secret;
    let mut scope = |space| {
        let access = closed.ask(by(ADA), Query::Depot { namespace: namespace(space) }).unwrap();
        token::verify(&secret, access["token"].as_str().unwrap(), Timestamp(0)).unwrap()
    };
    assert_eq!(scope("a"), Scope::Namespace(namespace("a")));
    assert_eq!(scope("b"), Scope::View(namespace("b")));
}

#[test]
fn a_signed_request_counts_once_and_for_a_while() {
    let mut closed = Closed::new();
    let first = signed(ADA, 5, "sig-1");
    assert_eq!(code(&closed.submit(10, first.clone(), "a", "j", 1)), "accepted");
    assert_eq!(code(&closed.submit(11, signed(ADA, 6, "sig-2"), "a", "j", 2)), "accepted");
    // A broker that kept the first brings nothing back by it.
    assert_eq!(code(&closed.submit(12, first.clone(), "a", "j", 1)), "Overtaken");
    assert_eq!(closed.jobs(ADA), ["a/j"]);
    let late = REQUEST_AGE_MS_MAX + 10;
    assert_eq!(code(&closed.submit(late, first, "a", "new", 1)), "Stale");
    assert_eq!(code(&closed.submit(1, signed(ADA, late, "sig-3"), "a", "new", 1)), "Stale");
    // So many that the first are forgotten: what was signed by then is not heard any more.
    let stale = signed(ADA, 20, "sig-4");
    assert_eq!(code(&closed.submit(20, stale.clone(), "a", "k", 1)), "accepted");
    assert_eq!(code(&closed.submit(21, signed(ADA, 21, "sig-5"), "a", "k", 2)), "accepted");
    for n in 0..9_000 {
        closed.submit(30 + n, signed(ADA, 30 + n, &format!("many-{n}")), "a", "many", 1);
    }
    assert_eq!(code(&closed.submit(9_100, stale, "a", "k", 1)), "Stale");
    assert_eq!(code(&closed.submit(9_100, signed(ADA, 9_099, "sig-6"), "a", "k", 1)), "accepted");
}

#[test]
fn roles_are_given_by_those_who_have_them_to_give() {
    let mut closed = Closed::new();
    let change = |admin: Option<bool>, all: &[(&str, Option<Role>)]| UserChange {
        admin,
        roles: all.iter().map(|(name, role)| (namespace(name), *role)).collect(),
    };
    let actor = |who: &str| Actor { party: Some(party(who)), from: None };
    let may_set = |closed: &Closed, who: &str, whom: &str, change: UserChange| {
        closed.controller.may_change(&actor(who), &Change::Set(user(whom), change))
    };
    let submit_b = || change(None, &[("b", Some(Role::Submit))]);
    let may = |closed: &Closed, who: &str, change| may_set(closed, who, "ada", change);
    let denied = |result| matches!(result, Err(NotChanged::Denied(_)));
    assert_eq!(may(&closed, "bob", submit_b()), Ok(()));
    assert!(denied(may(&closed, "ada", submit_b())), "who may only see");
    assert!(denied(may(&closed, "bob", change(Some(true), &[]))));
    assert!(denied(may(&closed, "bob", change(None, &[("b", None), ("a", None)]))));
    assert!(denied(may(&closed, "eve", submit_b())), "nobody of the cluster");
    assert_eq!(may(&closed, "root", change(Some(true), &[("a", None)])), Ok(()));
    let no_admin = || change(Some(false), &[]);
    assert_eq!(may_set(&closed, "root", "root", no_admin()), Err(NotChanged::LastAdmin(party("root"))));
    assert_eq!(may_set(&closed, "root", "ada", no_admin()), Ok(()), "who is none anyway");
    assert!(matches!(may_set(&closed, "root", "eve", submit_b()), Err(NotChanged::Unknown(_))));

    // An admin of a namespace brings somebody new into it, and nobody into another's place.
    let invited = |name, admin, all| Invited::User { user: user(name), admin, roles: roles(all) };
    let may = |who: &str, who_is: Invited| {
        let invitation = Invitation::new(Secret::from_bytes([8; 16]).digest(), who_is, at(0), Millis(1));
        let change = Change::Invite(InvitationId::from_bytes([8; 4]), invitation);
        closed.controller.may_change(&actor(who), &change).is_ok()
    };
    assert!(may("bob", invited("carol", false, &[("b", Role::View)])));
    assert!(!may("bob", invited("carol", true, &[("b", Role::View)])));
    assert!(!may("bob", invited("carol", false, &[])));
    assert!(!may("bob", invited("carol", false, &[("a", Role::View)])));
    assert!(!may("bob", invited("ada", false, &[("b", Role::View)])));
    assert!(!may("bob", Invited::Node(None)));
    assert!(may("root", invited("ada", true, &[])) && may("root", Invited::Node(None)));

    // What else is the cluster's own is for its admins; a namespace's secrets are for those who submit there.
    let token = InvitationId::from_bytes([8; 4]);
    let set = |space: &str| {
        let name = berth_protocol::ids::SecretName::parse("k").unwrap();
        Change::Secret(namespace(space), name, Some("sealed".to_owned()))
    };
    for (who, change, may) in [
        ("bob", Change::Remove(party("ada")), false),
        ("root", Change::Remove(party("ada")), true),
        ("bob", Change::Uninvite(token), false),
        ("ada", set("a"), true),
        ("ada", set("b"), false),
        ("bob", set("b"), true),
        ("bob", set("a"), false),
        ("eve", set("a"), false),
    ] {
        let answer = closed.controller.may_change(&actor(who), &change);
        assert_eq!(answer.is_ok(), may, "{who} {change:?}: {answer:?}");
    }
    let told = |who: &str| {
        let told = closed.controller.members_told(&actor(who)).unwrap();
        told.into_iter().map(|member| format!("{} {:?}", member.party, member.roles)).collect::<Vec<_>>()
    };
    assert_eq!(told("root").len(), 3);
    let ada = "user:ada";
    assert!(
        told("bob")[0].starts_with(ada)
            && told("bob")[0].contains("View")
            && !told("bob")[0].contains("Submit")
    );
    assert_eq!(told("ada").len(), 1, "who is no admin sees what concerns them");
    let space = |name| namespace(name);
    assert!(closed.controller.secrets_told(&actor("ada"), &space("b")).is_ok());
    assert!(closed.controller.secrets_told(&actor("bob"), &space("a")).is_err());
    assert!(closed.controller.invitations_told(at(0), &actor("bob")).is_err());

    let by_bob = Actor { party: Some(party("bob")), from: None };
    assert_eq!(code(&closed.submit(1, by(ADA), "b", "j", 1)), "Forbidden");
    closed.step(1, Event::Change(by_bob, Change::Set(user("ada"), submit_b())));
    assert_eq!(code(&closed.submit(1, by(ADA), "b", "j", 1)), "accepted");
    closed.step(2, Event::Change(Actor::default(), Change::Remove(party("ada"))));
    assert_eq!(code(&closed.submit(2, by(ADA), "b", "k", 1)), "Forbidden");
}

#[test]
fn what_is_asked_is_written_down() {
    let mut closed = Closed::new();
    closed.submit(1, by(ADA), "a", "j", 1);
    closed.submit(1, by(ADA), "a", "j", 1);
    closed.submit(1, by(ADA), "b", "j", 1);
    closed.submit(1, by(EVE), "a", "j", 2);
    closed.command(by(ADA), "a", "j", "cancel");
    closed.command(by(ADA), "a", "none", "cancel");
    let node = berth_protocol::ids::NodeId::parse("n1").unwrap();
    let _ = closed.ask(by(BOB), Query::Drain { node, deadline: None });
    let told: Vec<String> = closed
        .audit
        .iter()
        .map(|row| {
            format!("{} {} {} {} {}", row["who"], row["from"], row["what"], row["on"], row["outcome"])
                .replace('"', "")
        })
        .collect();
    assert_eq!(
        told,
        [
            "user:ada 10.1.2.3 submit job a/j accepted",
            "user:ada 10.1.2.3 submit job b/j refused",
            "null 10.1.2.3 submit job a/j refused",
            "user:ada 10.1.2.3 cancel job a/j accepted",
            "user:ada 10.1.2.3 cancel job a/none refused",
            "user:bob 10.1.2.3 drain node n1 refused",
        ]
    );
    // Nobody fills the store by asking for what is refused.
    closed.audit.clear();
    for n in 0..1_000 {
        closed.submit(2, by(EVE), "a", &format!("j{n}"), 1);
    }
    assert!((1..=120).contains(&closed.audit.len()), "{}", closed.audit.len());
}
