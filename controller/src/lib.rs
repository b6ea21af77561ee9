//! What the controller daemon and the command-line client are made of: `core` decides, `io` acts, `cli` asks.

pub mod admin;
mod broker_config;
pub mod cli;
pub mod config;
pub mod core;
mod init;
pub mod io;
pub mod run;
