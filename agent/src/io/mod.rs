//! Everything of the agent that touches the machine; it decides nothing.

pub mod image;
