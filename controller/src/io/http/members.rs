//! How machines and people come to belong to the cluster, and how they leave, over HTTPS: invitations, certificates. Who
//! may do what, the client's certificate says, or the token of an invitation.

use std::net::IpAddr;

use berth_protocol::delegation::Delegation;
use berth_protocol::ids::{ClusterName, NodeId, UserName};
use berth_protocol::join::{DrawnKey, InvitationId, Invited, JoinRequest, JoinToken, Membership, Secret};
use berth_protocol::limits::INVITATION_MS;
use berth_protocol::sign::PublicKey;
use berth_protocol::tls::Party;
use berth_protocol::units::Millis;
use hyper::body::Incoming;
use hyper::{Method, Request, StatusCode};
use serde::{Deserialize, Serialize};
use serde_json::json;
use tokio::sync::{oneshot, watch};

use super::{Answer, HEADER_TIMEOUT, INQUIRY_TIMEOUT, Inquiry, Service, Visitor, clock, saved, text};
use crate::core::approval::Admission;
use crate::core::manage::{Change, NotChanged};
use crate::core::members::{Invitation, NotJoined};
use crate::core::{Actor, Denied};
use crate::io::ca::{self, Ca, CaError};
use crate::io::front::Tls;
use crate::io::random;

const REQUEST_BYTES_MAX: usize = 4096;
const INVITATION_MS_MAX: u64 = 24 * 60 * 60 * 1_000;

/// Where members are let in.
pub struct Hall {
    pub tls: Tls,
    pub ca: Ca,
    pub about: About,
}

/// What the controller says of itself to those that join.
#[derive(Debug, Clone)]
pub struct About {
    pub cluster: ClusterName,
    /// Whom its members are to know by.
    pub root: PublicKey,
    /// Whom that has named last.
    pub delegation: watch::Receiver<Option<Delegation>>,
    /// `mqtts://HOST:PORT`
    pub broker: String,
    /// `https://HOST:PORT`
    pub url: String,
}

impl About {
    /// What one has that belongs.
    pub fn membership(&self, ca: &Ca, party: &Party, key: &PublicKey) -> Result<Membership, CaError> {
        let life = Millis(u64::try_from(ca::MEMBERS.as_millis()).unwrap_or(u64::MAX));
        let Self { cluster, root, delegation, broker, url } = self.clone();
        let delegation = delegation.borrow().clone();
        Ok(Membership {
            cluster,
            party: party.clone(),
            ca: ca.pem(),
            certificate: ca.member(party, key)?,
            expires: clock::now().wall.plus(life),
            root,
            delegation,
            broker,
            url,
        })
    }
}

#[derive(Debug, PartialEq, Eq)]
pub(super) enum Route {
    Join,
    Renew,
    Invitations,
    Invitation(InvitationId),
    Key,
    Waiting(NodeId),
    Members,
    Node(NodeId),
    User(UserName),
}

impl Route {
    pub fn parse(levels: &[&str]) -> Option<Self> {
        Some(match levels {
            ["v1", "join"] => Self::Join,
            ["v1", "renew"] => Self::Renew,
            ["v1", "invitations"] => Self::Invitations,
            ["v1", "invitations", id] => Self::Invitation(id.parse().ok()?),
            ["v1", "key"] => Self::Key,
            ["v1", "waiting", node] => Self::Waiting(NodeId::parse(node).ok()?),
            ["v1", "members"] => Self::Members,
            ["v1", "nodes", node] => Self::Node(NodeId::parse(node).ok()?),
            ["v1", "users", user] => Self::User(UserName::parse(user).ok()?),
            _ => return None,
        })
    }
}

/// What an admin asks for: a token for a machine, or for one certain machine or person.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Invite {
    who: Invited,
    #[serde(default)]
    life: Option<Millis>,
    #[serde(default)]
    approve: bool,
}

pub(super) fn json_answer<T: Serialize>(status: StatusCode, value: &T) -> Answer {
    saved::bytes(status, serde_json::to_vec(value).unwrap_or_default())
}

