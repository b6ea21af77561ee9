//! Carries what a container writes from its pipes into the log, cut at lines where possible.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use berth_protocol::ids::ContainerName;
use berth_protocol::limits::LOG_RECORD_BYTES_MAX;
use berth_protocol::log::Stream;

use super::log::Writer;
use super::sys;

/// Reads of one pipe before the loop looks at other things.
const READS_MAX: usize = 16;

/// One pipe of a container.
pub struct Pump {
    pipe: Option<OwnedFd>,
    stream: Stream,
    /// The beginning of a line whose end did not fit into its record.
    carry: Vec<u8>,
}

impl Pump {
    pub fn new(pipe: OwnedFd, stream: Stream) -> Self {
        Self { pipe: Some(pipe), stream, carry: Vec::new() }
    }

    /// Of a stream that the program has closed.
    pub fn closed(stream: Stream) -> Self {
        Self { pipe: None, stream, carry: Vec::new() }
    }

    pub fn fd(&self) -> Option<BorrowedFd<'_>> {
        self.pipe.as_ref().map(AsFd::as_fd)
    }

    /// Moves what is there. The container is not held up for what the log cannot take.
    pub fn drain(&mut self, log: &mut Writer, container: &ContainerName) {
        let mut buffer = [0; LOG_RECORD_BYTES_MAX];
        for _ in 0..READS_MAX {
            let Some(pipe) = &self.pipe else { return };
            let kept = self.carry.len();
            buffer[..kept].copy_from_slice(&self.carry);
            match nix::unistd::read(pipe, &mut buffer[kept..]) {
                Ok(0) => {
                    self.flush(log, container);
                    self.pipe = None;
                }
                Ok(n) => {
                    let filled = &buffer[..kept + n];
                    let newline = filled.iter().rposition(|byte| *byte == b'\n');
                    // A full buffer is a record whose line may go on; anything less is all there is for now.
                    let cut = match newline {
                        Some(at) if filled.len() == buffer.len() => at + 1,
                        _ => filled.len(),
                    };
                    log.append(sys::now(), container, self.stream, &filled[..cut]);
                    self.carry = filled[cut..].to_vec();
                }
                Err(nix::Error::EINTR) => {}
                Err(nix::Error::EAGAIN) => return self.flush(log, container),
                Err(_) => self.pipe = None,
            }
        }
    }

    fn flush(&mut self, log: &mut Writer, container: &ContainerName) {
        if !self.carry.is_empty() {
            log.append(sys::now(), container, self.stream, &self.carry);
            self.carry = Vec::new();
        }
    }
}

/// What a pipe still holds once its writers are dead.
pub fn drain_rest(pumps: &mut [Pump], log: &mut Writer, container: &ContainerName) {
    for pump in pumps {
        let mut before = None;
        while pump.pipe.is_some() && before != Some(log.last_seq()) {
            before = Some(log.last_seq());
            pump.drain(log, container);
        }
    }
}
