//! Room made by moving pods that run: plans, and nothing of their execution. A plan leaves no choice open: who goes, in
//! which order, to which seat; each seat is free when its turn comes, while the pod still holds its old one.

use std::collections::BTreeMap;

use super::engine::Engine;
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
                homes.insert(moved.clone(), engine.place(moved, None).is_some());
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
        let Some(to) = engine.place(&tenant.shape, Some(&elsewhere)) else { break };
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
    let to = engine.place(&tenant.shape, Some(&elsewhere))?;
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
