//! The controller: `core` decides, `io` acts.

pub mod config;
pub mod core;
pub mod io;
pub mod run;
