//! The figures that berth promises, measured on the real programs: a private cluster on loopback in a temporary
//! directory, seen as a user sees it. Compares with nothing but what is measured in the same run.

pub mod checkpoint;
pub mod criu;
pub mod figures;
pub mod fleet;
pub mod flood;
pub mod footprint;
pub mod growth;
pub mod latency;
pub mod moves;
pub mod node;
pub mod pod;
pub mod podman;
pub mod process;
pub mod records;
pub mod slurm;
pub mod throughput;
pub mod trust;
pub mod user;
pub mod world;
