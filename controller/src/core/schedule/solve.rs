//! Serves asks in their order: preference and zones first, then the engine's score, then a room that holds the images.
//! An ask that fits nowhere holds back no other.

use std::collections::BTreeMap;

use super::engine::Engine;
use super::problem::{Ask, Placement, Seat, Zoning};

/// Seats for what `placed` has not seated yet; seats once given stay. The engine has the pods of `placed` in its rooms
/// already, and those of the answer afterwards: `solve(e, asks, solve(e, asks, x)) == solve(e, asks, x)`.
pub fn solve(engine: &mut Engine, asks: &[Ask<'_>], placed: &Placement) -> Placement {
    let mut placement = placed.clone();
    placement.resize(asks.len(), Vec::new());
    for (ask, seats) in asks.iter().zip(&mut placement) {
        serve(ask, engine, seats);
    }
    placement
}

fn serve(ask: &Ask<'_>, engine: &mut Engine, seats: &mut Vec<Seat>) {
    let already = seats.len();
    let mut zoned = ask.zoned.clone();
    for seat in seats.iter() {
        *zoned.entry(ask.sites[seat.room].zone).or_default() += 1;
    }
    let everywhere = ask.sites.iter().all(|site| site.eligible);
    let plain = ask.zoning == Zoning::Free && ask.sites.iter().all(|site| site.bonus == 0);
    while seats.len() < ask.pods {
        let seat = match (plain, everywhere) {
            (true, true) => engine.place(&ask.shape, &ask.images, None),
            (true, false) => engine.place(&ask.shape, &ask.images, Some(&|room| ask.sites[room].eligible)),
            (false, _) => engine.place_by(&ask.shape, &ask.images, |room| rank(ask, &zoned, room)),
        };
        let Some(seat) = seat else { break };
        engine.charge(&ask.shape, &seat);
        *zoned.entry(ask.sites[seat.room].zone).or_default() += 1;
        seats.push(seat);
    }
    if ask.gang && seats.len() < ask.pods {
        for seat in seats.drain(already..) {
            engine.release(&ask.shape, &seat);
        }
    }
}

/// Lowest first: what the job prefers, then the emptier zone.
fn rank(ask: &Ask<'_>, zoned: &BTreeMap<usize, usize>, room: usize) -> Option<(i64, usize)> {
    let site = ask.sites[room];
    let crowd = zoned.get(&site.zone).copied().unwrap_or(0);
    match ask.zoning {
        _ if !site.eligible => None,
        Zoning::Free => Some((-site.bonus, 0)),
        Zoning::Spread => Some((-site.bonus, crowd)),
        Zoning::Apart => (crowd == 0).then_some((-site.bonus, 0)),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use proptest::prelude::*;

    use super::super::policy::Policy;
    use super::super::prices::{Demand, Prices};
    use super::super::problem::{Device, Room, Shape, Site, Size};
    use super::*;

    fn device() -> impl Strategy<Value = Device> {
        (any::<bool>(), 0..3usize, 0..=10u32, 0..4u64).prop_map(|(usable, model, milli, memory_bytes)| {
            Device { usable, model, milli: milli * 100, memory_bytes }
        })
    }

    fn room() -> impl Strategy<Value = Room> {
        let devices = proptest::collection::vec(device(), 0..4);
        (prop::bool::weighted(0.9), 0..9u64, 0..9u64, 0..6usize, devices).prop_map(
            |(open, cpu_milli, memory_bytes, slots, devices)| Room {
                open,
                cpu_milli,
                memory_bytes,
                disk_bytes: 8,
                slots,
                devices,
                size: Size { cpu_milli: 9, memory_bytes: 9 },
            },
        )
    }

    fn shape() -> impl Strategy<Value = Shape> {
        let models = proptest::option::of(proptest::collection::btree_set(0..3usize, 1..3));
        (0..4u64, (0..4u64, 0..3u64), 0..3usize, 1..=10u32, 0..3u64, models).prop_map(
            |(cpu_milli, (memory_bytes, disk_bytes), gpus, milli, gpu_memory_bytes, models)| Shape {
                cpu_milli,
                memory_bytes,
                disk_bytes,
                gpus,
                gpu_milli: match gpus {
                    0 => 0,
                    1 => milli * 100,
                    _ => 1000,
                },
                gpu_memory_bytes: if gpus == 0 { 0 } else { gpu_memory_bytes },
                models: models.filter(|_| gpus > 0) as Option<BTreeSet<usize>>,
            },
        )
    }

    type Draft = (Shape, usize, bool, u8, Vec<(bool, i64, usize)>, BTreeSet<usize>);

    fn draft() -> impl Strategy<Value = Draft> {
        let sites = proptest::collection::vec((prop::bool::weighted(0.8), -2..3i64, 0..3usize), 5);
        let images = proptest::collection::btree_set(0..3usize, 0..3);
        (shape(), 0..6usize, any::<bool>(), 0..3u8, sites, images)
    }

    fn policy() -> impl Strategy<Value = Policy> {
        prop::sample::select(vec![Policy::Bid, Policy::Fgd, Policy::BestFit, Policy::FirstFit])
    }

    fn sites(drafts: &[Draft]) -> Vec<Vec<Site>> {
        let site = |(eligible, bonus, zone): &(bool, i64, usize)| Site {
            eligible: *eligible,
            bonus: *bonus,
            zone: *zone,
        };
        drafts.iter().map(|draft| draft.4.iter().map(site).collect()).collect()
    }

    fn asks<'a>(drafts: &[Draft], sites: &'a [Vec<Site>], rooms: usize) -> Vec<Ask<'a>> {
        let asks = drafts.iter().zip(sites).map(|((shape, pods, gang, zoning, _, images), sites)| Ask {
            shape: shape.clone(),
            images: images.iter().copied().collect(),
            pods: *pods,
            gang: *gang,
            zoning: [Zoning::Free, Zoning::Spread, Zoning::Apart][usize::from(*zoning)],
            sites: &sites[..rooms],
            zoned: BTreeMap::new(),
        });
        asks.collect()
    }

    fn engine(policy: Policy, rooms: &[Room], prices: &Prices) -> Engine {
        let mut engine = Engine::new(policy, 7);
        for (index, room) in rooms.iter().enumerate() {
            engine.refresh(index, room.clone());
            engine.restock(index, (0..3).filter(|image| index >> image & 1 == 1).collect());
        }
        engine.adopt(prices.clone());
        engine
    }

    fn prices(drafts: &[Draft], rooms: &[Room]) -> Prices {
        let demand: Demand = drafts.iter().map(|draft| (draft.0.clone(), 1 + draft.1 as u64)).collect();
        Prices::new(&demand, rooms)
    }

    fn check(policy: Policy, rooms: &[Room], drafts: &[Draft]) {
        let (prices, sites) = (prices(drafts, rooms), sites(drafts));
        let asks = asks(drafts, &sites, rooms.len());
        let mut kept = engine(policy, rooms, &prices);
        let placement = solve(&mut kept, &asks, &Vec::new());
        assert_eq!(solve(&mut kept, &asks, &placement), placement, "solving again moves nothing");
        let mut anew = engine(policy, rooms, &prices);
        assert_eq!(solve(&mut anew, &asks, &Vec::new()), placement, "the same input, the same output");

        // Charging panics on overflow: nothing is given twice.
        let mut left = rooms.to_vec();
        for (ask, seats) in asks.iter().zip(&placement) {
            assert!(seats.len() <= ask.pods);
            assert!(!ask.gang || seats.is_empty() || seats.len() == ask.pods);
            let mut zones = BTreeSet::new();
            for seat in seats {
                assert!(ask.sites[seat.room].eligible && left[seat.room].open);
                assert_eq!(seat.devices.len(), ask.shape.gpus);
                assert_eq!(seat.devices.iter().collect::<BTreeSet<_>>().len(), ask.shape.gpus);
                for device in &seat.devices {
                    assert!(left[seat.room].devices[*device].fits(&ask.shape));
                }
                let fresh = zones.insert(ask.sites[seat.room].zone);
                assert!(fresh || ask.zoning != Zoning::Apart);
                left[seat.room].charge(&ask.shape, &seat.devices);
            }
        }
        assert_eq!(kept.rooms(), left, "the engine knows what is left");

        // Whoever waits though not for a gang or a zone fits nowhere.
        for (ask, seats) in
            asks.iter().zip(&placement).filter(|(ask, _)| !ask.gang && ask.zoning != Zoning::Apart)
        {
            let room = (0..rooms.len())
                .find(|room| ask.sites[*room].eligible && left[*room].fit(&ask.shape).is_some());
            assert!(seats.len() == ask.pods || room.is_none(), "{ask:?} waits, and fits {room:?}");
        }
    }

    proptest! {
        #[test]
        fn nothing_is_overcommitted_and_solving_again_moves_nothing(
            policy in policy(),
            rooms in proptest::collection::vec(room(), 0..=5),
            drafts in proptest::collection::vec(draft(), 0..6),
        ) {
            check(policy, &rooms, &drafts);
        }

        #[test]
        fn scores_kept_up_to_date_are_scores_made_anew(
            policy in policy(),
            rooms in proptest::collection::vec(room(), 1..=5),
            changed in proptest::collection::vec((0..5usize, room()), 0..4),
            drafts in proptest::collection::vec(draft(), 1..6),
        ) {
            let (prices, sites) = (prices(&drafts, &rooms), sites(&drafts));
            let asks = asks(&drafts, &sites, rooms.len());
            let mut kept = engine(policy, &rooms, &prices);
            let before = solve(&mut kept, &asks, &Vec::new());
            // Pods leave, nodes come back otherwise: half of the seats are given back, some rooms made anew.
            for (ask, seats) in asks.iter().zip(&before) {
                for seat in seats.iter().step_by(2) {
                    kept.release(&ask.shape, seat);
                }
            }
            for (index, room) in changed {
                kept.refresh(index % rooms.len(), room);
            }
            let mut anew = engine(policy, kept.rooms(), &prices);
            prop_assert_eq!(solve(&mut kept, &asks, &Vec::new()), solve(&mut anew, &asks, &Vec::new()));
        }

        #[test]
        fn more_capacity_leaves_seats_where_they_are(
            policy in policy(),
            rooms in proptest::collection::vec(room(), 1..=5),
            more in proptest::collection::vec(room(), 1..3),
            drafts in proptest::collection::vec(draft(), 1..6),
        ) {
            let (prices, sites) = (prices(&drafts, &rooms), sites(&drafts));
            let mut engine = engine(policy, &rooms, &prices);
            let before = solve(&mut engine, &asks(&drafts, &sites, rooms.len()), &Vec::new());
            for room in more {
                engine.refresh(engine.rooms().len(), room);
            }
            let wider: Vec<Vec<Site>> = sites
                .iter()
                .map(|sites| {
                    let site = |room| sites.get(room).copied().unwrap_or(Site { eligible: true, bonus: 0, zone: 9 });
                    (0..engine.rooms().len()).map(site).collect()
                })
                .collect();
            let rooms = engine.rooms().len();
            let after = solve(&mut engine, &asks(&drafts, &wider, rooms), &before);
            for (before, after) in before.iter().zip(&after) {
                prop_assert!(after.starts_with(before));
            }
        }
    }
}
