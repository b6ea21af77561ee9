//! What an operator reads in the controller's log: what became of nodes, one line each. `io` writes them once the
//! step that made them is durable.

use std::fmt;

use berth_protocol::ids::{Namespace, NodeId, PodName};
use berth_protocol::sign::Fingerprint;
use berth_protocol::units::Millis;

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Note {
    NodeOnline(NodeId),
    NodeSilent {
        node: NodeId,
        pods: usize,
    },
    NodeLost {
        node: NodeId,
        quiet: Millis,
        pods: usize,
    },
    NodeGivenUp {
        node: NodeId,
        quiet: Millis,
        pods: usize,
        powered_off: bool,
    },
    /// More than half of the nodes fell silent at once, or the bus did.
    Blind {
        silent: usize,
        nodes: usize,
    },
    Sighted,
    /// It claims what no machine has; that much was not believed.
    InventoryCut {
        node: NodeId,
        claims: String,
    },
    /// A node says that its machine is about to go.
    NodeLeaves {
        node: NodeId,
        within: Millis,
        why: String,
        pods: usize,
    },
    NodeStays(NodeId),
    /// For an admin's word.
    NodeWaits {
        node: NodeId,
        fingerprint: Fingerprint,
    },
    /// Its messages are not read.
    OtherVersion {
        node: NodeId,
        why: String,
    },
    /// Two machines say that they are it.
    NodeCloned(NodeId),
    /// Of the key that signs orders, near or past.
    KeyEnds(String),
    /// A pod moves without what was to be there before it.
    StagingFailed {
        namespace: Namespace,
        pod: PodName,
        node: NodeId,
        why: String,
    },
}

impl Note {
    /// Does someone have to look?
    pub fn is_warning(&self) -> bool {
        matches!(
            self,
            Self::NodeSilent { .. }
                | Self::NodeLost { .. }
                | Self::NodeGivenUp { .. }
                | Self::Blind { .. }
                | Self::InventoryCut { .. }
                | Self::NodeLeaves { .. }
                | Self::OtherVersion { .. }
                | Self::StagingFailed { .. }
                | Self::NodeCloned(_)
                | Self::KeyEnds(_)
        )
    }
}

impl fmt::Display for Note {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NodeOnline(node) => write!(f, "node {node} is online"),
            Self::NodeSilent { node, pods } => write!(f, "node {node} is silent; {pods} pods are on it"),
            Self::NodeLost { node, quiet, pods } => {
                write!(
                    f,
                    "node {node} is lost, silent for {quiet}; {pods} pods go elsewhere once their leases are over"
                )
            }
            Self::NodeGivenUp { node, quiet, pods, powered_off } => {
                let as_what = if *powered_off { ", as powered off" } else { "" };
                write!(
                    f,
                    "node {node} was given up{as_what}, silent for {quiet}; {pods} pods go elsewhere once their leases are over"
                )
            }
            Self::Blind { silent, nodes } => write!(
                f,
                "{silent} of {nodes} nodes fell silent at once, or the broker did: taken for a fault of this side; no \
                 pod is replaced until they are heard"
            ),
            Self::InventoryCut { node, claims } => {
                write!(f, "node {node} claims {claims}: more than is believed, so less is counted")
            }
            Self::NodeLeaves { node, within, why, pods } => {
                write!(f, "node {node} is about to go ({why}): its {pods} pods leave it within {within}")
            }
            Self::StagingFailed { namespace, pod, node, why } => write!(
                f,
                "what pod {namespace}/{pod} needs could not be brought to node {node} ahead of it: {why}; it moves \
                 without"
            ),
            Self::NodeWaits { node, fingerprint } => write!(
                f,
                "a machine waits to be let in as node {node}, with key {fingerprint}: `berth node approve {node}`, or deny"
            ),
            Self::KeyEnds(ending) => f.write_str(ending),
            Self::OtherVersion { node, why } => write!(f, "node {node} is refused: {why}"),
            Self::NodeStays(node) => write!(f, "node {node} stays after all, and takes pods again"),
            Self::NodeCloned(node) => write!(
                f,
                "two machines say that they are node {node}, as where a disk was copied: neither gets a lease until one of \
                 them has been silent for a minute; switch off the copy, or remove its data directory"
            ),
            Self::Sighted => write!(f, "nodes are heard again; each has the whole time anew"),
        }
    }
}
