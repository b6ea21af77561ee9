//! The policy of placement: first fit over a stable order of rooms, after preference and zones. Pure arithmetic.

use super::problem::{Ask, Placement, Problem, Room, Seat, Shape, Zoning};

/// Seats for what `placed` has not seated yet; seats once given stay. An ask that fits nowhere holds back no other.
/// `solve(p, solve(p, x)) == solve(p, x)`.
pub fn solve(problem: &Problem<'_>, placed: &Placement) -> Placement {
    let mut rooms = problem.rooms.to_vec();
    let mut placement = placed.clone();
    placement.resize(problem.asks.len(), Vec::new());
    for (ask, seats) in problem.asks.iter().zip(&placement) {
        for seat in seats {
            rooms[seat.room].charge(&ask.shape, &seat.devices);
        }
    }
    for (ask, seats) in problem.asks.iter().zip(&mut placement) {
        serve(ask, &mut rooms, seats);
    }
    placement
}

fn serve(ask: &Ask<'_>, rooms: &mut [Room], seats: &mut Vec<Seat>) {
    let already = seats.len();
    let mut zoned = ask.zoned.clone();
    for seat in seats.iter() {
        *zoned.entry(ask.sites[seat.room].zone).or_default() += 1;
    }
    // Equal pods without zones fill rooms in order: what did not fit the last one does not fit the next.
    let plain = ask.zoning == Zoning::Free && ask.sites.iter().all(|site| site.bonus == 0);
    let mut from = 0;
    while seats.len() < ask.pods {
        let rank = |room: usize| {
            let site = ask.sites[room];
            let crowd = zoned.get(&site.zone).copied().unwrap_or(0);
            match ask.zoning {
                Zoning::Free => Some((-site.bonus, 0)),
                Zoning::Spread => Some((-site.bonus, crowd)),
                Zoning::Apart => (crowd == 0).then_some((-site.bonus, 0)),
            }
        };
        let mut open = (from..rooms.len()).filter_map(|room| {
            let devices = ask.sites[room].eligible.then(|| rooms[room].fit(&ask.shape)).flatten()?;
            Some((rank(room)?, Seat { room, devices }))
        });
        let best = if plain { open.next() } else { open.min_by_key(|(rank, seat)| (*rank, seat.room)) };
        let Some((_, seat)) = best else { break };
        rooms[seat.room].charge(&ask.shape, &seat.devices);
        *zoned.entry(ask.sites[seat.room].zone).or_default() += 1;
        if plain {
            from = seat.room;
        }
        seats.push(seat);
    }
    if ask.gang && seats.len() < ask.pods {
        for seat in seats.drain(already..) {
            release(&mut rooms[seat.room], &ask.shape, &seat);
        }
    }
}

pub fn release(room: &mut Room, shape: &Shape, seat: &Seat) {
    room.slots += 1;
    room.cpu_milli += shape.cpu_milli;
    room.memory_bytes += shape.memory_bytes;
    for device in &seat.devices {
        room.devices[*device].milli += shape.gpu_milli;
        room.devices[*device].memory_bytes += shape.gpu_memory_bytes;
    }
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use proptest::prelude::*;

    use super::super::problem::{Device, Site};
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
                slots,
                devices,
            },
        )
    }

    fn shape() -> impl Strategy<Value = Shape> {
        let models = proptest::option::of(proptest::collection::btree_set(0..3usize, 1..3));
        (0..4u64, 0..4u64, 0..3usize, 1..=10u32, 0..3u64, models).prop_map(
            |(cpu_milli, memory_bytes, gpus, milli, gpu_memory_bytes, models)| Shape {
                cpu_milli,
                memory_bytes,
                gpus,
                gpu_milli: milli * 100,
                gpu_memory_bytes,
                models: models as Option<BTreeSet<usize>>,
            },
        )
    }

    type Draft = (Shape, usize, bool, u8, Vec<(bool, i64, usize)>);

    fn draft() -> impl Strategy<Value = Draft> {
        let sites = proptest::collection::vec((prop::bool::weighted(0.8), -2..3i64, 0..3usize), 5);
        (shape(), 0..6usize, any::<bool>(), 0..3u8, sites)
    }

    fn check(rooms: &[Room], drafts: &[Draft]) {
        let sites: Vec<Vec<Site>> = drafts
            .iter()
            .map(|draft| {
                let site = |(eligible, bonus, zone): &(bool, i64, usize)| Site {
                    eligible: *eligible,
                    bonus: *bonus,
                    zone: *zone,
                };
                draft.4.iter().map(site).collect()
            })
            .collect();
        let asks = drafts.iter().zip(&sites).map(|((shape, pods, gang, zoning, _), sites)| Ask {
            shape: shape.clone(),
            pods: *pods,
            gang: *gang,
            zoning: [Zoning::Free, Zoning::Spread, Zoning::Apart][usize::from(*zoning)],
            sites: &sites[..rooms.len()],
            zoned: BTreeMap::new(),
        });
        let problem = Problem { rooms, asks: asks.collect() };
        let placement = solve(&problem, &Vec::new());
        assert_eq!(solve(&problem, &placement), placement, "solving again moves nothing");

        // Charging panics on overflow: nothing is given twice.
        let mut left = rooms.to_vec();
        for (ask, seats) in problem.asks.iter().zip(&placement) {
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
    }

    proptest! {
        #[test]
        fn nothing_is_overcommitted_and_solving_again_moves_nothing(
            rooms in proptest::collection::vec(room(), 0..=5),
            drafts in proptest::collection::vec(draft(), 0..6),
        ) {
            check(&rooms, &drafts);
        }
    }
}
