//! Who belongs, and by what invitation.

use berth_protocol::ids::{NodeId, UserName};
use berth_protocol::join::{
    Approval, InvitationId, Invited, JoinRequest, JoinToken, MustWait, Roles, Secret,
};
use berth_protocol::limits::WAITING_MS;
use berth_protocol::message::node::Bye;
use berth_protocol::sign::Key;
use berth_protocol::tls::Party;
use berth_protocol::topic::{NodeTopic, Topic};
use berth_protocol::units::{Millis, Timestamp};

use super::super::approval::Admission;
use super::super::manage::{Change, NotChanged};
use super::super::members::{Invitation, Joined, NotJoined, are_in, first_admin};
use super::super::{Actor, Config, Controller, Event};
use super::world::{at, config};

const LIFE: Millis = Millis(60_000);

struct Closed {
    controller: Controller,
    store: std::collections::BTreeMap<String, Vec<u8>>,
}

impl Closed {
    fn new() -> Self {
        let mut closed = Self { controller: load(Vec::new()), store: Default::default() };
        let admin = first_admin(&party("user:root"), key(1).public(), at(0));
        closed.store.insert(admin.key, admin.value.unwrap());
        closed.restart();
        closed
    }

    fn change(&mut self, now: u64, change: Change) {
        self.step(now, Event::Change(Actor::default(), change));
    }

    fn step(&mut self, now: u64, event: Event) {
        for write in self.controller.step(at(now), event).writes {
            match write.value {
                Some(value) => drop(self.store.insert(write.key, value)),
                None => drop(self.store.remove(&write.key)),
            }
        }
    }

    fn restart(&mut self) {
        self.controller =
            load(self.store.iter().map(|(key, value)| (key.clone(), Some(value.clone()))).collect());
    }

    fn invite(&mut self, n: u8, who: Invited) -> JoinToken {
        let (id, secret) = (InvitationId::from_bytes([n; 4]), Secret::from_bytes([n; 16]));
        let invitation = Invitation::new(secret.digest(), who, at(0), LIFE);
        self.change(0, Change::Invite(id, invitation));
        JoinToken { ca: key(9).public(), id, secret, controller: "ctl:1".to_owned() }
    }

    /// As `io` does it.
    fn join(&mut self, now: u64, request: &JoinRequest) -> Result<Party, NotJoined> {
        let (id, key) = (request.id, request.key);
        match self.controller.may_join(at(now), request)? {
            Admission::Joins(party) => {
                let joined = Joined { id, party: party.clone(), key };
                self.step(now, Event::Joined(Actor::default(), joined));
                Ok(party)
            }
            Admission::Waits(told) => panic!("it waits: {told:?}"),
        }
    }

    /// Likewise, of one that is to wait: until when.
    fn wait(&mut self, now: u64, request: &JoinRequest) -> Result<Timestamp, NotJoined> {
        let (id, key) = (request.id, request.key);
        match self.controller.may_join(at(now), request)? {
            Admission::Joins(party) => panic!("{party} joins"),
            Admission::Waits(MustWait { node, until }) => {
                self.step(now, Event::Waits(Actor::default(), Joined { id, party: Party::Node(node), key }));
                Ok(until)
            }
        }
    }

    /// A token whose machine has to be approved.
    fn invite_to_wait(&mut self, n: u8) -> JoinToken {
        let token = self.invite(n, Invited::Node(None));
        let invitation = Invitation::new(token.secret.digest(), Invited::Node(None), at(0), LIFE);
        self.change(0, Change::Invite(token.id, Invitation { approve: true, ..invitation }));
        token
    }

    fn may(&self, who: &str, change: &Change) -> Result<(), NotChanged> {
        self.controller.may_change(&Actor { party: Some(party(who)), from: None }, change)
    }

    /// Whether what this key says as the node is looked at.
    fn hears(&mut self, node: &str, by: &Key) -> bool {
        let before = self.refused();
        let topic = Topic::node(&NodeId::parse(node).unwrap(), NodeTopic::Bye);
        let nonce = berth_protocol::ids::SessionNonce::parse("s1").unwrap();
        let payload = berth_protocol::codec::encode(&topic, &Bye { nonce }).unwrap();
        self.step(0, Event::Message { topic, payload, by: Some(by.public().into()) });
        self.refused() == before
    }

    fn refused(&self) -> u64 {
        self.controller.counters().refused.get("not-a-member").copied().unwrap_or(0)
    }
}

