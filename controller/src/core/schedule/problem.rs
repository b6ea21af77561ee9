//! Placement as a small problem in integers: rooms (what nodes have free), asks (what jobs want), seats (the answer).
//! Knows no names, no jobs and no nodes.

use std::collections::{BTreeMap, BTreeSet};

use super::images::ImageId;

/// What a node has free.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Room {
    /// Takes new pods at all.
    pub open: bool,
    pub cpu_milli: u64,
    pub memory_bytes: u64,
    pub disk_bytes: u64,
    /// Pods that may still be named in its desired set.
    pub slots: usize,
    pub devices: Vec<Device>,
    /// What it has when empty.
    pub size: Size,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Size {
    pub cpu_milli: u64,
    pub memory_bytes: u64,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Device {
    pub usable: bool,
    pub model: usize,
    pub milli: u32,
    pub memory_bytes: u64,
}

/// What one pod wants.
#[derive(Debug, Clone, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Shape {
    pub cpu_milli: u64,
    pub memory_bytes: u64,
    pub disk_bytes: u64,
    /// Devices, each with `gpu_milli` and `gpu_memory_bytes` free.
    pub gpus: usize,
    pub gpu_milli: u32,
    pub gpu_memory_bytes: u64,
    /// Models that will do; none: any.
    pub models: Option<BTreeSet<usize>>,
}

/// What a node is to one job, whatever is free there.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Site {
    pub eligible: bool,
    /// Sum of the weights of the job's preferences that hold.
    pub bonus: i64,
    /// Nodes of one zone are one place: to spread over, or for one pod only.
    pub zone: usize,
}

/// How a job's pods share zones.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Zoning {
    #[default]
    Free,
    /// Fewest pods first.
    Spread,
    /// One pod each.
    Apart,
}

/// Equal pods of one job that want seats.
#[derive(Debug, Clone)]
pub struct Ask<'a> {
    pub shape: Shape,
    /// Of rooms as good as another one that holds all of these is taken.
    pub images: Vec<ImageId>,
    pub pods: usize,
    /// All or none.
    pub gang: bool,
    pub zoning: Zoning,
    /// One for each room.
    pub sites: &'a [Site],
    /// The job's pods in each zone already.
    pub zoned: BTreeMap<usize, usize>,
}

/// Where a pod goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Seat {
    pub room: usize,
    pub devices: Vec<usize>,
}

/// The seats of each ask's first pods.
pub type Placement = Vec<Vec<Seat>>;

impl Room {
    /// The devices that a pod would get, or none where it does not fit.
    pub fn fit(&self, shape: &Shape) -> Option<Vec<usize>> {
        let enough = self.open
            && self.slots > 0
            && self.cpu_milli >= shape.cpu_milli
            && self.memory_bytes >= shape.memory_bytes
            && self.disk_bytes >= shape.disk_bytes;
        if !enough {
            return None;
        }
        let devices: Vec<usize> =
            (0..self.devices.len()).filter(|i| self.devices[*i].fits(shape)).take(shape.gpus).collect();
        (devices.len() == shape.gpus).then_some(devices)
    }

    /// Takes a pod in that fits.
    pub fn charge(&mut self, shape: &Shape, devices: &[usize]) {
        self.slots -= 1;
        self.cpu_milli -= shape.cpu_milli;
        self.memory_bytes -= shape.memory_bytes;
        self.disk_bytes -= shape.disk_bytes;
        for device in devices {
            self.devices[*device].milli -= shape.gpu_milli;
            self.devices[*device].memory_bytes -= shape.gpu_memory_bytes;
        }
    }

    /// Gives back what `charge` took.
    pub fn release(&mut self, shape: &Shape, devices: &[usize]) {
        self.slots += 1;
        self.cpu_milli += shape.cpu_milli;
        self.memory_bytes += shape.memory_bytes;
        self.disk_bytes += shape.disk_bytes;
        for device in devices {
            self.devices[*device].milli += shape.gpu_milli;
            self.devices[*device].memory_bytes += shape.gpu_memory_bytes;
        }
    }
}

impl Device {
    pub fn fits(&self, shape: &Shape) -> bool {
        self.usable
            && self.milli >= shape.gpu_milli
            && self.memory_bytes >= shape.gpu_memory_bytes
            && shape.models.as_ref().is_none_or(|models| models.contains(&self.model))
    }
}
