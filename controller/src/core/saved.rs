//! What users see of checkpoints: rows, and one whole. Changes nothing.

use berth_protocol::ids::{Digest, JobName};
use berth_protocol::job;
use berth_protocol::limits::QUERY_PAGE_ROWS_MAX;
use berth_protocol::message::query::{CheckpointDetail, CheckpointRow, NodeVerdict, QueryError};

use super::callers::{Caller, Sight};
use super::checkpoints::Checkpoint;
use super::query::{Answer, not_found, page, value};
use super::{Controller, Now};

impl Controller {
    pub(super) fn checkpoints_page(
        &self,
        sight: &Sight,
        job: Option<&JobName>,
        after: Option<&str>,
    ) -> Answer {
        let mut rows: Vec<(String, CheckpointRow)> = self
            .cluster
            .checkpoints
            .iter()
            .filter(|(_, found)| sight.covers(&found.spec.namespace))
            .filter(|(_, found)| job.is_none_or(|job| found.spec.name == *job))
            .map(|(id, found)| {
                // The newest of a pod first.
                let age = u64::MAX - found.info.at.0;
                let (namespace, name) = (&found.spec.namespace, &found.spec.name);
                let key = format!("{namespace}/{name}/{:06}/{age:020}/{}", found.index, id.hex());
                (key, self.checkpoint_row(id, found))
            })
            .filter(|(key, _)| after.is_none_or(|after| key.as_str() > after))
            .collect();
        rows.sort_by(|a, b| a.0.cmp(&b.0));
        page(rows.into_iter())
    }

    fn checkpoint_row(&self, id: &Digest, found: &Checkpoint) -> CheckpointRow {
        let pod = found.spec.name.pod(found.index);
        let own = self.cluster.jobs.get(&found.uid).and_then(|job| job.pod(found.index));
        let place = own.and_then(|pod| pod.saved.checkpoints.iter().position(|other| other == id));
        let kept = match place {
            Some(0) => format!("the last of pod {pod}"),
            Some(n) => format!("{n} before the last of pod {pod}"),
            None if found.imported.is_some() => "imported".to_owned(),
            None => "another job began with it".to_owned(),
        };
        CheckpointRow {
            id: *id,
            namespace: found.spec.namespace.clone(),
            job: found.spec.name.clone(),
            pod,
            epoch: found.epoch,
            kind: found.info.kind,
            at: found.info.at,
            bytes: found.info.bytes,
            new_bytes: found.info.new_bytes,
            frozen_ms: found.info.frozen_ms,
            node: found.node.clone(),
            kept,
        }
    }

    /// One by its digest, or by a beginning of its digits that names only one.
    pub(super) fn checkpoint_detail(&self, now: Now, caller: &Caller, sight: &Sight, id: &str) -> Answer {
        let digits = id.strip_prefix("sha256:").unwrap_or(id);
        let theirs = |found: &Checkpoint| sight.covers(&found.spec.namespace);
        let mut all = self
            .cluster
            .checkpoints
            .iter()
            .filter(|(id, found)| theirs(found) && !digits.is_empty() && id.hex().starts_with(digits));
        let Some((id, found)) = all.next() else {
            return Err(not_found(format!("there is no checkpoint {id}")));
        };
        if all.next().is_some() {
            let message = format!("more than one checkpoint begins with {digits}: write more of its digits");
            return Err(QueryError { code: "Invalid".to_owned(), message });
        }
        let nodes = self.cluster.nodes.keys().take(QUERY_PAGE_ROWS_MAX).map(|node| {
            let reasons = self.unfit_for(id, node);
            let has_image = self.scheduler.has_images(&found.spec.pod, node);
            NodeVerdict { node: node.clone(), fits: reasons.is_empty(), reasons, pods: Vec::new(), has_image }
        });
        value(&CheckpointDetail {
            row: self.checkpoint_row(id, found),
            info: found.info.clone(),
            spec: job::render(&found.spec),
            nodes: nodes.collect(),
            depot: Some(self.depot(now, caller, found.spec.namespace.clone())),
        })
    }
}
