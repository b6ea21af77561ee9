//! berth's node daemon and its per-pod supervisor.

pub mod task;
