//! Each fencing rule is needed: without it a history goes wrong, and the simulator sees it.
//!
//! What is read is compared with what was written. Each of these comparisons is missed where it is switched off:
//!
//! | of | by |
//! |---|---|
//! | specs on the wire, the agent's ledger, the store's records, checkpoints told of | the mutants below |
//! | chunks and manifests | `agent/io/checkpoint/chunks`, `controller/io/depot/packs`, `protocol/manifest` |
//! | blobs | `agent/io/depot`, `controller/tests/http` |
//! | images | `agent/tests/image` |
//!
//! Debug assertions alone can break a rule, so that this is a test of debug builds.
#![cfg(debug_assertions)]

use std::sync::atomic::{AtomicUsize, Ordering};

use berth_protocol::rule::{Rule, without};
use berth_tests::world;

/// Where a history last went wrong: it is begun with, and the next ones are tried where it no longer does.
const RULES: [(Rule, u64); Rule::ALL.len()] = [
    (Rule::GrantsNameEpochs, 20),
    (Rule::GrantsCountFromSend, 150),
    (Rule::StartNeedsGrant, 382),
    (Rule::OrdersNeverGoBack, 1),
    (Rule::TermsOutrank, 3),
    (Rule::ReplaceAfterLease, 288),
    (Rule::LeaseOfSpecPlaced, 370),
    (Rule::ContinueUntilGone, 16),
    (Rule::EpochRises, 1),
    (Rule::ShimFences, 102),
    (Rule::AgentChecksDeadlines, 131),
    (Rule::DeadShimKills, 4),
    (Rule::FreezeReasonsAreASet, 102),
    (Rule::LedgerFirst, 116),
    (Rule::RestartAfterGone, 9),
    (Rule::ResultsNameRuns, 1),
    (Rule::FailuresAddUp, 16),
    (Rule::OneWayLoss, 142),
    (Rule::ClockWatched, 9),
    (Rule::StoreFirst, 43),
    (Rule::ResultsNameEpochs, 26),
    (Rule::EventsOnce, 2),
    (Rule::CommandsOnce, 1),
    (Rule::EventsNameLedgers, 11),
    (Rule::LeadersLease, 77),
    (Rule::WritesNameLeader, 26),
    (Rule::NewLeaderWaits, 629),
    (Rule::RestoredEpochsRise, 11),
    (Rule::RestoredWaits, 31),
    (Rule::SpecsNameDigests, 58),
    (Rule::LedgerSums, 469),
    (Rule::StoreSums, 3),
    (Rule::DamagedSetAside, 3),
    (Rule::CheckpointFirst, 10),
];
const SEEDS_MAX: u64 = 1_000;

#[test]
fn without_any_one_rule_a_history_goes_wrong() {
    let next = AtomicUsize::new(0);
    let play = || {
        while let Some((rule, first)) = RULES.get(next.fetch_add(1, Ordering::Relaxed)) {
            let mut seeds = *first..first + SEEDS_MAX;
            let wrong = seeds.find(|seed| without(*rule, || world::run(*seed, false).0.is_err()));
            let seed = wrong.unwrap_or_else(|| panic!("nothing goes wrong without {rule:?}"));
            // It is the rule's doing.
            assert_eq!(world::run(seed, false).0.err(), None, "seed {seed} goes wrong with {rule:?} as well");
        }
    };
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..2).map(|_| scope.spawn(play)).collect();
        threads.into_iter().for_each(|thread| thread.join().expect("each rule is needed"));
    });
}
