//! Histories that once went wrong, and what was wrong: each is played again. A change to what is drawn from a seed makes
//! another history of it, which is one more history then.

use berth_tests::world;

const PAST: [(u64, &str); 24] = [
    (425, "what the ledger before had carried out was taken for never begun, after a power cut"),
    (52, "a copy of a disk whose ledger was lost was taken for the node while that ran its pods"),
    (
        629,
        "after a restart of the controller a copy of a disk was taken for the node, and its pods for never begun",
    ),
    (956, "what was granted to a paused machine was taken for the shim's fault when it went on"),
    (2931, "an agent that had lost its ledger was never sent the specs of what it held paused"),
    (11598, "a node that still ended pods of another epoch was given others"),
    (16765, "what an agent had been ordered since its ledger was lost was taken for what it ran before"),
    (13329, "a copy of a machine began what was meant for the machine, from a checkpoint let go since"),
    (40, "what a restored store had placed and a node no longer held began anew, by a grant from before"),
    (84, "a restored store did not wait for a pod that ends slowly, placed since the backup"),
    (
        4607,
        "before its first heartbeat to a new controller a copy of a disk was taken for the node that had said hello",
    ),
    (526, "a restored store let begin where it was placed what had gone on elsewhere since"),
    (27685, "the third session of a new ledger, the first to be answered, was taken for another machine's"),
    (25803, "a shim that went on when its agent died did not look at the clock"),
    (103345, "a pod that stood still to leave was asked for another checkpoint, and stood for ever"),
    (
        110110,
        "what the controller before a restored store acknowledged late was waited for by the one after it",
    ),
    (
        120053,
        "what was placed anew on a node was not named to it, since its epoch before was about to count as gone there",
    ),
    (
        105482,
        "an agent that had begun twice since a backup was not known by the store that was restored from it",
    ),
    (106213, "what an agent had been acknowledged was waited for, since its hello was on its way for longer"),
    (128090, "a machine whose copy had counted more sessions was never taken in again"),
    (
        7086,
        "the events of a machine that came back beside its copy were taken for those that the copy had told",
    ),
    (66168, "what a node held as its hello was made had ended as a restored store heard it, and began anew"),
    (46867, "a pod sent where its checkpoint could not be started was barred from there, and from all else"),
    (11830, "a machine paused twice was expected to wait for a lease that it never had"),
];

#[test]
fn what_once_went_wrong_goes_right() {
    for (seed, what) in PAST {
        assert_eq!(world::run(seed, false).0.err(), None, "seed {seed}: {what}");
    }
}