fn load(entries: Vec<(String, Option<Vec<u8>>)>) -> Controller {
    Controller::load(Config { ca: Some("pem".to_owned()), ..config(1) }, entries, at(0)).unwrap()
}

fn party(name: &str) -> Party {
    name.parse().unwrap()
}

fn key(n: u8) -> Key {
    Key::from_seed(&[n; 32])
}

fn request(token: &JoinToken, name: Option<&str>, n: u8) -> JoinRequest {
    JoinRequest::new(token, name.map(party), NodeId::parse("host").ok(), &key(n))
}

#[test]
fn an_invitation_is_taken_once_in_time_and_outlasts_a_restart() {
    let mut closed = Closed::new();
    let token = closed.invite(1, Invited::Node(None));
    closed.restart();
    assert_eq!(closed.controller.invitations(at(0)).len(), 1);
    let late = request(&token, Some("a1"), 2);
    assert_eq!(closed.controller.may_join(at(LIFE.0), &late), Err(NotJoined::NotInvited));
    let guess = JoinToken { secret: Secret::from_bytes([7; 16]), ..token.clone() };
    assert_eq!(closed.join(1, &request(&guess, Some("a1"), 2)), Err(NotJoined::NotInvited));
    assert_eq!(closed.join(1, &request(&token, Some("a1"), 2)), Ok(party("a1")));
    assert_eq!(closed.join(2, &request(&token, Some("a2"), 3)), Err(NotJoined::NotInvited));
    closed.restart();
    assert!(closed.hears("a1", &key(2)) && !closed.hears("a1", &key(3)) && !closed.hears("a2", &key(3)));
    closed.change(3, Change::Remove(party("a1")));
    assert!(!closed.hears("a1", &key(2)));
    closed.restart();
    assert!(!closed.hears("a1", &key(2)));

    let token = closed.invite(2, Invited::Node(None));
    closed.change(4, Change::Uninvite(token.id));
    assert_eq!(closed.join(4, &request(&token, None, 4)), Err(NotJoined::NotInvited));
    // What nobody took is not kept for ever.
    closed.invite(3, Invited::Node(None));
    closed.step(3_600_000, Event::Tick);
    assert!(!closed.store.keys().any(|key| key.starts_with("invitation/")), "{:?}", closed.store.keys());
}

#[test]
fn a_name_is_one_keys_until_an_admin_gives_it_away() {
    let mut closed = Closed::new();
    let entries: Vec<_> =
        closed.store.iter().map(|(key, value)| (key.clone(), Some(value.clone()))).collect();
    assert!(are_in(&entries) && !are_in(&[]));
    let token = closed.invite(1, Invited::Node(None));
    assert_eq!(closed.join(1, &request(&token, None, 2)), Ok(party("host")));
    let token = closed.invite(2, Invited::Node(None));
    let taken = NotJoined::Taken(NodeId::parse("host").unwrap());
    assert_eq!(closed.join(1, &request(&token, None, 3)), Err(taken));
    assert_eq!(
        closed.join(1, &request(&token, Some("user:eve"), 3)),
        Err(NotJoined::NoNode(party("user:eve")))
    );
    // The answer to its own first request was lost.
    assert_eq!(closed.join(1, &request(&token, None, 2)), Ok(party("host")));

    let named = Invited::Node(NodeId::parse("host").ok());
    let token = closed.invite(3, named);
    assert_eq!(closed.join(1, &request(&token, Some("a2"), 4)), Err(NotJoined::Other(party("host"))));
    assert_eq!(closed.join(1, &request(&token, None, 4)), Ok(party("host")));
    assert!(closed.hears("host", &key(4)) && !closed.hears("host", &key(2)));

    let admin = closed
        .invite(4, Invited::User { user: UserName::parse("bob").unwrap(), admin: true, roles: Roles::new() });
    assert_eq!(closed.join(1, &request(&admin, None, 5)), Ok(party("user:bob")));
    let member = &closed.controller.members()[&party("user:bob")];
    assert!(member.admin && member.key == key(5).public());
    assert!(!closed.controller.members()[&party("host")].admin);
    // Somebody is left who may let others in.
    let bob = party("user:bob");
    let may_remove = |closed: &Closed, by: &Party, whom: &str| {
        let by = Actor { party: Some(by.clone()), from: None };
        closed.controller.may_change(&by, &Change::Remove(party(whom)))
    };
    assert_eq!(may_remove(&closed, &bob, "user:root"), Ok(()));
    closed.change(2, Change::Remove(party("user:root")));
    assert_eq!(may_remove(&closed, &bob, "user:bob"), Err(NotChanged::LastAdmin(bob.clone())));
    assert!(matches!(may_remove(&closed, &bob, "a9"), Err(NotChanged::Unknown(_))));
    assert_eq!(may_remove(&closed, &bob, "host"), Ok(()));
}

