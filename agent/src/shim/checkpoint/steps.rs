//! Which of the driver's calls comes next, for the memory of a pod's processes to leave its devices, or to come back
//! onto them. Pure: answers come in, calls go out; the supervisor asks and waits.
//!
//! All processes are locked before the first is saved, so that none waits for another that can no longer answer. The
//! way back begins with how each process stands, whatever was done or left undone before: it may begin anew at any time.

use std::collections::VecDeque;

use crate::cuda::{Answer, Call, Process, State, Survey};

#[derive(Debug)]
pub struct Steps {
    aim: Aim,
    todo: VecDeque<Call>,
}

#[derive(Debug)]
enum Aim {
    Survey,
    Out,
    Back {
        pairs: Vec<(String, String)>,
        /// So many processes must be there.
        wanted: usize,
    },
}

/// What an answer leads to.
#[derive(Debug, PartialEq, Eq)]
pub enum Next {
    Ask(Call),
    Surveyed(Survey),
    Done,
    /// Something is under way: to be begun anew in a moment.
    Wait,
    /// May go better another time.
    Failed(String),
    /// Will not.
    Lost(String),
}

impl Steps {
    /// What there is to save.
    pub fn survey(pids: Vec<i32>, devices: Vec<String>) -> Self {
        Self { aim: Aim::Survey, todo: [Call::Survey { pids, devices }].into() }
    }

    /// The memory of these, of which there is one at least, leaves the devices; each may take so long to be locked.
    pub fn out(processes: &[Process], timeout_ms: u32) -> Self {
        let lock = |process: &Process| Call::Lock { pid: process.pid, timeout_ms };
        let save = |process: &Process| Call::Checkpoint { pid: process.pid };
        let todo = processes.iter().map(lock).chain(processes.iter().map(save)).collect();
        Self { aim: Aim::Out, todo }
    }

    /// The memory of those of `pids` that have some comes back, from each pair's first device onto its second; without
    /// pairs onto those where it was.
    pub fn back(pids: Vec<i32>, pairs: Vec<(String, String)>, wanted: usize) -> Self {
        Self { aim: Aim::Back { pairs, wanted }, todo: [Call::States { pids }].into() }
    }

    pub fn first(&mut self) -> Next {
        self.ask()
    }

    fn ask(&mut self) -> Next {
        self.todo.pop_front().map_or(Next::Done, Next::Ask)
    }

