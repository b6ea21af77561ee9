//! The shim's Unix socket: agents come and go, each line one message. Speaks, decides nothing.

use std::fs;
use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

use super::sys;
use crate::task::{Order, Report, file};

/// Agents at once: one, a second during its restart, and somebody who looks.
const CONNECTIONS_MAX: usize = 8;
const ORDER_BYTES_MAX: usize = 4 * 1024;
/// Who does not read what it is told is left alone.
const UNSENT_BYTES_MAX: usize = 64 * 1024;

pub struct Server {
    listener: UnixListener,
    connections: Vec<Connection>,
}

struct Connection {
    stream: UnixStream,
    received: Vec<u8>,
    unsent: Vec<u8>,
    follow: bool,
    /// The newest word about the log, until those before it are read: the next says all that the last did.
    log: Option<Report>,
    open: bool,
}

/// Connects to the shim of a pod's directory, however long its path is.
pub fn connect(pod_dir: &Path) -> io::Result<UnixStream> {
    let dir = fs::File::open(pod_dir)?;
    UnixStream::connect(format!("/proc/self/fd/{}/{}", dir.as_raw_fd(), file::SOCKET))
}

impl Server {
    /// Must be the holder of the pod's lock: an old socket is removed.
    pub fn bind(pod_dir: &Path) -> io::Result<Self> {
        let dir = fs::File::open(pod_dir)?;
        // A socket's address has 108 bytes.
        let path = format!("/proc/self/fd/{}/{}", dir.as_raw_fd(), file::SOCKET);
        let _ = fs::remove_file(&path);
        let listener = UnixListener::bind(&path)?;
        listener.set_nonblocking(true)?;
        Ok(Self { listener, connections: Vec::new() })
    }

    /// What the loop is to poll: the listener, then the connections.
    pub fn poll_fds(&self) -> Vec<libc::pollfd> {
        let connection = |c: &Connection| {
            let out = if c.unsent.is_empty() { 0 } else { libc::POLLOUT };
            sys::want(&c.stream, libc::POLLIN | out)
        };
        [sys::want(&self.listener, libc::POLLIN)]
            .into_iter()
            .chain(self.connections.iter().map(connection))
            .collect()
    }

    /// Takes in who has come, telling them `greeting`, and what was ordered; never blocks.
    pub fn receive(&mut self, greeting: &[Report]) -> Vec<Order> {
        while let Ok((stream, _)) = self.listener.accept() {
            if self.connections.len() >= CONNECTIONS_MAX || stream.set_nonblocking(true).is_err() {
                continue;
            }
            let (received, unsent) = (Vec::new(), Vec::new());
            let mut connection =
                Connection { stream, received, unsent, follow: false, log: None, open: true };
            greeting.iter().for_each(|report| connection.send(report));
            self.connections.push(connection);
        }
        let orders = self.connections.iter_mut().flat_map(Connection::receive).collect();
        self.drop_closed();
        orders
    }

    pub fn send(&mut self, report: &Report) {
        self.connections.iter_mut().for_each(|connection| connection.send(report));
        self.drop_closed();
    }

    /// To those who follow the log: it has grown.
    pub fn send_to_followers(&mut self, report: &Report) {
        for connection in self.connections.iter_mut().filter(|connection| connection.follow) {
            connection.log = Some(report.clone());
            connection.flush();
        }
        self.drop_closed();
    }

    fn drop_closed(&mut self) {
        self.connections.retain(|connection| connection.open);
    }
}

impl Connection {
    fn send(&mut self, report: &Report) {
        self.queue(report);
        self.flush();
    }

    fn queue(&mut self, report: &Report) {
        // A report always has a JSON form.
        let Ok(line) = serde_json::to_vec(report) else { return };
        self.unsent.extend_from_slice(&line);
        self.unsent.push(b'\n');
    }

    fn flush(&mut self) {
        loop {
            if self.unsent.is_empty() {
                let Some(report) = self.log.take() else { break };
                self.queue(&report);
            }
            match self.stream.write(&self.unsent) {
                Ok(n) => drop(self.unsent.drain(..n)),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    self.open &= self.unsent.len() <= UNSENT_BYTES_MAX;
                    return;
                }
                Err(_) => return self.open = false,
            }
        }
        self.unsent = Vec::new();
    }

    fn receive(&mut self) -> Vec<Order> {
        self.flush();
        let mut buffer = [0; 1024];
        loop {
            match self.stream.read(&mut buffer) {
                Ok(0) => self.open = false,
                Ok(n) => {
                    self.received.extend_from_slice(&buffer[..n]);
                    if self.received.len() <= ORDER_BYTES_MAX {
                        continue;
                    }
                    self.open = false;
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                Err(_) => self.open = false,
            }
            break;
        }
        let mut orders = Vec::new();
        while let Some(end) = self.received.iter().position(|byte| *byte == b'\n') {
            let line: Vec<u8> = self.received.drain(..=end).collect();
            match serde_json::from_slice(&line) {
                // Whose wish it is matters only here.
                Ok(Order::Follow { follow }) => self.follow = follow,
                Ok(order) => orders.push(order),
                // A newer agent may know words that this shim does not.
                Err(_) => {}
            }
        }
        orders
    }
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader};

    use berth_protocol::ids::Run;

    use super::*;

    #[test]
    fn who_reads_late_hears_the_newest_of_the_log_and_is_not_let_go() {
        let dir = tempfile::tempdir().unwrap();
        let mut server = Server::bind(dir.path()).unwrap();
        let mut agent = connect(dir.path()).unwrap();
        agent.write_all(b"{\"follow\":{\"follow\":true}}\n").unwrap();
        server.receive(&[]);
        server.receive(&[]);
        let last = 100_000;
        (1..=last).for_each(|seq| server.send_to_followers(&Report::Log { seq }));
        server.send(&Report::Created { run: Run(1) });
        agent.set_nonblocking(true).unwrap();
        let (mut seqs, mut created) = (Vec::new(), false);
        let mut lines = BufReader::new(agent);
        let mut line = String::new();
        while !created || seqs.last() != Some(&last) {
            match lines.read_line(&mut line) {
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => drop(server.receive(&[])),
                read => {
                    assert!(read.unwrap() > 0, "let go");
                    match serde_json::from_str(&line).unwrap() {
                        Report::Log { seq } => seqs.push(seq),
                        report => created = report == Report::Created { run: Run(1) },
                    }
                    line.clear();
                }
            }
        }
        assert!(seqs.is_sorted(), "never back");
        assert!(seqs.len() < 50_000, "{} of {last}: nothing was left out", seqs.len());
    }
}
