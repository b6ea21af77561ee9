//! Whether a controller still leads, where several share a store (fencing, rule 3): as long as its lease there does, by
//! its own clock and counted from the send of the last renewal that was answered.

use berth_protocol::rule::{Rule, kept};
use berth_protocol::units::{BootMs, Millis};

/// A leader of which the store has heard nothing for so long leads no more.
pub const LEASE: Millis = Millis(3_000);
/// Its renewals.
pub const RENEW: Millis = Millis(1_000);
/// After the send of a renewal nobody else leads for so long: what is left of the lease is margin.
const LEADS_FOR: Millis = Millis(2_000);
/// A leader waits that long for its store; then it ends, to be started again.
pub const PATIENCE: Millis = Millis(15_000);

const _: () = assert!(RENEW.0 < LEADS_FOR.0 && LEADS_FOR.0 < LEASE.0 && LEASE.0 < PATIENCE.0);

/// How long nobody else leads, on CLOCK_BOOTTIME.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tenure {
    until: BootMs,
}

impl Tenure {
    /// By a renewal sent then and answered since.
    pub fn renewed(sent: BootMs) -> Self {
        Self { until: sent.plus(LEADS_FOR) }
    }

    /// May what the leader decided up to now still be said? A grant counts from a heartbeat that came before, and so is
    /// one that the next leader waits out, however long it is on its way from here on.
    pub fn holds(self, now: BootMs) -> bool {
        now < self.until || !kept(Rule::LeadersLease)
    }
}
