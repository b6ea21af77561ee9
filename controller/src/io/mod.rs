//! Acts for the core: the bus, the broker, the store, the depot, HTTP, the clock. It decides nothing about jobs.

pub mod broker;
pub mod bus;
pub mod ca;
pub mod clock;
pub mod depot;
pub mod front;
pub mod http;
pub mod members;
pub mod memory;
pub mod metrics;
pub mod random;
pub mod store;
pub mod systemd;
pub mod vault;
pub mod vouch;
