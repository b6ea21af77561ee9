//! Room made by moving pods that run: plans, and nothing of their execution. A plan leaves no choice open: who goes, in
//! which order, to which seat; each seat is free when its turn comes, while the pod still holds its old one.

use std::collections::BTreeMap;

use super::engine::Engine;
use super::images::ImageId;
use super::problem::{Room, Seat, Shape};

/// Moves for the sake of one pod, at most.
pub const MOVES_MAX: usize = 8;
/// Rooms whose plan is worked out to the end before the pod is left waiting.
const TRIES_MAX: usize = 32;

/// A pod that runs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tenant {
    /// The caller's name for it.
    pub pod: usize,
    pub shape: Shape,
    /// What a room that holds them need not pull.
    pub images: Vec<ImageId>,
    pub devices: Vec<usize>,
    /// May be moved at all.
    pub movable: bool,
    /// What moving it costs, in the caller's unit.
    pub work: u64,
}

/// Who lives where, and where each may go.
pub trait Tenants {
    fn of(&self, room: usize) -> &[Tenant];

    /// Rules of the pod beyond what fits.
    fn may(&self, _pod: usize, _room: usize) -> bool {
        true
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Move {
    pub pod: usize,
    pub shape: Shape,
    pub from: Seat,
    pub to: Seat,
}

/// First the moves, in their order, then the seat is free.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    pub moves: Vec<Move>,
    pub seat: Seat,
}

/// Pods of one room that would go.
struct Draft {
    room: usize,
    work: u64,
    leaving: Vec<usize>,
}

/// Makes room for a pod that fits nowhere: in the room where fewest others have to move, then the least work. The engine
/// is the same afterwards.
pub fn plan(
    engine: &mut Engine,
    tenants: &dyn Tenants,
    shape: &Shape,
    allowed: &dyn Fn(usize) -> bool,
    moves_max: usize,
) -> Option<Plan> {
    let moves_max = moves_max.min(MOVES_MAX);
    let mut homes = BTreeMap::new();
    let mut drafts = Vec::new();
    for room in 0..engine.rooms().len() {
        if !allowed(room) || !engine.rooms()[room].open {
            continue;
        }
        let able = |tenant: &Tenant| tenant.movable && !is_as_large(&tenant.shape, shape);
        let mut able: Vec<usize> =
            (0..tenants.of(room).len()).filter(|i| able(&tenants.of(room)[*i])).collect();
        // Without all of them it must fit, or no choice among them helps.
        if !fits_without(&engine.rooms()[room], tenants.of(room), &able, shape) {
            continue;
        }
        able.retain(|i| {
            let moved = &tenants.of(room)[*i].shape;
            if !homes.contains_key(moved) {
                homes.insert(moved.clone(), engine.place(moved, &[], None).is_some());
            }
            homes[moved]
        });
        drafts.extend(draft(&engine.rooms()[room], room, tenants.of(room), &able, shape, moves_max));
    }
    drafts.sort_by_key(|draft| (draft.leaving.len(), draft.work, draft.room));
    drafts.iter().take(TRIES_MAX).find_map(|draft| work_out(engine, tenants, draft, shape))
}

/// Moving a pod for one no larger gains nothing.
fn is_as_large(moved: &Shape, shape: &Shape) -> bool {
    let milli = |shape: &Shape| shape.gpus as u64 * u64::from(shape.gpu_milli);
    milli(moved) >= milli(shape) && moved.cpu_milli >= shape.cpu_milli
}

fn fits_without(room: &Room, tenants: &[Tenant], leaving: &[usize], shape: &Shape) -> bool {
    let gone = || leaving.iter().map(|i| &tenants[*i]);
    let cpu = room.cpu_milli + gone().map(|t| t.shape.cpu_milli).sum::<u64>();
    let memory = room.memory_bytes + gone().map(|t| t.shape.memory_bytes).sum::<u64>();
    let disk = room.disk_bytes + gone().map(|t| t.shape.disk_bytes).sum::<u64>();
    if cpu < shape.cpu_milli || memory < shape.memory_bytes || disk < shape.disk_bytes {
        return false;
    }
    if room.slots + leaving.len() == 0 || shape.gpus == 0 {
        return room.slots + leaving.len() > 0;
    }
    let mut devices = room.devices.clone();
    for tenant in gone() {
        for device in &tenant.devices {
            devices[*device].milli += tenant.shape.gpu_milli;
            devices[*device].memory_bytes += tenant.shape.gpu_memory_bytes;
        }
    }
    devices.iter().filter(|device| device.fits(shape)).count() >= shape.gpus
}

/// Who should leave the room: the best one or two by trying all, more by emptying the cheapest devices.
fn draft(
    room: &Room,
    index: usize,
    tenants: &[Tenant],
    able: &[usize],
    shape: &Shape,
    moves_max: usize,
) -> Option<Draft> {
    let fits = |leaving: &[usize]| fits_without(room, tenants, leaving, shape);
    let work = |leaving: &[usize]| leaving.iter().map(|i| tenants[*i].work).sum::<u64>();
    let draft = |leaving: Vec<usize>| Draft { room: index, work: work(&leaving), leaving };
    if moves_max == 0 || !fits(able) {
        return None;
    }
    let one =
        able.iter().map(|i| vec![*i]).filter(|leaving| fits(leaving)).min_by_key(|leaving| work(leaving));
    if let Some(one) = one {
        return Some(draft(one));
    }
    let pairs = || able.iter().enumerate().flat_map(|(n, a)| able[n + 1..].iter().map(|b| vec![*a, *b]));
    let two =
        (moves_max > 1).then(|| pairs().filter(|leaving| fits(leaving)).min_by_key(|leaving| work(leaving)));
    if let Some(two) = two.flatten() {
        return Some(draft(two));
    }
    if moves_max < 3 {
        return None;
    }
    let leaving = clear(room, tenants, able, shape)?;
    (leaving.len() <= moves_max && fits(&leaving)).then(|| draft(leaving))
}

/// Empties as many devices as the pod wants, those with the fewest pods first, then sheds CPU and memory.
fn clear(room: &Room, tenants: &[Tenant], able: &[usize], shape: &Shape) -> Option<Vec<usize>> {
    let on = |device: usize| (0..tenants.len()).filter(move |i| tenants[*i].devices.contains(&device));
    let mut devices: Vec<(usize, u64, usize)> = (0..room.devices.len())
        .filter(|device| room.devices[*device].fits(shape) || on(*device).all(|i| able.contains(&i)))
        .filter(|device| {
            let will = &room.devices[*device];
            will.usable && shape.models.as_ref().is_none_or(|models| models.contains(&will.model))
        })
        .map(|device| match room.devices[device].fits(shape) {
            true => (0, 0, device),
            false => (on(device).count(), on(device).map(|i| tenants[i].work).sum(), device),
        })
        .collect();
    devices.sort_unstable();
    if devices.len() < shape.gpus {
        return None;
    }
    let mut leaving: Vec<usize> = Vec::new();
    for (_, _, device) in devices.into_iter().take(shape.gpus).filter(|(pods, _, _)| *pods > 0) {
        let fresh: Vec<usize> = on(device).filter(|i| !leaving.contains(i)).collect();
        leaving.extend(fresh);
    }
    while !fits_without(room, tenants, &leaving, shape) {
        // The largest of those that hold little of devices sheds most at once.
        let rest = able.iter().filter(|i| !leaving.contains(*i));
        let most = rest.max_by_key(|i| {
            let tenant = &tenants[**i];
            let milli = tenant.shape.gpus as u64 * u64::from(tenant.shape.gpu_milli);
            (tenant.shape.cpu_milli / (1 + milli), tenant.shape.memory_bytes, std::cmp::Reverse(**i))
        })?;
        leaving.push(*most);
    }
    Some(leaving)
}

/// Finds the seats, step by step on the engine itself, and gives everything back.
fn work_out(engine: &mut Engine, tenants: &dyn Tenants, draft: &Draft, shape: &Shape) -> Option<Plan> {
    let mut leaving: Vec<&Tenant> = draft.leaving.iter().map(|i| &tenants.of(draft.room)[*i]).collect();
    // The largest are the hardest to seat.
    leaving.sort_by_key(|t| {
        std::cmp::Reverse((t.shape.gpus as u64 * u64::from(t.shape.gpu_milli), t.shape.cpu_milli, t.pod))
    });
    let mut moves: Vec<Move> = Vec::new();
    for tenant in &leaving {
        let elsewhere = |room: usize| room != draft.room && tenants.may(tenant.pod, room);
        let Some(to) = engine.place(&tenant.shape, &tenant.images, Some(&elsewhere)) else { break };
        let from = Seat { room: draft.room, devices: tenant.devices.clone() };
        engine.charge(&tenant.shape, &to);
        engine.release(&tenant.shape, &from);
        moves.push(Move { pod: tenant.pod, shape: tenant.shape.clone(), from, to });
    }
    let seat = (moves.len() == leaving.len()).then(|| engine.place_in(shape, draft.room)).flatten();
    for step in moves.iter().rev() {
        engine.charge(&step.shape, &step.from);
        engine.release(&step.shape, &step.to);
    }
    seat.map(|seat| Plan { moves, seat })
}

/// Moves that leave fewer fragments behind, the best first: what `berth defrag` proposes. The engine is the same
/// afterwards.
pub fn defrag(engine: &mut Engine, tenants: &dyn Tenants, moves_max: usize) -> Vec<Move> {
    let mut promising = Vec::new();
    for room in 0..engine.rooms().len() {
        for (i, tenant) in tenants.of(room).iter().enumerate().filter(|(_, tenant)| tenant.movable) {
            if let Some((gain, step)) = improve(engine, tenants, room, tenant) {
                undo(engine, &step);
                promising.push((std::cmp::Reverse(gain), tenant.work, room, i));
            }
        }
    }
    promising.sort_unstable();
    let mut moves = Vec::new();
    for (_, _, room, i) in promising {
        if moves.len() == moves_max {
            break;
        }
        // What went before may have taken the seat, or the gain.
        moves.extend(improve(engine, tenants, room, &tenants.of(room)[i]).map(|(_, step)| step));
    }
    moves.iter().rev().for_each(|step| undo(engine, step));
    moves
}

/// Moves the pod to the best seat elsewhere, if that leaves fewer fragments.
fn improve(engine: &mut Engine, tenants: &dyn Tenants, room: usize, tenant: &Tenant) -> Option<(i64, Move)> {
    let elsewhere = |other: usize| other != room && tenants.may(tenant.pod, other);
    let to = engine.place(&tenant.shape, &tenant.images, Some(&elsewhere))?;
    let before = engine.fragments(room) + engine.fragments(to.room);
    let from = Seat { room, devices: tenant.devices.clone() };
    let step = Move { pod: tenant.pod, shape: tenant.shape.clone(), from, to };
    engine.charge(&step.shape, &step.to);
    engine.release(&step.shape, &step.from);
    let gain = before - engine.fragments(room) - engine.fragments(step.to.room);
    if gain <= 0 {
        undo(engine, &step);
        return None;
    }
    Some((gain, step))
}

fn undo(engine: &mut Engine, step: &Move) {
    engine.charge(&step.shape, &step.from);
    engine.release(&step.shape, &step.to);
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::policy::Policy;
    use super::super::problem::{Device, Size};
    use super::*;

    struct ByRoom(Vec<Vec<Tenant>>);

    impl Tenants for ByRoom {
        fn of(&self, room: usize) -> &[Tenant] {
            &self.0[room]
        }
    }

    fn room(cpu: u64, devices: usize) -> Room {
        Room {
            open: true,
            cpu_milli: cpu,
            memory_bytes: 100,
            disk_bytes: 100,
            slots: 16,
            devices: vec![Device { usable: true, model: 0, milli: 1000, memory_bytes: 10 }; devices],
            size: Size { cpu_milli: cpu, memory_bytes: 100 },
        }
    }

    fn shape(cpu: u64, gpus: usize, tenths: u32) -> Shape {
        let gpu_milli = [0, tenths * 100, 1000][gpus.min(2)];
        Shape { cpu_milli: cpu, memory_bytes: 1, gpus, gpu_milli, ..Shape::default() }
    }

    /// A fleet, filled up by pods in their order.
    fn fill(rooms: &[(u64, usize)], pods: &[(u64, usize, u32, bool)]) -> (Engine, ByRoom) {
        let mut engine = Engine::new(Policy::FirstFit, 0);
        for (index, (cpu, devices)) in rooms.iter().enumerate() {
            engine.refresh(index, room(*cpu, *devices));
        }
        let mut tenants = ByRoom(vec![Vec::new(); rooms.len()]);
        for (pod, (cpu, gpus, tenths, movable)) in pods.iter().enumerate() {
            let shape = shape(*cpu, *gpus, *tenths);
            let Some(seat) = engine.place(&shape, &[], None) else { continue };
            engine.charge(&shape, &seat);
            let devices = seat.devices.clone();
            let images = Vec::new();
            let tenant = Tenant { pod, shape, images, devices, movable: *movable, work: *cpu };
            tenants.0[seat.room].push(tenant);
        }
        (engine, tenants)
    }

    /// Takes the steps with both seats held in between; rooms panic where that is too much.
    fn execute(rooms: &mut [Room], moves: &[Move]) {
        for step in moves {
            let room = &mut rooms[step.to.room];
            assert!(room.open && room.slots > 0 && room.cpu_milli >= step.shape.cpu_milli);
            assert!(step.to.devices.iter().all(|device| room.devices[*device].fits(&step.shape)));
            room.charge(&step.shape, &step.to.devices);
            rooms[step.from.room].release(&step.shape, &step.from.devices);
        }
    }

    #[test]
    fn the_pod_with_least_work_moves() {
        let (mut engine, mut tenants) = fill(&[(8, 1), (8, 1)], &[]);
        for (index, (cpu, tenths)) in [(3, 5), (2, 4)].into_iter().enumerate() {
            let (shape, seat) = (shape(cpu, 1, tenths), Seat { room: index, devices: vec![0] });
            engine.charge(&shape, &seat);
            let devices = seat.devices;
            let images = Vec::new();
            tenants.0[index].push(Tenant { pod: index, shape, images, devices, movable: true, work: cpu });
        }
        let whole = shape(1, 1, 10);
        assert_eq!(engine.place(&whole, &[], None), None);
        assert_eq!(plan(&mut engine, &tenants, &whole, &|_| true, 0), None);
        let plan = plan(&mut engine, &tenants, &whole, &|_| true, 1).expect("one move frees a device");
        assert_eq!(plan.seat, Seat { room: 1, devices: vec![0] });
        assert_eq!((plan.moves[0].pod, plan.moves[0].to.room), (1, 0));
    }

    #[test]
    fn of_seats_as_good_a_pod_moves_to_where_its_image_is() {
        let (mut engine, mut tenants) = fill(&[(8, 0), (4, 0), (4, 0)], &[(2, 0, 0, true)]);
        engine.restock(2, vec![5]);
        let wanted = shape(8, 0, 0);
        let mut goes_to = |tenants: &ByRoom| {
            let plan =
                plan(&mut engine, tenants, &wanted, &|_| true, 1).expect("one move frees the first room");
            plan.moves[0].to.room
        };
        assert_eq!(goes_to(&tenants), 1);
        tenants.0[0][0].images = vec![5];
        assert_eq!(goes_to(&tenants), 2);
    }

    proptest! {
        #[test]
        fn plans_have_room_at_every_step_and_change_nothing(
            rooms in proptest::collection::vec((1..12u64, 0..4usize), 1..6),
            pods in proptest::collection::vec((0..4u64, 0..3usize, 1..10u32, prop::bool::weighted(0.8)), 0..30),
            wanted in (0..8u64, 0..4usize, 1..=10u32),
            moves_max in 0..9usize,
        ) {
            let (mut engine, tenants) = fill(&rooms, &pods);
            let before = engine.rooms().to_vec();
            let wanted = shape(wanted.0, wanted.1, wanted.2);
            let fits = engine.place(&wanted, &[], None).is_some();
            if !fits && let Some(plan) = plan(&mut engine, &tenants, &wanted, &|_| true, moves_max) {
                prop_assert!(!plan.moves.is_empty() && plan.moves.len() <= moves_max);
                for step in &plan.moves {
                    let tenant = tenants.of(step.from.room).iter().find(|tenant| tenant.pod == step.pod);
                    prop_assert!(tenant.is_some_and(|tenant| tenant.movable && tenant.devices == step.from.devices));
                }
                let mut rooms = before.clone();
                execute(&mut rooms, &plan.moves);
                prop_assert!(rooms[plan.seat.room].fit(&wanted).is_some());
                rooms[plan.seat.room].charge(&wanted, &plan.seat.devices);
            }
            prop_assert_eq!(engine.rooms(), &before[..]);
            let moves = defrag(&mut engine, &tenants, moves_max);
            prop_assert!(moves.len() <= moves_max);
            execute(&mut before.clone(), &moves);
            prop_assert_eq!(engine.rooms(), &before[..]);
        }
    }
}
