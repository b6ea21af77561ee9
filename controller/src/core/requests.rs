//! Which requests took effect: what comes again, from whoever was not answered or from a broker that kept it, changes
//! nothing.

use std::collections::{BTreeMap, BTreeSet};

use berth_protocol::ids::RequestId;
use berth_protocol::limits::REQUEST_ID_KEPT_MS;
use berth_protocol::units::Timestamp;

use super::callers::Author;
use super::{Controller, Now, Write, records};

/// Ids remembered; beyond, the oldest are forgotten before their time.
const REQUESTS_MAX: usize = 8 * 1024;

/// Ids of those that took effect, and when.
#[derive(Default)]
pub(super) struct Requests {
    at: BTreeMap<RequestId, Timestamp>,
    /// The same, oldest first.
    by_age: BTreeSet<(Timestamp, RequestId)>,
    /// Up to when something may have been signed that was taken and is forgotten.
    floor: Option<Timestamp>,
}

impl Requests {
    pub fn contains(&self, id: &RequestId) -> bool {
        self.at.contains_key(id)
    }

    /// Is it too old for anybody to remember whether it was taken?
    pub fn may_have_forgotten(&self, signed: Timestamp) -> bool {
        self.floor.is_some_and(|floor| signed <= floor)
    }

    pub fn insert(&mut self, id: RequestId, at: Timestamp) {
        self.by_age.insert((at, id.clone()));
        self.at.insert(id, at);
        if self.at.len() >= REQUESTS_MAX {
            self.floor = self.floor.max(self.by_age.first().map(|(at, _)| *at));
        }
    }

    /// The oldest, where it is older than `since`, or there are too many.
    fn pop(&mut self, since: Timestamp) -> Option<RequestId> {
        let full = self.at.len() > REQUESTS_MAX;
        let (at, id) = self.by_age.first().filter(|(at, _)| full || *at <= since).cloned()?;
        self.by_age.remove(&(at, id.clone()));
        self.at.remove(&id);
        Some(id)
    }
}

impl Controller {
    /// `by` has signed it, if anybody: it is not forgotten as long as the signature is good.
    pub(super) fn remember_request(&mut self, now: Now, id: RequestId, by: Option<&Author>) {
        let signed = by.and_then(|by| by.signed.as_ref()).map(|signing| signing.at);
        let at = signed.map_or(now.wall, |signed| signed.max(now.wall));
        self.dirty.step.writes.push(records::write(records::request(&id), &at));
        self.cluster.requests.insert(id, at);
        self.forget_requests(now);
    }

    pub(super) fn forget_requests(&mut self, now: Now) {
        let since = Timestamp(now.wall.0.saturating_sub(REQUEST_ID_KEPT_MS));
        while let Some(id) = self.cluster.requests.pop(since) {
            self.dirty.step.writes.push(Write { key: records::request(&id), value: None });
        }
    }
}
