//! Secrets over HTTP, on no other way: users set them, nodes fetch those of pods that they were given. Nobody reads one back.

use berth_protocol::ids::{Epoch, Namespace, NodeId, PodId, SecretName};
use berth_protocol::limits::SECRET_BYTES_MAX;
use berth_protocol::secret::SecretValues;
use berth_protocol::tls::Party;
use berth_protocol::token::Scope;
use hyper::body::Incoming;
use hyper::{Method, Request, StatusCode};

use super::members::{busy, json_answer};
use super::{Answer, Inquiry, Service, Visitor, number, text};
use crate::core::Actor;
use crate::core::manage::Change;
use crate::core::secrets::PodSecrets;

#[derive(Debug, PartialEq, Eq)]
pub(super) enum Route {
    All(Namespace),
    One(Namespace, SecretName),
    OfPod(PodId, Epoch),
}

impl Route {
    pub fn parse(levels: &[&str]) -> Option<Self> {
        Some(match levels {
            ["v1", "secrets", namespace] => Self::All(Namespace::parse(namespace).ok()?),
            ["v1", "secrets", namespace, name] => {
                Self::One(Namespace::parse(namespace).ok()?, SecretName::parse(name).ok()?)
            }
            ["v1", "pods", uid, index, epoch, "secrets"] => {
                let pod = berth_protocol::ids::JobUid::parse(uid).ok()?.pod(number(index)?);
                Self::OfPod(pod, Epoch(number(epoch)?))
            }
            _ => return None,
        })
    }
}

impl Service {
    pub(super) async fn secrets(&self, route: Route, request: Request<Incoming>, visitor: Visitor) -> Answer {
        match (route, request.method().clone()) {
            (Route::OfPod(pod, epoch), Method::GET) => match self.node_of(&request, &visitor) {
                Ok(node) => self.secrets_of(node, pod, epoch).await,
                Err(answer) => *answer,
            },
            (Route::All(namespace), Method::GET) => match self.user_of(&request, &visitor, &namespace) {
                Ok(by) => self.tell(self.ask(|reply| Inquiry::Secrets { by, namespace, reply }).await),
                Err(answer) => *answer,
            },
            (Route::One(namespace, name), Method::PUT | Method::DELETE) => {
                match self.user_of(&request, &visitor, &namespace) {
                    Ok(by) => self.set_secret(by, namespace, name, request).await,
                    Err(answer) => *answer,
                }
            }
            _ => text(
                StatusCode::METHOD_NOT_ALLOWED,
                "secrets are set, listed and removed, and never read back",
            ),
        }
    }

    /// By its certificate, for tokens travel through the broker; where nobody has one, by its token.
    fn node_of(&self, request: &Request<Incoming>, visitor: &Visitor) -> Result<NodeId, Box<Answer>> {
        let Some(hall) = &self.hall else {
            return match self.scope(request) {
                Ok(Scope::Node(node)) => Ok(node),
                Ok(_) => Err(self.forbidden().into()),
                Err(why) => Err(text(StatusCode::UNAUTHORIZED, why).into()),
            };
        };
        match visitor.peer.as_ref().filter(|peer| hall.tls.members.knows(peer)).map(|peer| &peer.party) {
            Some(Party::Node(node)) => Ok(node.clone()),
            _ => Err(self.strange().into()),
        }
    }

    /// Who asks: by the certificate, and what they may the core knows; where nobody has one, the token is the namespace's.
    fn user_of(
        &self,
        request: &Request<Incoming>,
        visitor: &Visitor,
        namespace: &Namespace,
    ) -> Result<Actor, Box<Answer>> {
        let Some(hall) = &self.hall else {
            return match self.scope(request) {
                Ok(Scope::Namespace(own)) if own == *namespace => {
                    Ok(Actor { party: None, from: visitor.from })
                }
                Ok(_) => Err(self.forbidden().into()),
                Err(why) => Err(text(StatusCode::UNAUTHORIZED, why).into()),
            };
        };
        let peer = visitor.peer.as_ref().filter(|peer| hall.tls.members.knows(peer));
        let peer = peer.ok_or_else(|| self.strange())?;
        Ok(Actor { party: Some(peer.party.clone()), from: visitor.from })
    }

    async fn set_secret(
        &self,
        by: Actor,
        namespace: Namespace,
        name: SecretName,
        request: Request<Incoming>,
    ) -> Answer {
        let sealed = if *request.method() == Method::PUT {
            let value = match self.whole(request, SECRET_BYTES_MAX).await {
                Ok(value) => value,
                Err(answer) => return answer,
            };
            match self.vault.seal(&namespace, &name, &value) {
                Ok(sealed) => Some(sealed),
                Err(error) => {
                    tracing::error!("a secret cannot be sealed: {error}");
                    return text(StatusCode::INTERNAL_SERVER_ERROR, "the secret cannot be sealed");
                }
            }
        } else {
            None
        };
        self.change(by, Change::Secret(namespace, name, sealed)).await
    }

    async fn secrets_of(&self, node: NodeId, pod: PodId, epoch: Epoch) -> Answer {
        let PodSecrets { namespace, sealed } =
            match self.ask(|reply| Inquiry::SecretsOf { node, pod, epoch, reply }).await {
                Some(Ok(secrets)) => secrets,
                Some(Err(why)) => {
                    self.refusals.refuse("secrets", format_args!("a node a pod's secrets: {why}"));
                    return text(StatusCode::NOT_FOUND, why.to_string());
                }
                None => return busy(),
            };
        let mut values = SecretValues::default();
        for (name, sealed) in sealed {
            match self.vault.open(&namespace, &name, &sealed) {
                Some(value) => values.insert(name, value),
                None => {
                    let why = format!("secret {name} of namespace {namespace} is damaged: set it again");
                    tracing::error!("{why}");
                    return text(StatusCode::INTERNAL_SERVER_ERROR, why);
                }
            }
        }
        json_answer(StatusCode::OK, &values)
    }
}
