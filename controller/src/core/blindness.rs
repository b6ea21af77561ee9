//! Whether it is the nodes that are silent, or the controller that hears nothing (fencing, rule 12).

use berth_protocol::ids::NodeId;

use super::cluster::Liveness;
use super::notes::Note;
use super::{Controller, Now};

/// Fewer silent nodes never count as the controller's own blindness.
const BLIND_NODES_MIN: usize = 3;

impl Controller {
    /// More than half of the nodes silent at once, or no bus: then it is the controller that hears nothing.
    pub(super) fn judge_blindness(&mut self, now: Now) {
        let present = || self.cluster.nodes.values().filter(|node| node.liveness != Liveness::Lost);
        let silent = present().filter(|node| node.liveness == Liveness::Silent).count();
        let blind = !self.bus_up || (silent >= BLIND_NODES_MIN && silent * 2 > present().count());
        if self.blind != blind {
            self.blind = blind;
            if !blind {
                self.count_silence_anew(now);
            }
            let nodes = self.cluster.nodes.values().filter(|node| node.liveness != Liveness::Lost).count();
            self.note(if blind { Note::Blind { silent, nodes } } else { Note::Sighted });
            let silent = self.cluster.nodes.iter().filter(|(_, node)| node.liveness == Liveness::Silent);
            self.dirty.states.extend(silent.map(|(id, _)| id.clone()));
        }
    }

    /// Silence says something of the nodes.
    pub(super) fn hears(&self) -> bool {
        self.bus_up && !self.blind
    }

    /// Whoever was silent while the controller heard nothing gets the whole time again.
    pub(super) fn count_silence_anew(&mut self, now: Now) {
        let ids: Vec<NodeId> = self.cluster.nodes.keys().cloned().collect();
        for id in ids {
            let Some(node) = self.cluster.nodes.get_mut(&id) else { continue };
            if node.liveness != Liveness::Lost {
                node.heard = now.boot;
            }
            self.watch(&id, now);
        }
    }
}
