//! The nouns of berth and how they look on the wire: ids, units, limits, the job file, topics, messages, codec.
//!
//! This crate owns every name and number that two programs must agree on. It performs no IO and reads no clock.

pub mod broker;
pub mod chain;
pub mod checkpoint;
pub mod chunk;
pub mod codec;
pub mod delegation;
pub mod hex;
pub mod ids;
pub mod image;
pub mod job;
pub mod join;
pub mod limits;
pub mod log;
pub mod manifest;
pub mod message;
pub mod pod;
pub mod policy;
pub mod request;
pub mod resources;
pub mod rule;
pub mod secret;
pub mod sign;
pub mod tls;
pub mod token;
pub mod topic;
pub mod units;
