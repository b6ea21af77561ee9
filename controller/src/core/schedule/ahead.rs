//! The seat at which a pod that still runs would go on elsewhere. Charges nothing: whoever asks keeps the seat, or not.

use std::collections::BTreeSet;

use berth_protocol::ids::{NodeId, PodId};

use super::place::{Terms, charge_of};
use super::relocate::Reserved;
use crate::core::Controller;
use crate::core::moves::{foreseen, unsavable};

/// Rooms that are passed over for the pod's own sake before the search is given up.
const PASSED_MAX: usize = 32;

impl Controller {
    /// At `to`, or wherever the scheduler would have one more pod of the job now.
    pub(in crate::core) fn seat_ahead(&mut self, id: &PodId, to: Option<&NodeId>) -> Option<Reserved> {
        self.survey(&id.uid);
        let class = self.cluster.jobs.get(&id.uid)?.class?;
        let shape = self.scheduler.shape_of(class)?;
        let book = self.scheduler.classes.get(class)?.book();
        let seat = match to {
            Some(to) => {
                let room = self.scheduler.room(to)?;
                let eligible = self.scheduler.books.get(book)?.sites().get(room)?.eligible;
                let seat = self.scheduler.engine.place_in(&shape, room)?;
                (eligible && self.suits(id, room)).then_some(seat)?
            }
            None => {
                let job = self.cluster.jobs.get(&id.uid)?;
                let own = self.scheduler.room(&job.assignment(id.index)?.node)?;
                let mut zoned = self.scheduler.zoned(job);
                // It will have left its zone.
                let zone = self.scheduler.books.get(book)?.sites().get(own)?.zone;
                if let Some(pods) = zoned.get_mut(&zone) {
                    *pods = pods.saturating_sub(1);
                }
                let images = self.scheduler.images_of(&job.file.spec.pod);
                let (homes, but) = (self.homes(job), BTreeSet::from([own]));
                let mut terms = Terms { images, book, zoned, homes, but };
                loop {
                    let seat = self.scheduler.pick(&id.uid, &shape, &terms)?;
                    if self.suits(id, seat.room) {
                        break seat;
                    }
                    terms.but.insert(seat.room);
                    if terms.but.len() > PASSED_MAX {
                        return None;
                    }
                }
            }
        };
        let node = self.cluster.nodes.get(&self.scheduler.nodes[seat.room])?;
        let charge = charge_of(&shape, &seat, &node.record.inventory);
        Some(Reserved { seat, shape, charge })
    }

    /// Whether nothing of the pod's own, nor of what a checkpoint of it will need, stands against the room.
    fn suits(&self, id: &PodId, room: usize) -> bool {
        let suits = || {
            let node = self.cluster.nodes.get(&self.scheduler.nodes[room])?;
            let job = self.cluster.jobs.get(&id.uid)?;
            let assignment = job.assignment(id.index)?;
            let source = &self.cluster.nodes.get(&assignment.node)?.record.inventory;
            let spec = &job.file.spec;
            let gpus: Vec<String> = assignment.charge.gpus.iter().map(|share| share.uuid.clone()).collect();
            let saves = unsavable(spec, source).is_none();
            let lacks = saves && !foreseen(spec, source, &gpus).lacking(&node.record.inventory).is_empty();
            let free = !self.scheduler.holds.is_held(room) && !node.record.strays.contains_key(id);
            Some(free && !lacks && self.bars_but_target(id, &self.scheduler.nodes[room]).is_empty())
        };
        suits().unwrap_or(false)
    }
}
