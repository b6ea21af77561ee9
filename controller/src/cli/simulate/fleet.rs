//! The simulated fleet: the real engine, and which pod is where.

use crate::core::schedule::engine::Engine;
use crate::core::schedule::moves::{self, Plan, Tenant, Tenants};
use crate::core::schedule::policy::Policy;
use crate::core::schedule::prices::Prices;
use crate::core::schedule::problem::{Room, Seat, Shape};

pub struct Fleet {
    pub engine: Engine,
    tenants: ByRoom,
    /// By pod.
    seats: Vec<Option<Seat>>,
    /// Pods leave or move: who is where is written down.
    lively: bool,
}

struct ByRoom(Vec<Vec<Tenant>>);

impl Tenants for ByRoom {
    fn of(&self, room: usize) -> &[Tenant] {
        &self.0[room]
    }
}

/// What moving a pod costs: its devices, and a little its CPU.
pub fn work(shape: &Shape) -> u64 {
    100 * shape.gpus as u64 * u64::from(shape.gpu_milli) + shape.cpu_milli
}

impl Fleet {
    pub fn new(policy: Policy, seed: u64, rooms: &[Room], prices: &Prices, lively: bool) -> Self {
        let mut engine = Engine::new(policy, seed);
        for (index, room) in rooms.iter().enumerate() {
            engine.refresh(index, room.clone());
        }
        engine.adopt(prices.clone());
        Self { engine, tenants: ByRoom(vec![Vec::new(); rooms.len()]), seats: Vec::new(), lively }
    }

    /// Seats a pod in a room if it fits one.
    pub fn place(&mut self, pod: usize, shape: &Shape) -> bool {
        let Some(seat) = self.engine.place(shape, &[], None) else { return false };
        self.engine.charge(shape, &seat);
        self.settle(pod, shape, seat);
        true
    }

    /// Seats a pod in that very room if it fits.
    pub fn place_in(&mut self, pod: usize, shape: &Shape, room: usize) -> bool {
        let Some(seat) = self.engine.place_in(shape, room) else { return false };
        self.engine.charge(shape, &seat);
        self.settle(pod, shape, seat);
        true
    }

    fn settle(&mut self, pod: usize, shape: &Shape, seat: Seat) {
        if !self.lively {
            return;
        }
        if self.seats.len() <= pod {
            self.seats.resize(pod + 1, None);
        }
        // Lists of pods name no images.
        let (images, devices) = (Vec::new(), seat.devices.clone());
        let tenant = Tenant { pod, shape: shape.clone(), images, devices, movable: true, work: work(shape) };
        self.tenants.0[seat.room].push(tenant);
        self.seats[pod] = Some(seat);
    }

    /// A pod ends; says which room it leaves.
    pub fn remove(&mut self, pod: usize, shape: &Shape) -> Option<usize> {
        let seat = self.seats.get_mut(pod)?.take()?;
        self.engine.release(shape, &seat);
        self.tenants.0[seat.room].retain(|tenant| tenant.pod != pod);
        Some(seat.room)
    }

    /// Makes room for the pod by moving others, and seats it; the moves taken.
    pub fn squeeze(&mut self, pod: usize, shape: &Shape, moves_max: usize) -> Option<Plan> {
        let plan = moves::plan(&mut self.engine, &self.tenants, shape, &|_| true, moves_max)?;
        for step in &plan.moves {
            self.remove(step.pod, &step.shape);
            self.engine.charge(&step.shape, &step.to);
            self.settle(step.pod, &step.shape, step.to.clone());
        }
        self.engine.charge(shape, &plan.seat);
        self.settle(pod, shape, plan.seat.clone());
        Some(plan)
    }

    /// Rooms by how full their devices are, or their CPU where a room has none: tenths, emptiest first.
    pub fn fill(&self) -> Vec<f64> {
        let full = |room: &Room| {
            let devices = room.devices.len() as f64 * 1000.0;
            let free: u32 = room.devices.iter().map(|device| device.milli).sum();
            match devices > 0.0 {
                true => 1.0 - f64::from(free) / devices,
                false => 1.0 - room.cpu_milli as f64 / room.size.cpu_milli.max(1) as f64,
            }
        };
        let mut fill: Vec<f64> = self.engine.rooms().iter().map(full).collect();
        fill.sort_by(f64::total_cmp);
        fill
    }
}
