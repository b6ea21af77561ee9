//! berth's node daemon and its per-pod supervisor.

pub mod cdi;
pub mod config;
pub mod core;
pub mod cuda;
pub mod io;
pub mod logging;
pub mod policy;
pub mod run;
pub mod shim;
pub mod task;
