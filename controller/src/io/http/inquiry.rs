//! What HTTP asks the controller's loop for.

use std::net::IpAddr;

use berth_protocol::chunk::GrantRequest;
use berth_protocol::delegation::Delegation;
use berth_protocol::ids::{Epoch, Namespace, NodeId, PodId};
use berth_protocol::join::{InvitationStatus, JoinRequest, KeyStatus, MemberStatus};
use berth_protocol::message::query::SecretRow;
use berth_protocol::sign::PublicKey;
use tokio::sync::oneshot;

use crate::core::approval::Admission;
use crate::core::manage::{Change, NotChanged};
use crate::core::members::NotJoined;
use crate::core::secrets::{NoSecrets, PodSecrets};
use crate::core::{Actor, Counters, Denied, Granted, Imported};

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
    /// Answered once it is recorded, or why it is not made.
    Change {
        by: Actor,
        change: Change,
        reply: oneshot::Sender<Result<(), NotChanged>>,
    },
    Key {
        by: Actor,
        reply: oneshot::Sender<Result<KeyStatus, Denied>>,
    },
    /// Answered with one that is kept until the root has named it, or another is drawn.
    DrawKey {
        by: Actor,
        reply: oneshot::Sender<Result<PublicKey, NotChanged>>,
    },
    /// Answered once what was drawn signs, or why not.
    RotateKey {
        by: Actor,
        delegation: Box<Delegation>,
        reply: oneshot::Sender<Result<(), NotChanged>>,
    },
    Invitations {
        by: Actor,
        reply: oneshot::Sender<Result<Vec<InvitationStatus>, Denied>>,
    },
    Members {
        by: Actor,
        reply: oneshot::Sender<Result<Vec<MemberStatus>, Denied>>,
    },
    Secrets {
        by: Actor,
        namespace: Namespace,
        reply: oneshot::Sender<Result<Vec<SecretRow>, Denied>>,
    },
    /// Answered once it is recorded that it belongs, or waits, as whom, or why it does not.
    Join {
        from: Option<IpAddr>,
        request: Box<JoinRequest>,
        reply: oneshot::Sender<Result<Admission, NotJoined>>,
    },
    /// What a node may have for a pod.
    SecretsOf {
        node: NodeId,
        pod: PodId,
        epoch: Epoch,
        reply: oneshot::Sender<Result<PodSecrets, NoSecrets>>,
    },
}
