//! What the controller daemon and the command-line client are made of.

pub mod cli;
