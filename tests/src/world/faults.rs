//! What befalls the machines of a history.

use berth_agent::core::departure::Leaves;
use berth_agent::core::{Event as AgentEvent, Now as AgentNow};
use berth_controller::core::{Config, Controller, Event as ControllerEvent};
use berth_protocol::ids::{StoreId, Term};
use berth_protocol::units::Millis;

use super::{Due, FAULTS_MS, World};

#[derive(Debug, Clone, Copy)]
pub(crate) enum Fault {
    AgentCrash(usize),
    AgentStart(usize),
    PowerCut(usize),
    /// A power cut without return.
    Burn(usize),
    Partition(usize),
    Heal(usize),
    ControllerCrash,
    ControllerStart,
    /// The machine is said to go, and then not.
    Notice(usize),
    NoticeWithdrawn(usize),
    /// The agent is killed between what it writes and some of what it does.
    AgentCrashWithin(usize),
    /// SIGSTOP and SIGCONT.
    AgentStop(usize),
    AgentGoOn(usize),
    ShimsHang(usize),
    ShimsGoOn(usize),
    ShimsDie(usize),
    /// What is said to the node waits on its way and comes in a heap; what it says is lost, where it is `mute`.
    Jam {
        node: usize,
        mute: bool,
    },
    Flow(usize),
    /// The controller is killed between what it writes and some of what it says.
    ControllerCrashWithin,
}

/// What waits for a node whose connection stands, and carries nothing.
#[derive(Debug)]
pub(crate) struct Jam {
    pub mute: bool,
    pub waiting: Vec<AgentEvent>,
}

/// What waited comes within this time, in any order.
const HEAP_MS: u64 = 4_000;

fn leaving(now: AgentNow) -> AgentEvent {
    let (why, at) = ("drawn".to_owned(), now.boot.plus(Millis(30_000)));
    AgentEvent::Leaving(Some(Leaves { why, at }))
}

impl World {
    pub(super) fn plan_faults(&mut self) {
        for _ in 0..self.rng.usize(0..12) {
            let (at, node) = (self.rng.u64(1_000..FAULTS_MS), self.rng.usize(0..self.nodes.len()));
            let back = (at + self.rng.u64(10..200_000)).min(FAULTS_MS);
            let within = self.rng.u64(at..=back);
            let (fault, repair) = match self.rng.u8(0..11) {
                0 => (Fault::AgentCrash(node), Fault::AgentStart(node)),
                1 => (Fault::PowerCut(node), Fault::AgentStart(node)),
                2 => (Fault::Partition(node), Fault::Heal(node)),
                3 => {
                    if self.rng.bool() {
                        // A node that the next controller does not hear, and its predecessor granted last.
                        let soon = at + self.rng.u64(10..20_000);
                        self.at(at, Due::Fault(Fault::Partition(node)));
                        self.at(soon, Due::Fault(Fault::ControllerStart));
                        self.at(back, Due::Fault(Fault::Heal(node)));
                    }
                    (Fault::ControllerCrash, Fault::ControllerStart)
                }
                4 => (Fault::Notice(node), Fault::NoticeWithdrawn(node)),
                5 => (Fault::AgentCrashWithin(node), Fault::AgentStart(node)),
                6 => (Fault::AgentStop(node), Fault::AgentGoOn(node)),
                7 => {
                    // Seen only where no grant comes meanwhile.
                    self.at(at + 1, Due::Fault(Fault::Partition(node)));
                    self.at(back, Due::Fault(Fault::Heal(node)));
                    (Fault::ShimsHang(node), Fault::ShimsGoOn(node))
                }
                8 => (Fault::ShimsDie(node), Fault::AgentStart(node)),
                9 => {
                    if self.rng.bool() {
                        self.at(within, Due::Fault(Fault::AgentCrash(node)));
                        self.at(within + 1_000, Due::Fault(Fault::AgentStart(node)));
                    }
                    (Fault::Jam { node, mute: self.rng.bool() }, Fault::Flow(node))
                }
                _ => (Fault::ControllerCrashWithin, Fault::ControllerStart),
            };
            self.at(at, Due::Fault(fault));
            self.at(back, Due::Fault(repair));
        }
        // One that was to die in the middle of something, and had nothing to do, is there all the same.
        for node in 0..self.nodes.len() {
            self.at(FAULTS_MS, Due::Fault(Fault::AgentStart(node)));
        }
        self.at(FAULTS_MS, Due::Fault(Fault::ControllerStart));
    }

