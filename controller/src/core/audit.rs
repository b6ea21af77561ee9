//! Who has asked for what, and what came of it: an entry in the very transaction that it took effect with. Entries are
//! written and never changed; the store keeps them apart, for nobody here reads them.

use berth_protocol::message::query::{AuditRow, Outcome};
use berth_protocol::units::{Millis, Timestamp};

use super::callers::Actor;
use super::{Controller, Now, records};

/// Refusals that one minute may leave: whoever asks for what they may not cannot fill the store.
const REFUSED_PER_MINUTE_MAX: u32 = 120;
const MINUTE: Millis = Millis(60_000);
/// Of a name or a reason, which come from outside.
const TEXT_BYTES_MAX: usize = 512;

/// What entries cost, and where they stand.
#[derive(Default)]
pub(super) struct Audit {
    /// Entries of this term so far.
    written: u64,
    /// Refusals since then.
    refused: (Timestamp, u32),
}

impl Controller {
    pub(super) fn audit(&mut self, now: Now, actor: &Actor, what: &str, on: String) {
        self.enter(now, actor, what, on, Outcome::Accepted, None);
    }

    pub(super) fn audit_refused(&mut self, now: Now, actor: &Actor, what: &str, on: String, why: String) {
        let (since, count) = &mut self.audit.refused;
        if now.wall.since(*since) >= MINUTE || now.wall < *since {
            (*since, *count) = (now.wall, 0);
        }
        *count += 1;
        if *count <= REFUSED_PER_MINUTE_MAX {
            self.enter(now, actor, what, on, Outcome::Refused, Some(why));
        }
    }

    fn enter(
        &mut self,
        now: Now,
        actor: &Actor,
        what: &str,
        mut on: String,
        outcome: Outcome,
        mut why: Option<String>,
    ) {
        for text in std::iter::once(&mut on).chain(&mut why) {
            text.truncate(text.floor_char_boundary(TEXT_BYTES_MAX));
        }
        let row = AuditRow {
            at: now.wall,
            who: actor.party.as_ref().map(ToString::to_string),
            from: actor.from,
            what: what.to_owned(),
            on,
            outcome,
            why,
        };
        self.audit.written += 1;
        let key = records::audit(now.wall, self.config.term, self.audit.written);
        self.dirty.step.writes.push(records::write(key, &row));
    }
}
