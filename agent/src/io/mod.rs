//! The agent's hands: broker, disk, shims, images, probes, depot. Performs what `core` decides and decides nothing.

pub mod bus;
pub mod checkpoint;
pub mod clock;
pub mod confine;
pub mod departure;
pub mod depot;
pub mod doctor;
mod http;
pub mod identity;
pub mod image;
pub mod join;
pub mod journal;
pub mod logs;
pub mod network;
pub mod notify;
pub mod outputs;
pub mod prepare;
pub mod probe;
pub mod secrets;
pub mod shims;
pub mod unpack;
pub mod usage;
