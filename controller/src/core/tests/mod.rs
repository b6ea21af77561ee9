//! The core against a model of agents: a world with a store, a bus that may lose, double and reorder, and an oracle.

mod callers;
mod chaos;
mod checkpoints;
mod clocks;
mod damage;
mod given_up;
mod images;
mod keys;
mod members;
mod packing;
mod policy;
mod restored;
mod rotation;
mod scenarios;
mod scheduling;
mod secrets;
mod staging;
mod world;
