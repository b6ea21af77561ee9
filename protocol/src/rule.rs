//! The rules that keep a pod from running twice and from being lost, by name, so that the simulator can play without
//! one of them. It shows that each is needed: a history that goes wrong must be found.
//!
//! A Cargo feature would not do: one build of several packages unifies features, and the programs would get what the
//! simulator's crate turned on. The profile decides instead: without debug assertions, as in every release, `kept` is
//! the constant `true`, and nothing can change it.

/// One rule, and the run that breaks without it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Rule {
    /// A grant names (pod, epoch). Else: a node that was lost comes back, hears a lease before its orders, and thaws a
    /// pod that runs elsewhere by now.
    GrantsNameEpochs,
    /// A grant answers a heartbeat of this very session. Else: a lease for the fifth heartbeat of the last session
    /// prolongs what the fifth of this one asked for.
    GrantsOfThisSession,
    /// A grant counts from the moment its heartbeat was sent. Else: one that was long on its way outlasts what the
    /// controller waits for.
    GrantsCountFromSend,
    /// Orders older than those held are refused. Else: a set that waited in a queue brings back what is over.
    OrdersNeverGoBack,
    /// A pod starts only when its earlier epoch on the same node is gone. Else: both run side by side.
    PredecessorGone,
    /// The end of an earlier run is not that of the current one. Else: a late word of the first run ends the epoch on
    /// the books, while the second runs.
    RunsAreTold,
    /// What the controller did not name stands still, and is not ended. Else: an empty set kills what a restored
    /// store forgot.
    UnnamedIsFrozen,
    /// The agent ends a pod whose shim does not fence it. Else: a shim that hangs lets its pod run for ever.
    AgentChecksDeadlines,
    /// Failures of earlier epochs count on the node too. Else: every placement begins a new count.
    FailuresTravel,
    /// A silent node's pod is replaced only when its lease is over as well. Else: a pod with a long grace still runs.
    ReplaceAfterLease,
    /// That lease is the one of the spec placed. Else: a file submitted since says `pause` of a pod that goes on.
    LeaseOfSpecPlaced,
    /// A controller that starts knows nothing of the grants before, and counts them from now.
    RestartWaits,
    /// A result counts for the epoch that is placed. Else: the end of an old one ends the new.
    ResultsNameEpochs,
    /// Events are taken in order, each once. Else: a failure sent twice counts twice.
    EventsOnce,
    /// What a scan does not find is gone only when the events before it are in. Else: a result is thrown away.
    AbsenceAfterEvents,
    /// A scan finds what lives, whatever the ledger says. Else: an agent installed anew attests that nothing does.
    ScanFindsAll,
    /// Another machine of the same name is refused while pods are there. Else: a cloned disk attests that they are gone.
    OtherHardware,
    /// A session older than the last is refused. Else: a hello that was long on its way attests an old scan.
    SessionsGrow,
    /// A node that confirms no grant counts as silent. Else: its pods stand still, and are shown as running.
    GrantsConfirmed,
    /// A clock that stood still gets no grant.
    ClocksCompare,
    /// A command's id that was seen changes nothing. Else: `restart`, delivered twice, restarts twice.
    CommandsOnce,
    /// A dead shim's pod dies with it.
    DeadShimKills,
    /// The controller's writes are durable before anybody hears of them. Else: an epoch is given twice.
    StoreFirst,
    /// The agent's records are durable before it acts. Else: a run is begun of which nobody knows.
    LedgerFirst,
    /// Two controllers never grant at once. Else: one that was deposed prolongs what the next has waited out.
    LeaderAlone,
}

impl Rule {
    pub const ALL: [Rule; 25] = [
        Rule::GrantsNameEpochs,
        Rule::GrantsOfThisSession,
        Rule::GrantsCountFromSend,
        Rule::OrdersNeverGoBack,
        Rule::PredecessorGone,
        Rule::RunsAreTold,
        Rule::UnnamedIsFrozen,
        Rule::AgentChecksDeadlines,
        Rule::FailuresTravel,
        Rule::ReplaceAfterLease,
        Rule::LeaseOfSpecPlaced,
        Rule::RestartWaits,
        Rule::ResultsNameEpochs,
        Rule::EventsOnce,
        Rule::AbsenceAfterEvents,
        Rule::ScanFindsAll,
        Rule::OtherHardware,
        Rule::SessionsGrow,
        Rule::GrantsConfirmed,
        Rule::ClocksCompare,
        Rule::CommandsOnce,
        Rule::DeadShimKills,
        Rule::StoreFirst,
        Rule::LedgerFirst,
        Rule::LeaderAlone,
    ];

    /// By its name as `Debug` writes it.
    pub fn parse(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|rule| format!("{rule:?}") == name)
    }
}

/// Is the rule in force? Always, but in a simulator that plays without it.
#[cfg(not(debug_assertions))]
pub const fn kept(_: Rule) -> bool {
    true
}

#[cfg(debug_assertions)]
pub use self::mutant::{kept, without};

#[cfg(debug_assertions)]
mod mutant {
    use std::cell::Cell;

    use super::Rule;

    thread_local! {
        static BROKEN: Cell<Option<Rule>> = const { Cell::new(None) };
    }

    pub fn kept(rule: Rule) -> bool {
        BROKEN.get() != Some(rule)
    }

    /// From now on this thread plays without that rule.
    pub fn without(rule: Option<Rule>) {
        BROKEN.set(rule);
    }
}
