//! The rules that keep a pod from running twice and from being lost, by name, so that the simulator can play without
//! one of them. It shows that each is needed: a history that goes wrong must be found.
//!
//! A Cargo feature would not do: one build of several packages unifies features, and the programs would get what the
//! simulator's crate turned on. The profile decides instead: without debug assertions, as in every release, `kept` is
//! the constant `true`, and nothing can change it.

/// One rule, and the run that breaks without it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Rule {
    /// A grant names (pod, epoch). Else: a node that was lost comes back, hears a lease before its orders, and thaws a pod that
    /// runs elsewhere by now.
    GrantsNameEpochs,
    /// It counts from when that heartbeat was made. Else: one that waited on its way thaws a pod that runs elsewhere by now.
    GrantsCountFromSend,
    /// A run begins with a grant. Else: orders that waited on their way begin an old epoch late.
    StartNeedsGrant,
    /// Orders older than those held are refused. Else: a set that waited in a queue brings back what is over.
    OrdersNeverGoBack,
    /// A later term outranks every generation of an earlier one. Else: nobody obeys a controller that was restarted.
    TermsOutrank,
    /// A silent node's pod is replaced only when its lease is over as well. Else: a pod with a long grace still runs.
    ReplaceAfterLease,
    /// That lease is the one of the spec placed. Else: a file submitted since says `pause` of a pod that goes on.
    LeaseOfSpecPlaced,
    /// A pod that continues is replaced only when seen gone. Else: behind a partition it runs on, beside the new one.
    ContinueUntilGone,
    /// Every placement is an epoch of its own. Else: a node that gets a pod back takes it for the one that is over.
    EpochRises,
    /// The shim fences its pod by itself. Else: a pod whose agent is dead runs on.
    ShimFences,
    /// The agent ends a pod whose shim does not fence it. Else: a shim that hangs lets its pod run for ever.
    AgentChecksDeadlines,
    /// A dead shim's pod dies with it. Else: it runs on, and nobody can fence it.
    DeadShimKills,
    /// A pod runs when no reason to freeze it is left. Else: what lifts one thaws a pod that is fenced.
    FreezeReasonsAreASet,
    /// The agent's records are durable before it acts on them. Else: it begins a run, and forgets that.
    LedgerFirst,
    /// The next run begins when the last one is seen gone. Else: a restarted agent begins it beside the other.
    RestartAfterGone,
    /// A run's end names it. Else: the end of one that is told late ends the next.
    ResultsNameRuns,
    /// Failures of earlier epochs count. Else: a pod that moves is forgiven anew.
    FailuresAddUp,
    /// A node that confirms no grant for long counts as silent. Else: its pods stand still, and nobody sees it.
    OneWayLoss,
    /// A node whose clock stood still gets no grant. Else: its leases end when it no longer matters.
    ClockWatched,
    /// The controller's writes are durable before anybody hears of them. Else: an epoch is given twice.
    StoreFirst,
    /// A result counts for the epoch that is placed. Else: the end of an old one ends the new.
    ResultsNameEpochs,
    /// Events are taken in order, each once. Else: a failure sent twice counts twice.
    EventsOnce,
    /// A command is obeyed once, by its id. Else: one that is sent again, or comes twice, begins the job anew twice.
    CommandsOnce,
    /// A ledger's events are counted by its name. Else: a new one's are taken for old ones, and nobody hears them.
    EventsNameLedgers,
    /// A leader says nothing once its lease at the store may be over. Else: one that the store no longer hears goes on granting
    /// what its successor replaces.
    LeadersLease,
    /// The store takes the writes of who leads alone. Else: one that stood still undoes what its successor has written.
    WritesNameLeader,
    /// A new leader waits out what may have been granted before it. Else: a node that it does not hear still runs what it
    /// replaces.
    NewLeaderWaits,
    /// A restored store's epochs begin above all that may have been given. Else: one is given twice.
    RestoredEpochsRise,
    /// It places nothing while what it knows nothing of may run. Else: that runs beside what is placed.
    RestoredWaits,
    /// A spec is taken for what its digest names if its bytes are that. Else: what a line has changed runs.
    SpecsNameDigests,
    /// A record of the ledger is read if it is what was written. Else: what a power cut leaves of the last one counts.
    LedgerSums,
    /// A record of the store is read if it is what was written. Else: what a disk has changed in it is acted upon.
    StoreSums,
    /// A job of which a record cannot be read is left alone. Else: its pods begin anew beside those that run.
    DamagedSetAside,
    /// A checkpoint is in the depot before it is told. Else: a pod is to go on from one that is nowhere.
    CheckpointFirst,
}

impl Rule {
    pub const ALL: [Rule; 34] = [
        Rule::GrantsNameEpochs,
        Rule::GrantsCountFromSend,
        Rule::StartNeedsGrant,
        Rule::OrdersNeverGoBack,
        Rule::TermsOutrank,
        Rule::ReplaceAfterLease,
        Rule::LeaseOfSpecPlaced,
        Rule::ContinueUntilGone,
        Rule::EpochRises,
        Rule::ShimFences,
        Rule::AgentChecksDeadlines,
        Rule::DeadShimKills,
        Rule::FreezeReasonsAreASet,
        Rule::LedgerFirst,
        Rule::RestartAfterGone,
        Rule::ResultsNameRuns,
        Rule::FailuresAddUp,
        Rule::OneWayLoss,
        Rule::ClockWatched,
        Rule::StoreFirst,
        Rule::ResultsNameEpochs,
        Rule::EventsOnce,
        Rule::CommandsOnce,
        Rule::EventsNameLedgers,
        Rule::LeadersLease,
        Rule::WritesNameLeader,
        Rule::NewLeaderWaits,
        Rule::RestoredEpochsRise,
        Rule::RestoredWaits,
        Rule::SpecsNameDigests,
        Rule::LedgerSums,
        Rule::StoreSums,
        Rule::DamagedSetAside,
        Rule::CheckpointFirst,
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

    /// Does `work` without that rule, on this thread alone.
    pub fn without<T>(rule: Rule, work: impl FnOnce() -> T) -> T {
        let before = BROKEN.replace(Some(rule));
        let result = work();
        BROKEN.set(before);
        result
    }
}
