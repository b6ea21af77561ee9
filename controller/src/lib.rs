//! The controller: `core` decides, `io` acts.

pub mod core;
