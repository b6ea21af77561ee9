//! What a node says it has, cut down to what a machine could have: sums over a fleet stay far from overflow, and no
//! device counts twice. Whatever else a node claims is taken as it is; below what runs there, nothing is free. And what
//! follows when it says something else.

use std::collections::BTreeSet;

use berth_protocol::ids::NodeId;
use berth_protocol::limits::GPUS_PER_NODE_MAX;
use berth_protocol::resources::Inventory;
use berth_protocol::units::{Bytes, MilliCpu};

use super::{Controller, Note};

const CPU_MAX: MilliCpu = MilliCpu(1_000_000 * 1000);
const MEMORY_MAX: Bytes = Bytes(1 << 50);
const DISK_MAX: Bytes = Bytes(1 << 60);

/// Cuts the inventory down; what was beyond belief, in words.
fn cut(has: &mut Inventory) -> Vec<String> {
    let mut cut = Vec::new();
    if has.cpu > CPU_MAX {
        cut.push(format!("{} cores", has.cpu));
        has.cpu = CPU_MAX;
    }
    if has.memory > MEMORY_MAX {
        cut.push(format!("{} of memory", has.memory));
        has.memory = MEMORY_MAX;
    }
    if has.disk > DISK_MAX {
        cut.push(format!("{} of disk", has.disk));
        has.disk = DISK_MAX;
    }
    if has.gpus.len() > GPUS_PER_NODE_MAX {
        cut.push(format!("{} GPUs", has.gpus.len()));
        has.gpus.truncate(GPUS_PER_NODE_MAX);
    }
    let mut seen = BTreeSet::new();
    let before = has.gpus.len();
    has.gpus.retain(|gpu| seen.insert(gpu.uuid.clone()));
    if has.gpus.len() < before {
        cut.push(format!("{} GPUs with the identity of another", before - has.gpus.len()));
    }
    for gpu in has.gpus.iter_mut().filter(|gpu| gpu.memory > MEMORY_MAX) {
        cut.push(format!("{} of memory on GPU {}", gpu.memory, gpu.uuid));
        gpu.memory = MEMORY_MAX;
    }
    cut
}

impl Controller {
    /// The inventory as far as it can be; told once, when it is new.
    pub(super) fn believed(&mut self, id: &NodeId, mut claimed: Inventory) -> Inventory {
        let cut = cut(&mut claimed);
        let known = self.cluster.nodes.get(id).is_some_and(|node| node.record.inventory == claimed);
        if !cut.is_empty() && !known {
            self.note(Note::InventoryCut { node: id.clone(), claims: cut.join(", ") });
        }
        claimed
    }

    /// The node has something else than before.
    pub(super) fn inventory_changed(&mut self, id: &NodeId, claimed: Inventory) {
        let has = self.believed(id, claimed);
        let Some(node) = self.cluster.nodes.get_mut(id) else { return };
        let only_images = has.is_but_for_images(&node.record.inventory);
        node.record.inventory = has;
        self.dirty.nodes.insert(id.clone());
        // Images come and go with the pods themselves: nothing fits for them that did not, and nobody is told.
        if !only_images {
            node.version += 1;
            self.dirty.states.insert(id.clone());
            self.refresh_room(id);
        }
        self.restock(id);
    }

    /// The scheduler learns which images the node holds.
    pub(super) fn restock(&mut self, id: &NodeId) {
        if let Some(node) = self.cluster.nodes.get(id) {
            self.scheduler.restock(id, &node.record.inventory.images);
        }
    }
}
