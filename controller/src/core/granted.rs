//! Which node may save or load which pod, and where it finds chunks.

use berth_protocol::chunk::{GrantFor, GrantRequest};
use berth_protocol::ids::{Digest, Namespace, NodeId};
use berth_protocol::message::node::{ChunkServer, ServerIdentity};
use berth_protocol::tls::Party;

use super::Controller;
use super::cluster::Liveness;

/// What a node is told that may save or load.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Granted {
    /// The pod's.
    pub namespace: Namespace,
    /// The depot's address, and by what it is known.
    pub url: String,
    pub tls: Option<ServerIdentity>,
    /// Likewise another node that has the chunks too.
    pub holder: Option<(ChunkServer, Option<ServerIdentity>)>,
}

impl Controller {
    /// Where this node finds chunks, if it may save or load this pod.
    pub fn grant(&self, node: &NodeId, asked: &GrantRequest) -> Option<Granted> {
        let here = self.cluster.nodes.get(node)?.pods.get(&asked.pod) == Some(&asked.epoch);
        let job = self.cluster.jobs.get(&asked.pod.uid)?;
        let assignment = job.assignment(asked.pod.index)?;
        let may = match asked.what {
            GrantFor::Save => here,
            GrantFor::Load { checkpoint } => {
                here && assignment.from == Some(checkpoint) || self.is_staged(node, asked, checkpoint)
            }
        };
        may.then(|| {
            let holder = match asked.what {
                GrantFor::Load { checkpoint } => self.holder(&checkpoint).filter(|(id, _)| *id != node),
                GrantFor::Save => None,
            };
            Granted {
                namespace: job.file.spec.namespace.clone(),
                url: self.config.depot_url.clone(),
                tls: self.identity_of(Party::Controller),
                holder: holder
                    .map(|(id, server)| (server.clone(), self.identity_of(Party::Node(id.clone())))),
            }
        })
    }

    /// The node that took the checkpoint, where it serves what it keeps.
    fn holder(&self, checkpoint: &Digest) -> Option<(&NodeId, &ChunkServer)> {
        let id = self.cluster.checkpoints.get(checkpoint)?.node.as_ref()?;
        let node = self.cluster.nodes.get(id).filter(|node| node.liveness == Liveness::Online)?;
        Some((id, node.session.as_ref()?.chunks.as_ref()?))
    }
}
