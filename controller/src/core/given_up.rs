//! Machines that an operator has given up (fencing, rules 12 and 15): what else is silent, or how long yet, does not matter.

use berth_protocol::ids::NodeId;
use berth_protocol::message::query::QueryError;
use berth_protocol::units::Millis;
use serde::{Deserialize, Serialize};

use super::cluster::Liveness;
use super::notes::Note;
use super::query::not_found;
use super::silence::SILENT_AFTER;
use super::{Controller, Now};

/// An operator's word on a node; stored with it, until it is heard again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct GivenUp {
    /// Nothing runs there: what goes on without a controller does not, either. For all else leases say so.
    pub powered_off: bool,
}

impl Controller {
    /// The node is lost from now on, as after a minute of silence.
    pub(super) fn give_up(&mut self, now: Now, id: &NodeId, powered_off: bool) -> Result<(), QueryError> {
        let Some(node) = self.cluster.nodes.get_mut(id) else {
            return Err(not_found(format!("there is no node {id}")));
        };
        let quiet = Millis(now.boot.since(node.heard).0 / 1000 * 1000);
        if node.liveness == Liveness::Online {
            let message = format!(
                "node {id} is there, heard {quiet} ago: `berth drain {id}` empties it. One that has just been switched off \
                 counts as silent after {SILENT_AFTER}"
            );
            return Err(QueryError { code: "NodeOnline".to_owned(), message });
        }
        let before = node.record.given_up;
        let powered_off = powered_off || before.is_some_and(|before| before.powered_off);
        let given_up = Some(GivenUp { powered_off });
        if before == given_up {
            return Ok(());
        }
        (node.record.given_up, node.liveness) = (given_up, Liveness::Lost);
        let note = Note::NodeGivenUp { node: id.clone(), quiet, pods: node.pods.len(), powered_off };
        self.note(note);
        self.dirty.nodes.insert(id.clone());
        self.dirty.states.insert(id.clone());
        self.touch_pods(id);
        self.refresh_room(id);
        self.judge_blindness(now);
        self.watch(id, now);
        Ok(())
    }
}
