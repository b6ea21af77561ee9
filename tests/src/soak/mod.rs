//! The real thing under faults: agents, controllers, a broker and etcd in network namespaces of their own, jobs that come
//! all the time, and something that breaks every few seconds. What containers have written of themselves tells whether
//! berth kept its word.

pub mod faults;
pub mod ground;
pub mod history;
mod inject;
pub mod judge;
pub mod leaks;
pub mod run;
pub mod ticker;
pub mod user;
pub mod weight;
pub mod wire;
pub mod work;