    /// The last call was answered.
    pub fn next(&mut self, answer: Answer) -> Next {
        match (answer, &self.aim) {
            (Answer::Failed(why), _) => Next::Failed(why),
            (Answer::Surveyed(survey), Aim::Survey) => Next::Surveyed(survey),
            (Answer::States(states), Aim::Back { pairs, wanted }) => {
                if let Some(process) = states.iter().find(|process| process.state == State::Failed) {
                    return Next::Lost(format!(
                        "NVIDIA's driver has given up process {}: what it had on its GPU is lost",
                        process.pid
                    ));
                }
                if states.len() < *wanted {
                    let known = states.len();
                    return Next::Failed(format!(
                        "NVIDIA's driver knows {known} of the {wanted} processes that were saved with memory on a GPU"
                    ));
                }
                if states.iter().any(|process| process.state == State::Other) {
                    return Next::Wait;
                }
                let all = |wanted: &[State]| -> Vec<i32> {
                    let these = states.iter().filter(|process| wanted.contains(&process.state));
                    these.map(|process| process.pid).collect()
                };
                let restore = |pid| Call::Restore { pid, pairs: pairs.clone() };
                let unlock = |pid| Call::Unlock { pid };
                let restored = all(&[State::Checkpointed]).into_iter().map(restore);
                let unlocked = all(&[State::Checkpointed, State::Locked]).into_iter().map(unlock);
                self.todo = restored.chain(unlocked).collect();
                self.ask()
            }
            (Answer::Done, Aim::Out | Aim::Back { .. }) => self.ask(),
            (answer, _) => {
                Next::Failed(format!("the driver's call was answered with something else: {answer:?}"))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    fn process(pid: i32, state: State) -> Process {
        Process { pid, state }
    }

    fn states(of: &[State]) -> Answer {
        Answer::States(of.iter().zip(1..).map(|(state, pid)| process(pid, *state)).collect())
    }

    #[test]
    fn all_are_locked_before_the_first_is_saved() {
        let mut steps = Steps::out(&[process(1, State::Running), process(2, State::Running)], 9);
        let lock = |pid| Next::Ask(Call::Lock { pid, timeout_ms: 9 });
        let save = |pid| Next::Ask(Call::Checkpoint { pid });
        assert_eq!(steps.first(), lock(1));
        for expect in [lock(2), save(1), save(2), Next::Done] {
            assert_eq!(steps.next(Answer::Done), expect);
        }
        let mut steps = Steps::out(&[process(1, State::Running)], 9);
        steps.first();
        assert_eq!(steps.next(Answer::Failed("no".into())), Next::Failed("no".into()));
    }

    #[test]
    fn the_way_back_begins_with_how_each_stands() {
        let pairs = vec![("GPU-1".to_owned(), "GPU-2".to_owned())];
        let mut steps = Steps::back(vec![1, 2, 3], pairs.clone(), 0);
        assert_eq!(steps.first(), Next::Ask(Call::States { pids: vec![1, 2, 3] }));
        let restore = Next::Ask(Call::Restore { pid: 1, pairs });
        assert_eq!(steps.next(states(&[State::Checkpointed, State::Locked, State::Running])), restore);
        assert_eq!(steps.next(Answer::Done), Next::Ask(Call::Unlock { pid: 1 }));
        assert_eq!(steps.next(Answer::Done), Next::Ask(Call::Unlock { pid: 2 }));
        assert_eq!(steps.next(Answer::Done), Next::Done);
    }

    #[test]
    fn what_is_under_way_is_waited_for_and_what_is_lost_is_said() {
        type Case<'a> = (&'a [State], usize, fn(&Next) -> bool);
        let cases: [Case; 6] = [
            (&[], 0, |next| *next == Next::Done),
            (&[State::Running], 1, |next| *next == Next::Done),
            (&[State::Checkpointed, State::Other], 0, |next| *next == Next::Wait),
            (&[State::Other, State::Failed], 0, |next| matches!(next, Next::Lost(_))),
            (
                &[State::Checkpointed],
                2,
                |next| matches!(next, Next::Failed(why) if why.contains("1 of the 2")),
            ),
            (&[State::Locked], 1, |next| *next == Next::Ask(Call::Unlock { pid: 1 })),
        ];
        for (found, wanted, is_right) in cases {
            let mut steps = Steps::back(vec![1, 2], Vec::new(), wanted);
            steps.first();
            let next = steps.next(states(found));
            assert!(is_right(&next), "{found:?}: {next:?}");
        }
        assert!(matches!(Steps::survey(vec![], vec![]).next(Answer::Done), Next::Failed(_)));
    }

    /// A driver that does what it is asked, and at times fails, before or after it has done it.
    struct Driver {
        states: BTreeMap<i32, State>,
        trouble: Vec<u8>,
    }

    impl Driver {
        fn answer(&mut self, call: &Call) -> Answer {
            let trouble = self.trouble.pop().unwrap_or(0);
            if trouble == 1 {
                return Answer::Failed("before".into());
            }
            let (pid, from, to) = match call {
                Call::Lock { pid, .. } => (pid, State::Running, State::Locked),
                Call::Checkpoint { pid } => (pid, State::Locked, State::Checkpointed),
                Call::Restore { pid, .. } => (pid, State::Checkpointed, State::Locked),
                Call::Unlock { pid } => (pid, State::Locked, State::Running),
                Call::States { .. } | Call::Survey { .. } => {
                    let of = |(pid, state): (&i32, &State)| process(*pid, *state);
                    return Answer::States(self.states.iter().map(of).collect());
                }
            };
            assert_eq!(self.states.insert(*pid, to), Some(from), "{call:?}");
            if trouble == 2 { Answer::Failed("after".into()) } else { Answer::Done }
        }

        fn play(&mut self, mut steps: Steps) -> bool {
            let mut next = steps.first();
            loop {
                match next {
                    Next::Ask(call) => next = steps.next(self.answer(&call)),
                    Next::Done => return true,
                    Next::Failed(_) => return false,
                    other => panic!("{other:?}"),
                }
            }
        }
    }

    proptest! {
        #[test]
        fn whatever_fails_on_the_way_out_all_run_in_the_end(
            count in 1..4i32, trouble in proptest::collection::vec(0u8..3, 0..24)
        ) {
            let running: BTreeMap<i32, State> = (0..count).map(|pid| (pid, State::Running)).collect();
            let processes: Vec<Process> = running.keys().map(|pid| process(*pid, State::Running)).collect();
            let mut driver = Driver { states: running.clone(), trouble };
            if driver.play(Steps::out(&processes, 1)) {
                prop_assert!(driver.states.values().all(|state| *state == State::Checkpointed));
            }
            let mut tries = 0;
            while !driver.play(Steps::back((0..count).collect(), Vec::new(), 0)) {
                tries += 1;
                prop_assert!(tries <= 24);
            }
            prop_assert_eq!(driver.states, running);
        }
    }
}