impl Service {
    pub(super) async fn members(&self, route: Route, request: Request<Incoming>, visitor: Visitor) -> Answer {
        let Some(hall) = &self.hall else {
            return text(
                StatusCode::NOT_FOUND,
                "this controller runs with --dev: everybody belongs, and nobody needs a token",
            );
        };
        let method = request.method().clone();
        if let (Route::Join, &Method::POST) = (&route, &method) {
            return self.join(hall, request, visitor.from).await;
        }
        let Some(peer) = visitor.peer.filter(|peer| hall.tls.members.knows(peer)) else {
            return self.strange();
        };
        let by = Actor { party: Some(peer.party.clone()), from: visitor.from };
        // Who may do what, the core knows.
        match (route, method) {
            (Route::Renew, Method::POST) => self.certificate(hall, &peer.party, &peer.key),
            (Route::Invitations, Method::POST) => self.invite(hall, by, request).await,
            (Route::Invitations, Method::GET) => {
                self.tell(self.ask(|reply| Inquiry::Invitations { by, reply }).await)
            }
            (Route::Invitation(id), Method::DELETE) => self.change(by, Change::Uninvite(id)).await,
            (Route::Waiting(node), Method::POST) => match self.whole_json(request).await {
                Ok(approval) => self.change(by, Change::Approve(node, Some(approval))).await,
                Err(answer) => answer,
            },
            (Route::Waiting(node), Method::DELETE) => self.change(by, Change::Approve(node, None)).await,
            (Route::Key, Method::GET) => self.tell(self.ask(|reply| Inquiry::Key { by, reply }).await),
            (Route::Key, Method::POST) => {
                let drawn = self.ask(|reply| Inquiry::DrawKey { by, reply }).await;
                self.made(drawn.map(|drawn| drawn.map(|key| DrawnKey { key })))
            }
            (Route::Key, Method::PUT) => match self.whole_json(request).await {
                Ok(delegation) => {
                    let rotated = self.ask(|reply| Inquiry::RotateKey { by, delegation, reply }).await;
                    self.made(rotated.map(|rotated| rotated.map(|()| json!({}))))
                }
                Err(answer) => answer,
            },
            (Route::Members, Method::GET) => {
                self.tell(self.ask(|reply| Inquiry::Members { by, reply }).await)
            }
            (Route::Node(node), Method::DELETE) => self.change(by, Change::Remove(Party::Node(node))).await,
            (Route::User(user), Method::DELETE) => self.change(by, Change::Remove(Party::User(user))).await,
            (Route::User(user), Method::POST) => match self.whole_json(request).await {
                Ok(change) => self.change(by, Change::Set(user, change)).await,
                Err(answer) => answer,
            },
            _ => text(StatusCode::METHOD_NOT_ALLOWED, "this is not done that way"),
        }
    }

    pub(super) async fn change(&self, by: Actor, change: Change) -> Answer {
        let changed = self.ask(|reply| Inquiry::Change { by, change, reply }).await;
        self.made(changed.map(|changed| changed.map(|()| json!({}))))
    }

    fn made<T: Serialize>(&self, made: Option<Result<T, NotChanged>>) -> Answer {
        match made {
            Some(Ok(made)) => json_answer(StatusCode::OK, &made),
            Some(Err(why)) => self.not_changed(&why),
            None => busy(),
        }
    }

    fn not_changed(&self, why: &NotChanged) -> Answer {
        let status = match why {
            NotChanged::Denied(denied) => return self.denied(denied),
            NotChanged::Unknown(_) => StatusCode::NOT_FOUND,
            NotChanged::LastAdmin(_)
            | NotChanged::TooManyRoles
            | NotChanged::NotRotated(_)
            | NotChanged::OtherKey(..) => StatusCode::CONFLICT,
            NotChanged::TooManyTokens => StatusCode::TOO_MANY_REQUESTS,
            NotChanged::SecretsFull => StatusCode::INSUFFICIENT_STORAGE,
        };
        text(status, why.to_string())
    }

    fn denied(&self, why: &Denied) -> Answer {
        self.refusals.refuse("role", format_args!("over HTTP: {why}"));
        text(StatusCode::FORBIDDEN, why.to_string())
    }

    pub(super) fn tell<T: Serialize>(&self, told: Option<Result<T, Denied>>) -> Answer {
        match told {
            Some(Ok(told)) => json_answer(StatusCode::OK, &told),
            Some(Err(why)) => self.denied(&why),
            None => busy(),
        }
    }

    pub(super) fn strange(&self) -> Answer {
        self.refusals.refuse("stranger", format_args!("a request without a member's certificate"));
        text(StatusCode::UNAUTHORIZED, "this takes the certificate of a member of the cluster")
    }

