//! Everything that acts on the world for the daemon.

pub mod network;