    pub(super) fn fault(&mut self, fault: Fault) -> Result<(), String> {
        match fault {
            Fault::AgentCrash(n) => self.nodes[n].crash(),
            Fault::PowerCut(n) => self.nodes[n].power_cut(),
            Fault::Burn(n) => {
                self.nodes[n].power_cut();
                self.burnt = Some(n);
            }
            Fault::AgentStart(n) if self.nodes[n].agent.is_none() && self.burnt != Some(n) => {
                self.sessions[n] += 1;
                let now = self.agent_now();
                let mut out = self.nodes[n].start(now);
                if self.noticed[n] {
                    out.extend(self.nodes[n].step(now, leaving(now)));
                }
                self.perform(n, out);
            }
            Fault::Notice(n) | Fault::NoticeWithdrawn(n) => {
                self.noticed[n] = matches!(fault, Fault::Notice(_));
                let now = self.agent_now();
                let event = if self.noticed[n] { leaving(now) } else { AgentEvent::Leaving(None) };
                let out = self.nodes[n].step(now, event);
                self.perform(n, out);
            }
            Fault::Partition(n) => {
                self.cut[n] = true;
                let now = self.agent_now();
                let out = self.nodes[n].step(now, AgentEvent::BusDown);
                self.perform(n, out);
            }
            Fault::Heal(n) if self.cut[n] => {
                self.cut[n] = false;
                self.sessions[n] += 1;
                let now = self.agent_now();
                let out = self.nodes[n].step(now, AgentEvent::BusUp);
                self.perform(n, out);
            }
            Fault::AgentCrashWithin(n) => {
                let done = self.rng.usize(0..3);
                self.nodes[n].crash_after(done);
            }
            Fault::AgentStop(n) => self.nodes[n].stop(),
            Fault::AgentGoOn(n) => {
                let (now, clock_first) = (self.agent_now(), self.rng.bool());
                let out = self.nodes[n].go_on(now, clock_first);
                self.perform(n, out);
            }
            Fault::ShimsHang(n) | Fault::ShimsGoOn(n) => {
                let now = self.agent_now();
                let out = self.nodes[n].hang(now, matches!(fault, Fault::ShimsHang(_)));
                self.perform(n, out);
            }
            Fault::ShimsDie(n) => {
                let out = self.nodes[n].kill_shims();
                self.perform(n, out);
            }
            Fault::Jam { node, mute } => {
                self.jams[node].get_or_insert_with(|| Jam { mute, waiting: Vec::new() });
            }
            Fault::Flow(node) => {
                let waited = self.jams[node].take().map(|jam| jam.waiting).unwrap_or_default();
                for event in waited {
                    let at = self.now_ms + self.rng.u64(0..HEAP_MS);
                    self.at(at, Due::ToNode { node, session: None, event });
                }
            }
            Fault::ControllerCrash => self.controller = None,
            Fault::ControllerCrashWithin => self.controller_dies_after = Some(self.rng.usize(0..3)),
            Fault::ControllerStart if self.controller.is_none() => {
                self.controller_dies_after = None;
                self.term += 1;
                let config = Config {
                    cluster: self.cluster.clone(),
                    store: StoreId::parse("sim-store").expect("a token"),
                    term: Term(self.term),
                    depot_url: "http://127.0.0.1:1".into(),
                    namespaces: std::collections::BTreeMap::new(),
                    moves_max: 8,
                    secret: [7; 32],
                    seed: self.rng.u64(..),
                };
                let entries: Vec<_> =
                    self.store.iter().map(|(key, value)| (key.clone(), Some(value.clone()))).collect();
                let controller = Controller::load(config, entries, self.now())
                    .map_err(|error| format!("cannot load: {error}"))?;
                self.controller = Some(controller);
                self.ask_controller(ControllerEvent::BusUp)?;
            }
            Fault::AgentStart(_) | Fault::Heal(_) | Fault::ControllerStart => {}
        }
        Ok(())
    }
}
