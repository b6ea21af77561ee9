//! berth's node daemon and its per-pod supervisor.

pub mod io;
pub mod shim;
pub mod task;
