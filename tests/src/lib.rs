//! The seeded simulator: the real cores of controller and agents in a made-up world of lossy messages, crashes and
//! reboots, with an oracle that looks at every step. One seed is one history, for ever. Beside it, what measures and
//! what breaks the real programs: `bench` and `soak`.

pub mod bench;
pub mod etcd;
pub mod fuzz;
pub mod image;
pub mod mosquitto;
pub mod node;
pub mod oracle;
pub mod plan;
pub mod ports;
pub mod rabbitmq;
pub mod soak;
mod wishes;
pub mod world;
