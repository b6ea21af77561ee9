//! What travels: between users and the controller (`user`, `query`), between the controller and agents (`node`).

pub mod node;
pub mod query;
pub mod user;
