//! The real programs, real brokers, real containers, seen from outside as a user sees them.

mod checkpoints;
mod cluster;
mod drain;
#[path = "../../../controller/tests/common/etcd.rs"]
mod etcd;
mod faults;
mod jobs;
mod kills;
mod offline;
mod several;
mod staging;
