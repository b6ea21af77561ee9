//! Whoever types `berth`: each command in a thread of its own, again until it is done where that is what a user would do.

use std::process::{Command, Output, Stdio};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

/// A command that has failed is typed again after this long.
const PAUSE: Duration = Duration::from_millis(500);

/// What a command was for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Errand {
    /// Of a job, by its name.
    Submit(String),
    List,
    /// Of a fault, in words.
    Order(String),
}

/// What came of it.
pub struct Answer {
    pub errand: Errand,
    pub asked: Instant,
    /// Of the last time.
    pub output: std::io::Result<Output>,
}

impl Answer {
    pub fn is_good(&self) -> bool {
        self.output.as_ref().is_ok_and(|output| output.status.success())
    }

    pub fn said(&self) -> String {
        match &self.output {
            Ok(output) => format!("{}: {}", output.status, String::from_utf8_lossy(&output.stderr).trim()),
            Err(error) => error.to_string(),
        }
    }
}

pub struct User {
    to: Sender<Answer>,
    answers: Receiver<Answer>,
    open: usize,
}

impl Default for User {
    fn default() -> Self {
        let (to, answers) = channel();
        Self { to, answers, open: 0 }
    }
}

impl User {
    /// `again` until it is done or that moment has come; without it, once.
    pub fn send(&mut self, errand: Errand, mut command: Command, again: Option<Instant>) {
        let to = self.to.clone();
        command.stdin(Stdio::null());
        self.open += 1;
        std::thread::spawn(move || {
            loop {
                let asked = Instant::now();
                let answer = Answer { errand: errand.clone(), asked, output: command.output() };
                if answer.is_good() || again.is_none_or(|until| Instant::now() > until) {
                    // Nobody listens any more at the end.
                    let _ = to.send(answer);
                    return;
                }
                std::thread::park_timeout(PAUSE);
            }
        });
    }

    pub fn answers(&mut self) -> Vec<Answer> {
        let answers: Vec<Answer> = self.answers.try_iter().collect();
        self.open -= answers.len();
        answers
    }

    /// Commands that are on their way.
    pub fn open(&self) -> usize {
        self.open
    }
}