    async fn invite(&self, hall: &Hall, by: Actor, request: Request<Incoming>) -> Answer {
        let asked: Invite = match self.whole_json(request).await {
            Ok(asked) => asked,
            Err(answer) => return answer,
        };
        let life = asked.life.unwrap_or(Millis(INVITATION_MS)).min(Millis(INVITATION_MS_MAX));
        let (Ok(id), Ok(secret)) = (random::bytes(), random::bytes()) else {
            return text(StatusCode::INTERNAL_SERVER_ERROR, "the system gives no random numbers");
        };
        let (id, secret) = (InvitationId::from_bytes(id), Secret::from_bytes(secret));
        let invitation = Invitation::new(secret.digest(), asked.who, clock::now(), life);
        let invitation = Invitation { approve: asked.approve, ..invitation };
        let expires = invitation.expires;
        let change = Change::Invite(id, invitation);
        match self.ask(|reply| Inquiry::Change { by, change, reply }).await {
            Some(Ok(())) => {
                let controller = hall.about.url.trim_start_matches("https://").to_owned();
                let token = JoinToken { ca: hall.ca.key(), id, secret, controller };
                json_answer(
                    StatusCode::CREATED,
                    &json!({"token": token.to_string(), "id": id, "expires": expires}),
                )
            }
            Some(Err(why)) => self.not_changed(&why),
            None => busy(),
        }
    }

    async fn join(&self, hall: &Hall, request: Request<Incoming>, from: Option<IpAddr>) -> Answer {
        let request: JoinRequest = match self.whole_json(request).await {
            Ok(request) => request,
            Err(answer) => return answer,
        };
        let key = request.key;
        match self.ask(|reply| Inquiry::Join { from, request: Box::new(request), reply }).await {
            Some(Ok(Admission::Joins(party))) => self.certificate(hall, &party, &key),
            Some(Ok(Admission::Waits(told))) => json_answer(StatusCode::ACCEPTED, &told),
            Some(Err(why)) => {
                self.refusals.refuse("join", format_args!("one to join: {why}"));
                let status = match why {
                    NotJoined::NotInvited | NotJoined::Unproven => StatusCode::UNAUTHORIZED,
                    NotJoined::Full => StatusCode::INSUFFICIENT_STORAGE,
                    NotJoined::Nobody => StatusCode::BAD_REQUEST,
                    NotJoined::Other(_)
                    | NotJoined::NoNode(_)
                    | NotJoined::Taken(_)
                    | NotJoined::TokenWaits
                    | NotJoined::NameWaits(_) => StatusCode::CONFLICT,
                };
                text(status, why.to_string())
            }
            None => busy(),
        }
    }

    fn certificate(&self, hall: &Hall, party: &Party, key: &PublicKey) -> Answer {
        match hall.about.membership(&hall.ca, party, key) {
            Ok(membership) => json_answer(StatusCode::OK, &membership),
            Err(error) => {
                tracing::error!("no certificate for {party}: {error}");
                text(StatusCode::INTERNAL_SERVER_ERROR, "the controller cannot make a certificate")
            }
        }
    }

    pub(super) async fn ask<T>(&self, inquiry: impl FnOnce(oneshot::Sender<T>) -> Inquiry) -> Option<T> {
        let (reply, answer) = oneshot::channel();
        let asked = async {
            self.inquiries.send(inquiry(reply)).await.ok()?;
            answer.await.ok()
        };
        tokio::time::timeout(INQUIRY_TIMEOUT, asked).await.ok().flatten()
    }

    async fn whole_json<T: serde::de::DeserializeOwned>(
        &self,
        request: Request<Incoming>,
    ) -> Result<T, Answer> {
        // Nobody is known by it yet: who takes long over it is not waited for.
        let whole = tokio::time::timeout(HEADER_TIMEOUT, self.whole(request, REQUEST_BYTES_MAX)).await;
        let Ok(bytes) = whole else {
            return Err(text(StatusCode::REQUEST_TIMEOUT, "the request does not come"));
        };
        let bytes = bytes?;
        serde_json::from_slice(&bytes).map_err(|error| text(StatusCode::BAD_REQUEST, error.to_string()))
    }
}

pub(super) fn busy() -> Answer {
    text(StatusCode::SERVICE_UNAVAILABLE, "the controller is too busy to answer")
}
