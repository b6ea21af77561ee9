//! berth's node agent: `io` acts on the machine.

pub mod io;
