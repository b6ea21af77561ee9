//! What HTTP asks the controller's loop for.

use std::net::IpAddr;

use berth_protocol::chunk::GrantRequest;
use berth_protocol::ids::{Epoch, Namespace, NodeId, PodId, SecretName, UserName};
use berth_protocol::join::{InvitationId, InvitationStatus, JoinRequest, UserChange};
use berth_protocol::message::query::SecretRow;
use berth_protocol::tls::Party;
use tokio::sync::oneshot;

use crate::core::members::{Invitation, NotGranted, NotJoined, NotRemoved};
use crate::core::secrets::{NoSecrets, NotKept, PodSecrets};
use crate::core::{Actor, Counters, Granted, Imported};

/// How the controller is, as its loop says.
#[derive(Debug)]
pub struct Report {
    pub bus_up: bool,
    pub counters: Counters,
    /// Of all chunks of checkpoints, and how many checkpoints there are.
    pub depot_bytes: u64,
    pub depot_checkpoints: u64,
}

/// A question to the loop.
#[derive(Debug)]
pub enum Inquiry {
    Report(oneshot::Sender<Report>),
    /// May this node save or load this pod?
    Grant {
        node: NodeId,
        asked: GrantRequest,
        reply: oneshot::Sender<Option<Granted>>,
    },
    /// A checkpoint that came from elsewhere is in the depot; answered once it is recorded.
    Import {
        imported: Box<Imported>,
        reply: oneshot::Sender<()>,
    },
    /// Answered once it is recorded, or why it is not.
    Invite {
        by: Actor,
        id: InvitationId,
        invitation: Invitation,
        reply: oneshot::Sender<Result<(), NotInvited>>,
    },
    Invitations(oneshot::Sender<Vec<InvitationStatus>>),
    /// Answered once it is recorded that it belongs, as whom, or why it does not.
    Join {
        from: Option<IpAddr>,
        request: Box<JoinRequest>,
        reply: oneshot::Sender<Result<Party, NotJoined>>,
    },
    /// Answered once it is recorded; false: there is none such.
    Uninvite {
        by: Actor,
        id: InvitationId,
        reply: oneshot::Sender<bool>,
    },
    /// Answered once it is recorded, or why it stays.
    Remove {
        by: Actor,
        party: Party,
        reply: oneshot::Sender<Result<(), NotRemoved>>,
    },
    /// Answered once it is recorded, or why it stays.
    Set {
        by: Actor,
        user: UserName,
        change: UserChange,
        reply: oneshot::Sender<Result<(), NotGranted>>,
    },
    Secrets {
        namespace: Namespace,
        reply: oneshot::Sender<Vec<SecretRow>>,
    },
    /// What a node may have for a pod.
    SecretsOf {
        node: NodeId,
        pod: PodId,
        epoch: Epoch,
        reply: oneshot::Sender<Result<PodSecrets, NoSecrets>>,
    },
    /// Answered once it is recorded, or why it is not; nothing sealed: it is removed.
    SetSecret {
        by: Actor,
        secret: (Namespace, SecretName),
        sealed: Option<String>,
        reply: oneshot::Sender<Result<(), NotKept>>,
    },
    /// For those who look it up.
    Refused {
        by: Actor,
        what: &'static str,
        on: String,
        why: String,
    },
}

/// Why somebody was not invited.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NotInvited {
    #[error(transparent)]
    NotGranted(#[from] NotGranted),
    #[error("there are too many open tokens already: let them expire, or revoke some")]
    TooMany,
}
