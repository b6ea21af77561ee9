//! A line to a member of etcd on which a request can be kept back, or its answer be lost.

use std::io::{self, Read as _, Write as _};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Mutex};
use std::thread;

/// What begins a connection of HTTP/2, before its frames.
const PREFACE_BYTES: usize = 24;
const FRAME_HEADER_BYTES: usize = 9;
const DATA: u8 = 0;
const HEADERS: u8 = 1;

pub struct Line {
    /// `HOST:PORT`, for clients.
    pub address: String,
    catch: Arc<Mutex<Option<Catch>>>,
}

/// The next request with these bytes in it breaks its connection.
struct Catch {
    with: Vec<u8>,
    /// Who lets it through; nobody: it has gone through before.
    keeper: Option<Sender<Held>>,
}

/// A request on a connection that its client has lost.
pub struct Held {
    frame: Vec<u8>,
    member: TcpStream,
    /// Of which requests an answer came back.
    answered: Receiver<[u8; 4]>,
}

impl Line {
    pub fn to(member: &str) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let line = Self { address, catch: Arc::default() };
        let (member, catch) = (member.to_owned(), line.catch.clone());
        thread::spawn(move || {
            for client in listener.incoming() {
                let (Ok(client), Ok(member)) = (client, TcpStream::connect(&member)) else { continue };
                let (answers, answered) = mpsc::channel();
                let (from, to) = (member.try_clone().unwrap(), client.try_clone().unwrap());
                let (lost, catch) = (Arc::new(AtomicBool::new(false)), catch.clone());
                let broken = lost.clone();
                thread::spawn(move || answer(from, to, &answers, &broken));
                thread::spawn(move || ask(client, member, answered, &lost, &catch));
            }
        });
        line
    }

    /// Keeps back the next request with these bytes in it.
    pub fn keep_back(&self, with: &str) -> Receiver<Held> {
        let (keeper, held) = mpsc::channel();
        *self.catch.lock().unwrap() = Some(Catch { with: with.as_bytes().to_vec(), keeper: Some(keeper) });
        held
    }

    /// Loses the answer to it.
    pub fn lose_answer(&self, with: &str) {
        *self.catch.lock().unwrap() = Some(Catch { with: with.as_bytes().to_vec(), keeper: None });
    }
}

impl Held {
    /// Lets it through; over when the member has answered.
    pub fn release(mut self) {
        self.member.write_all(&self.frame).unwrap();
        while self.answered.recv().unwrap() != stream(&self.frame) {}
    }
}

fn frame(from: &mut TcpStream) -> io::Result<Vec<u8>> {
    let mut frame = vec![0; FRAME_HEADER_BYTES];
    from.read_exact(&mut frame)?;
    let length = u32::from_be_bytes([0, frame[0], frame[1], frame[2]]) as usize;
    frame.resize(FRAME_HEADER_BYTES + length, 0);
    from.read_exact(&mut frame[FRAME_HEADER_BYTES..])?;
    Ok(frame)
}

fn stream(frame: &[u8]) -> [u8; 4] {
    [frame[5], frame[6], frame[7], frame[8]]
}

fn answer(mut member: TcpStream, mut client: TcpStream, answers: &Sender<[u8; 4]>, lost: &AtomicBool) {
    while let Ok(frame) = frame(&mut member) {
        if frame[3] == HEADERS {
            let _ = answers.send(stream(&frame));
        }
        if !lost.load(Ordering::SeqCst) {
            // One that has hung up misses nothing.
            let _ = client.write_all(&frame);
        }
    }
    let _ = client.shutdown(Shutdown::Both);
}

fn ask(
    mut client: TcpStream,
    mut member: TcpStream,
    answered: Receiver<[u8; 4]>,
    lost: &AtomicBool,
    catch: &Mutex<Option<Catch>>,
) {
    let mut preface = [0; PREFACE_BYTES];
    if client.read_exact(&mut preface).is_err() || member.write_all(&preface).is_err() {
        return;
    }
    while let Ok(frame) = frame(&mut client) {
        let caught = catch.lock().unwrap().take_if(|catch| {
            frame[3] == DATA && frame.windows(catch.with.len()).any(|window| window == catch.with)
        });
        if let Some(caught) = caught {
            lost.store(true, Ordering::SeqCst);
            let held = Held { frame, member, answered };
            match caught.keeper {
                Some(keeper) => drop(keeper.send(held)),
                None => held.release(),
            }
            let _ = client.shutdown(Shutdown::Both);
            return;
        }
        if member.write_all(&frame).is_err() {
            break;
        }
    }
    let _ = member.shutdown(Shutdown::Both);
}
