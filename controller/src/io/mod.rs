//! Acts for the core: the bus, the broker, the store, the depot, HTTP, the clock. It decides nothing about jobs.

pub mod broker;
pub mod bus;
pub mod clock;
pub mod depot;
pub mod http;
pub mod memory;
pub mod metrics;
pub mod random;
pub mod store;
pub mod systemd;
