//! berth's node daemon and its per-pod supervisor.

pub mod task;
pub mod io;
pub mod shim;
