//! Ties that images break, against every room looked at.

use std::collections::BTreeSet;

use proptest::collection::{btree_set, vec};
use proptest::prelude::*;

use super::super::problem::Device;
use super::super::tests::room;
use super::*;

/// A room's free thousandths of a core, its devices, and its images.
type Draft = (u64, usize, BTreeSet<ImageId>);

fn draft() -> impl Strategy<Value = Draft> {
    (0..4u64, 0..4usize, btree_set(0..3usize, 0..3))
}

/// No device, one of either of two models, or one of each.
fn furnished(cpu_milli: u64, kind: usize) -> Room {
    let device = |model| Device { usable: true, model, milli: 1000, memory_bytes: 8 };
    room(cpu_milli, 8, (0..2).filter(|model| kind >> model & 1 == 1).map(device).collect())
}

fn make(engine: &mut Engine, index: usize, draft: &Draft) {
    engine.refresh(index, furnished(draft.0, draft.1));
    engine.restock(index, draft.2.iter().copied().collect());
}

/// The lowest rank, the highest score, then the images, then the first.
fn first(
    engine: &mut Engine,
    drafts: &[Draft],
    shape: &Shape,
    images: &[ImageId],
    rank: impl Fn(usize) -> Option<usize>,
) -> Option<usize> {
    let class = engine.class(shape);
    let row = &engine.classes[class].1;
    let score = |room: usize| {
        let slot = engine.slots[room] as usize;
        if engine.segment(slot / BLOCK).holds(shape) { row.score(slot) } else { 0 }
    };
    let lacks = |room: usize| !images.iter().all(|image| drafts[room].2.contains(image));
    let fitting = (0..drafts.len()).filter(|room| score(*room) > 0);
    let ranked = fitting.filter_map(|room| Some((rank(room)?, u8::MAX - score(room), lacks(room), room)));
    ranked.min().map(|(.., room)| room)
}

fn policy() -> impl Strategy<Value = Policy> {
    prop::sample::select(vec![Policy::Bid, Policy::Fgd, Policy::BestFit, Policy::FirstFit])
}

proptest! {
    #[test]
    fn images_decide_between_equals_alone(
        policy in policy(),
        drafts in vec(draft(), 1..150),
        changes in vec((any::<usize>(), draft()), 0..8),
        wanted in (0..5u64, 0..3usize, btree_set(0..2usize, 1..3)),
        images in btree_set(0..4usize, 0..3),
        barred in 0..6usize,
    ) {
        let (mut engine, mut drafts) = (Engine::new(policy, 0), drafts);
        drafts.iter().enumerate().for_each(|(index, draft)| make(&mut engine, index, draft));
        for (at, draft) in changes {
            let index = at % drafts.len();
            make(&mut engine, index, &draft);
            drafts[index] = draft;
        }
        let (cpu_milli, gpus, models) = wanted;
        let models = Some(models).filter(|models| gpus > 0 && models.len() == 1);
        let gpu_milli = if gpus > 0 { 1000 } else { 0 };
        let shape = Shape { cpu_milli, memory_bytes: 1, gpus, gpu_milli, models, ..Shape::default() };
        let images: Vec<ImageId> = images.into_iter().collect();
        let room = |seat: Option<Seat>| seat.map(|seat| seat.room);
        let allowed = |room: usize| room % 5 != barred;
        let rank = |room: usize| allowed(room).then_some(room % 3);
        let found = room(engine.place(&shape, &images, None));
        prop_assert_eq!(found, first(&mut engine, &drafts, &shape, &images, |_| Some(0)));
        let found = room(engine.place(&shape, &images, Some(&allowed)));
        let among = |room: usize| allowed(room).then_some(0);
        prop_assert_eq!(found, first(&mut engine, &drafts, &shape, &images, among));
        let found = room(engine.place_by(&shape, &images, rank));
        prop_assert_eq!(found, first(&mut engine, &drafts, &shape, &images, rank));
    }
}

#[test]
fn what_is_gone_decides_nothing() {
    let mut engine = Engine::new(Policy::FirstFit, 0);
    for index in 0..3 {
        make(&mut engine, index, &(1000, 0, BTreeSet::new()));
    }
    let shape = Shape { cpu_milli: 1000, ..Shape::default() };
    let room = |engine: &mut Engine, images: &[ImageId]| engine.place(&shape, images, None).unwrap().room;
    engine.restock(2, vec![7]);
    assert_eq!((room(&mut engine, &[]), room(&mut engine, &[7]), room(&mut engine, &[7, 8])), (0, 2, 0));
    engine.restock(1, vec![8, 7]);
    assert_eq!((room(&mut engine, &[7]), room(&mut engine, &[7, 8])), (1, 1));
    engine.charge(&shape, &Seat { room: 1, devices: Vec::new() });
    assert_eq!(room(&mut engine, &[7]), 2);
    engine.restock(2, Vec::new());
    assert_eq!(room(&mut engine, &[7]), 0);
}
