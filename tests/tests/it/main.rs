//! The real programs, real brokers, real containers, seen from outside as a user sees them.

mod approval;
mod brokers;
mod checkpoints;
mod cluster;
mod disk;
mod drain;
mod faults;
mod jobs;
mod kills;
mod members;
mod offline;
mod policy;
mod rotation;
mod secrets;
mod several;
mod staging;
mod trust;
