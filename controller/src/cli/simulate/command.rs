//! The words of `simulate`.

use std::path::PathBuf;

use clap::{Args, ValueEnum};

use crate::core::schedule::moves::MOVES_MAX;
use crate::core::schedule::policy;

#[derive(Debug, Args)]
pub struct Simulate {
    /// The fleet: a CSV file with the columns cpu_milli, memory_mib, gpu, model; or `live`, your own
    #[arg(long, value_name = "FILE|live")]
    pub nodes: PathBuf,
    /// The pods: a CSV file with the columns cpu_milli, memory_mib, num_gpu, gpu_milli, gpu_spec
    #[arg(long, value_name = "FILE")]
    pub pods: PathBuf,
    /// How to place
    #[arg(long, value_enum, default_value = "bid")]
    pub policy: Policy,
    /// How much arrives, as a multiple of the fleet's GPUs (of its cores where it has none)
    #[arg(long, value_name = "FACTOR", default_value_t = 1.3)]
    pub load: f64,
    /// One seed, a range or a list: 42, 42..51 or 1,2,7
    #[arg(long, value_name = "SEEDS", default_value = "42..51")]
    pub seed: String,
    /// Move up to this many running pods for one that fits nowhere
    #[arg(long, value_name = "N", default_value_t = 0, value_parser = clap::value_parser!(u8).range(0..=MOVES_MAX as i64))]
    pub moves: u8,
    /// Let pods leave again: arrivals at this load, running times from the columns creation_time, scheduled_time and
    /// deletion_time, in seconds
    #[arg(long, value_name = "LOAD")]
    pub churn: Option<f64>,
    /// Draw the first seed's allocation and the nodes' fill
    #[arg(long, value_name = "FILE.svg")]
    pub plot: Option<PathBuf>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Policy {
    /// Berth's own: fragments, slivers and scarce models priced
    Bid,
    /// The gradient of fragments alone
    Fgd,
    /// The room with least left over
    Bestfit,
    /// The room whose free amounts point most where the pod's do
    Dotproduct,
    /// The first room that fits
    Firstfit,
    /// Any room that fits
    Random,
}

impl Policy {
    pub fn name(self) -> &'static str {
        match self {
            Self::Bid => "bid",
            Self::Fgd => "fgd",
            Self::Bestfit => "bestfit",
            Self::Dotproduct => "dotproduct",
            Self::Firstfit => "firstfit",
            Self::Random => "random",
        }
    }
}

impl From<Policy> for policy::Policy {
    fn from(policy: Policy) -> Self {
        match policy {
            Policy::Bid => Self::Bid,
            Policy::Fgd => Self::Fgd,
            Policy::Bestfit => Self::BestFit,
            Policy::Dotproduct => Self::DotProduct,
            Policy::Firstfit => Self::FirstFit,
            Policy::Random => Self::Random,
        }
    }
}
