//! The agent's hands: broker, disk, shims, images, probes, depot. Performs what `core` decides and decides nothing.

pub mod bus;
pub mod clock;
pub mod depot;
pub mod journal;
pub mod notify;
pub mod prepare;
pub mod shims;