#[test]
fn one_that_has_to_be_approved_waits_for_an_admins_word() {
    let mut closed = Closed::new();
    let token = closed.invite_to_wait(1);
    let asks = request(&token, Some("a1"), 2);
    let until = at(5 + WAITING_MS).wall;
    assert_eq!(closed.wait(5, &asks), Ok(until));
    assert!(!closed.hears("a1", &key(2)));
    // It asks again and again, and nothing more is written; also beyond the token's own life, and a restart.
    closed.restart();
    let audit = |closed: &Closed| closed.store.keys().filter(|key| key.starts_with("audit/")).count();
    let before = audit(&closed);
    assert_eq!(closed.wait(LIFE.0 + 5, &asks), Ok(until));
    assert_eq!(audit(&closed), before);
    let told = closed.controller.invitations(at(LIFE.0 + 5));
    let waiting = told[0].waiting.as_ref().unwrap();
    assert_eq!((waiting.fingerprint, waiting.approved), (key(2).public().fingerprint(), false));

    // The token is the first one's that showed it, under the name that it had then; and so is the name.
    let stolen = request(&token, Some("a2"), 3);
    assert_eq!(closed.wait(6, &stolen), Err(NotJoined::TokenWaits));
    assert_eq!(closed.wait(6, &request(&token, Some("a9"), 2)), Err(NotJoined::Other(party("a1"))));
    let second = closed.invite_to_wait(2);
    let name = NodeId::parse("a1").unwrap();
    assert_eq!(closed.wait(6, &request(&second, Some("a1"), 3)), Err(NotJoined::NameWaits(name.clone())));

    // By an admin, for the key that was compared.
    let approve = |n: Option<u8>| {
        let fingerprint = n.map(|n| key(n).public().fingerprint());
        Change::Approve(name.clone(), Some(Approval { fingerprint }))
    };
    let own = key(2).public().fingerprint();
    assert!(matches!(closed.may("user:eve", &approve(None)), Err(NotChanged::Denied(_))));
    assert!(matches!(closed.may("a1", &approve(None)), Err(NotChanged::Denied(_))));
    assert_eq!(closed.may("user:root", &approve(Some(3))), Err(NotChanged::OtherKey(name.clone(), own)));
    let nobody = Change::Approve(NodeId::parse("a7").unwrap(), None);
    assert!(matches!(closed.may("user:root", &nobody), Err(NotChanged::Unknown(_))));
    assert_eq!(closed.may("user:root", &approve(Some(2))), Ok(()));
    closed.change(7, approve(Some(2)));
    closed.restart();
    assert_eq!(closed.join(8, &asks), Ok(party("a1")));
    assert!(closed.hears("a1", &key(2)));
    assert_eq!(closed.join(9, &asks), Err(NotJoined::NotInvited), "once");
}

#[test]
fn one_that_is_denied_or_forgotten_is_not_let_in() {
    let mut closed = Closed::new();
    let token = closed.invite_to_wait(1);
    let asks = request(&token, Some("a1"), 2);
    closed.wait(5, &asks).unwrap();
    let deny = Change::Approve(NodeId::parse("a1").unwrap(), None);
    assert!(matches!(closed.may("user:eve", &deny), Err(NotChanged::Denied(_))));
    assert_eq!(closed.may("user:root", &deny), Ok(()));
    closed.change(6, deny);
    closed.restart();
    assert_eq!(closed.wait(7, &asks), Err(NotJoined::NotInvited));
    assert!(!closed.hears("a1", &key(2)));

    let token = closed.invite_to_wait(2);
    let asks = request(&token, Some("a2"), 3);
    closed.wait(5, &asks).unwrap();
    closed.step(4 + WAITING_MS, Event::Tick);
    assert!(closed.store.keys().any(|key| key.starts_with("invitation/")));
    assert_eq!(closed.wait(5 + WAITING_MS, &asks), Err(NotJoined::NotInvited));
    closed.step(5 + WAITING_MS + 3_600_000, Event::Tick);
    assert!(!closed.store.keys().any(|key| key.starts_with("invitation/")));
}
