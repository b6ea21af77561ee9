//! What befalls the machines of a history: drawn ahead of it, and done when its time comes.

use berth_agent::core::departure::Leaves;
use berth_agent::core::{Event as AgentEvent, Now as AgentNow};
use berth_protocol::units::Millis;

use super::leaders::Within;
use super::network::Link;
use super::{Due, World};

#[derive(Debug, Clone, Copy)]
pub(crate) enum Fault {
    AgentCrash(usize),
    AgentStart(usize),
    /// So many records that were written and not synced are on disk.
    PowerCut {
        node: usize,
        synced: usize,
    },
    /// The agent's ledger is lost.
    LoseLedger(usize),
    /// A copy of the machine's disk is made, and started elsewhere once the machine itself has gone on since: before that
    /// it is like the machine after a reboot, and nobody can tell. It starts again; it is switched off.
    Copy(usize),
    CopyOn(usize),
    CopyRestart(usize),
    CopyOff(usize),
    /// A power cut without return.
    Burn(usize),
    Partition(usize),
    Heal(usize),
    /// What the controller says never reaches it again, what it says is heard.
    Deafen(usize),
    ControllerCrash,
    ControllerStart,
    /// The machine is said to go, and then not.
    Notice(usize),
    NoticeWithdrawn(usize),
    /// The agent is killed between what it writes and some of what it does.
    AgentCrashWithin {
        node: usize,
        done: usize,
        /// In a step that begins a run.
        launching: bool,
    },
    /// The agent is killed in the middle of a write.
    AgentTorn {
        node: usize,
        whole: usize,
    },
    /// SIGSTOP and SIGCONT; then, as it may be, it looks at the clock first.
    AgentStop(usize),
    AgentGoOn {
        node: usize,
        clock_first: bool,
    },
    ShimsHang(usize),
    ShimsGoOn(usize),
    ShimsDie(usize),
    /// A hypervisor stops the machine, its clock with it, and lets it go on.
    Pause(usize),
    Resume(usize),
    /// Somebody sets the civil clock of a machine, or of the controller's.
    WallJump {
        node: Option<usize>,
        ms: i64,
    },
    /// What is said to the node waits on its way and comes in a heap; what it says is lost, where it is `mute`.
    Jam {
        node: usize,
        mute: bool,
    },
    Flow(usize),
    /// What it says is lost.
    Mute(usize),
    Unmute(usize),
    /// The controller is killed between what it writes and some of what it says.
    ControllerCrashWithin {
        done: usize,
    },
    /// The leader does not reach the store any more; it does again.
    LeaderCut,
    LeaderReaches,
    /// SIGSTOP, at once or in the middle of its next step that says something: before that is written, or behind it.
    LeaderStop(Option<Within>),
    LeaderGoOn,
    /// Another takes the lead, as soon as that is free.
    StandBy,
    /// The node's half of the broker is the leader's, or the next one's, and no other controller's; then it is whole.
    Apart {
        node: usize,
        next: bool,
    },
    Together(usize),
    /// A backup of the store is made; it takes the place of the store.
    Backup,
    Restore,
    /// A disk changes one record of the store.
    Spoil(u64),
}

impl Fault {
    /// The machine whose processes it touches.
    fn works_on(self) -> Option<usize> {
        match self {
            Fault::AgentCrash(node)
            | Fault::AgentStart(node)
            | Fault::LoseLedger(node)
            | Fault::AgentCrashWithin { node, .. }
            | Fault::AgentTorn { node, .. }
            | Fault::AgentStop(node)
            | Fault::AgentGoOn { node, .. }
            | Fault::ShimsHang(node)
            | Fault::ShimsGoOn(node)
            | Fault::ShimsDie(node)
            | Fault::Notice(node)
            | Fault::NoticeWithdrawn(node)
            | Fault::Partition(node)
            | Fault::Heal(node) => Some(node),
            _ => None,
        }
    }
}

/// What waits for a node whose connection stands, and carries nothing.
#[derive(Debug)]
pub(crate) struct Jam {
    pub mute: bool,
    pub waiting: Vec<AgentEvent>,
}

/// What waited comes within this time, in any order.
const HEAP_MS: u64 = 4_000;
const HOUR_MS: i64 = 3_600_000;

fn leaving(now: AgentNow) -> AgentEvent {
    let (why, at) = ("drawn".to_owned(), now.boot.plus(Millis(30_000)));
    AgentEvent::Leaving(Some(Leaves { why, at }))
}

/// Draws one mishap of a history: what happens, with what undoes it.
pub(crate) fn mishap(rng: &mut fastrand::Rng, nodes: usize, span: u64) -> Vec<(u64, Fault)> {
    let (at, node) = (rng.u64(1_000..span), rng.usize(0..nodes));
    let back = (at + rng.u64(10..200_000)).min(span);
    let within = rng.u64(at..=back);
    let mut faults = Vec::new();
    let (fault, repair) = match rng.u8(0..19) {
        0 => (Fault::AgentCrash(node), Fault::AgentStart(node)),
        1 => (Fault::PowerCut { node, synced: rng.usize(0..4) }, Fault::AgentStart(node)),
        2 => (Fault::Partition(node), Fault::Heal(node)),
        3 => {
            if rng.bool() {
                // A node that the next controller does not hear, and its predecessor granted last.
                let soon = at + rng.u64(10..20_000);
                faults.push((at, Fault::Partition(node)));
                faults.push((soon, Fault::ControllerStart));
                faults.push((back, Fault::Heal(node)));
            }
            (Fault::ControllerCrash, Fault::ControllerStart)
        }
        4 => (Fault::Notice(node), Fault::NoticeWithdrawn(node)),
        5 => (
            Fault::AgentCrashWithin { node, done: rng.usize(0..3), launching: rng.bool() },
            Fault::AgentStart(node),
        ),
        6 => {
            if rng.bool() {
                // What comes while it is stopped was on its way for a while.
                faults.push((at.saturating_sub(12_000), Fault::Jam { node, mute: false }));
                faults.push((at, Fault::Flow(node)));
            }
            (Fault::AgentStop(node), Fault::AgentGoOn { node, clock_first: rng.bool() })
        }
        7 => {
            // Seen only where no grant comes meanwhile.
            faults.push((at + 1, Fault::Partition(node)));
            faults.push((back, Fault::Heal(node)));
            (Fault::ShimsHang(node), Fault::ShimsGoOn(node))
        }
        8 => (Fault::ShimsDie(node), Fault::AgentStart(node)),
        9 => {
            if rng.bool() {
                faults.push((within, Fault::AgentCrash(node)));
                faults.push((within + 1_000, Fault::AgentStart(node)));
            }
            (Fault::Jam { node, mute: rng.bool() }, Fault::Flow(node))
        }
        10 => (Fault::AgentTorn { node, whole: rng.usize(0..4) }, Fault::AgentStart(node)),
        11 => {
            let soon = (at + rng.u64(100..120_000)).min(span);
            return vec![(at, Fault::Pause(node)), (soon, Fault::Resume(node))];
        }
        12 => {
            let ms = rng.i64(-30 * HOUR_MS..30 * HOUR_MS);
            let node = rng.bool().then_some(node);
            (Fault::WallJump { node, ms }, Fault::WallJump { node, ms: -ms })
        }
        13 => {
            // Grants that come late, to an agent that cannot say that it is there.
            faults.push((at, Fault::Jam { node, mute: false }));
            faults.push((at + rng.u64(15_000..40_000), Fault::Flow(node)));
            (Fault::Mute(node), Fault::Unmute(node))
        }
        15 => {
            // And so late that the agent is another one, which has counted its heartbeats as far.
            let mute = at + rng.u64(20_000..45_000);
            let other = mute + rng.u64(1_000..20_000);
            let flows = (mute + 62_000).max(other + 40_000) + rng.u64(0..14_000);
            return vec![
                (at, Fault::AgentCrash(node)),
                (at + 500, Fault::AgentStart(node)),
                (mute - 12_000, Fault::Jam { node, mute: false }),
                (mute, Fault::Mute(node)),
                (other, Fault::AgentCrash(node)),
                (other + 1_000, Fault::AgentStart(node)),
                (flows, Fault::Flow(node)),
                (flows + 10_000, Fault::Unmute(node)),
            ];
        }
        16 => (Fault::LoseLedger(node), Fault::AgentStart(node)),
        17 => {
            let on = at + 30_000;
            faults.push((at + 1, Fault::AgentCrash(node)));
            faults.push((at + 500, Fault::AgentStart(node)));
            faults.push((on, Fault::CopyOn(node)));
            faults.push((on + 5_000, Fault::CopyRestart(node)));
            faults.push((on + 10_000, Fault::CopyRestart(node)));
            faults.push((at, Fault::Copy(node)));
            faults.push((back + 60_000, Fault::CopyOff(node)));
            (Fault::Unmute(node), Fault::Unmute(node))
        }
        14 => {
            let from = (at + rng.u64(0..30_000)).min(span);
            faults.push((from, Fault::Mute(node)));
            faults.push((back, Fault::Unmute(node)));
            (Fault::Jam { node, mute: false }, Fault::Flow(node))
        }
        _ => (Fault::ControllerCrashWithin { done: rng.usize(0..3) }, Fault::ControllerStart),
    };
    faults.push((at, fault));
    faults.push((back, repair));
    faults.sort_by_key(|(at, _)| *at);
    faults
}

impl World {
    pub(super) fn fault(&mut self, fault: Fault) -> Result<(), String> {
        // What happens to processes happens on a machine that goes.
        if let Some(node) = fault.works_on().filter(|node| self.nodes[*node].is_paused()) {
            self.fault(Fault::Resume(node))?;
        }
        match fault {
            Fault::AgentCrash(n) => self.nodes[n].crash(),
            Fault::PowerCut { node, synced } => self.power_cut(node, synced),
            Fault::LoseLedger(n) => self.nodes[n].lose_ledger(),
            // One that takes itself for the same machine begins by itself what goes on without a controller: nothing but
            // the hardware can tell them apart then. And what it was given itself before it went for ever waits for an
            // operator.
            Fault::Copy(_) if self.works_alone => {}
            Fault::Copy(n) => {
                let copy = self.nodes[n].copy(&self.nodes.len().to_string());
                self.nodes.push(copy);
                let mut link = Link::new(&mut self.rng);
                link.burnt = true;
                self.links.push(link);
            }
            Fault::CopyOn(n) => {
                let record = self.store.get(&format!("node/{}", self.nodes[n].id));
                let record = record.and_then(|bytes| serde_json::from_slice::<serde_json::Value>(bytes).ok());
                let agent = self.nodes[n].agent.as_ref();
                let nonce = agent.and_then(|agent| Some(agent.ledger().nonce.as_ref()?.to_string()));
                let went_on = record.is_some_and(|record| {
                    record["heardUs"] == true && nonce.is_some_and(|nonce| record["nonce"] == nonce)
                });
                for copy in self.copies(n).filter(|_| went_on) {
                    self.links[copy].burnt = false;
                    self.start_agent(copy);
                }
            }
            Fault::CopyRestart(n) | Fault::CopyOff(n) => {
                for copy in self.copies(n) {
                    self.power_cut(copy, 0);
                    self.links[copy].burnt |= matches!(fault, Fault::CopyOff(_));
                    self.start_agent(copy);
                }
            }
            Fault::Burn(n) => {
                self.power_cut(n, 0);
                self.links[n].burnt = true;
            }
            Fault::Deafen(n) => self.links[n].deaf = true,
            Fault::AgentStart(n) => self.start_agent(n),
            Fault::Notice(n) | Fault::NoticeWithdrawn(n) => {
                self.links[n].noticed = matches!(fault, Fault::Notice(_));
                let now = self.agent_now(n);
                let event = if self.links[n].noticed { leaving(now) } else { AgentEvent::Leaving(None) };
                self.tell(n, event);
            }
            Fault::Partition(n) => {
                self.links[n].cut = true;
                self.tell(n, AgentEvent::BusDown);
            }
            Fault::Heal(n) if self.links[n].cut => {
                self.links[n].cut = false;
                self.links[n].session += 1;
                self.tell(n, AgentEvent::BusUp);
            }
            Fault::Heal(_) => {}
            Fault::AgentCrashWithin { node, done, launching } => {
                self.nodes[node].crash_after(done, launching);
            }
            Fault::Mute(n) | Fault::Unmute(n) => self.links[n].mute = matches!(fault, Fault::Mute(_)),
            Fault::AgentTorn { node, whole } => self.nodes[node].crash_writing(whole),
            Fault::AgentStop(n) => self.nodes[n].stop(),
            Fault::AgentGoOn { node, clock_first } => {
                let now = self.agent_now(node);
                let out = self.nodes[node].go_on(now, clock_first);
                self.perform(node, out);
            }
            Fault::ShimsHang(n) | Fault::ShimsGoOn(n) => {
                let now = self.agent_now(n);
                let out = self.nodes[n].hang(now, matches!(fault, Fault::ShimsHang(_)));
                self.perform(n, out);
            }
            Fault::ShimsDie(n) => {
                let out = self.nodes[n].kill_shims();
                self.perform(n, out);
            }
            Fault::Pause(n) => {
                // What they did up to now they have done.
                let now = self.agent_now(n);
                let out = self.nodes[n].advance_all(now);
                self.perform(n, out);
                self.nodes[n].pause(self.now_ms);
            }
            Fault::Resume(n) => {
                self.nodes[n].resume(self.now_ms, self.links[n].answered.as_ref());
                for due in std::mem::take(&mut self.links[n].asleep) {
                    self.at(self.now_ms, due);
                }
            }
            Fault::WallJump { node, ms } => match node {
                Some(n) => self.nodes[n].clocks.ahead += ms,
                None => self.seats.iter_mut().for_each(|seat| seat.clocks.ahead += ms),
            },
            Fault::Jam { node, mute } => {
                self.links[node].jam.get_or_insert_with(|| Jam { mute, waiting: Vec::new() });
            }
            Fault::Flow(node) => {
                let waited = self.links[node].jam.take().map(|jam| jam.waiting).unwrap_or_default();
                for event in waited {
                    let at = self.now_ms + self.links[node].to.u64(0..HEAP_MS);
                    self.at(at, Due::ToNode { node, session: None, event });
                }
            }
            Fault::ControllerCrash => self.end_all(),
            Fault::ControllerCrashWithin { done } => self.controller_dies_after = Some(done),
            Fault::ControllerStart | Fault::StandBy => self.stand_by()?,
            Fault::LeaderCut => self.cut_leader(),
            Fault::LeaderReaches => self.leaders_reach()?,
            Fault::LeaderStop(within) => self.stop_leader(within),
            Fault::LeaderGoOn => self.leaders_go_on()?,
            Fault::Apart { node, next } => {
                self.links[node].side = self.leader.map(|leader| if next { 1 - leader } else { leader });
            }
            Fault::Together(n) => self.links[n].side = None,
            Fault::Backup => self.back_up(),
            Fault::Restore => self.restore()?,
            Fault::Spoil(seed) => self.spoil(seed),
        }
        Ok(())
    }

    /// Nothing of that name is there any more.
    pub(crate) fn is_burnt(&self, n: usize) -> bool {
        let mut named = self.nodes.iter().zip(&self.links).filter(|(node, _)| node.id == self.nodes[n].id);
        named.all(|(_, link)| link.burnt)
    }

    /// The machines that were made from copies of this one's disk, and are not there for good.
    fn copies(&self, node: usize) -> impl Iterator<Item = usize> + use<> {
        let id = &self.nodes[node].id;
        let copies = (node + 1..self.nodes.len()).filter(|other| self.nodes[*other].id == *id);
        copies.collect::<Vec<_>>().into_iter()
    }

    fn power_cut(&mut self, node: usize, synced: usize) {
        self.nodes[node].power_cut(synced);
        self.links[node].asleep.clear();
    }

    fn start_agent(&mut self, n: usize) {
        if self.nodes[n].agent.is_some() || self.links[n].burnt {
            return;
        }
        self.links[n].session += 1;
        let now = self.agent_now(n);
        let out = self.nodes[n].start(now);
        self.perform(n, out);
        if self.links[n].noticed {
            self.tell(n, leaving(now));
        }
        if self.links[n].cut {
            self.tell(n, AgentEvent::BusDown);
        }
    }

    /// The faults are over: all that can be repaired is.
    pub(super) fn calm(&mut self) -> Result<(), String> {
        self.calm = true;
        self.note(|| "the faults are over".into());
        // What was to die in the middle of its next step and has had none lives on.
        self.controller_dies_after = None;
        self.one_leads()?;
        for n in 0..self.nodes.len() {
            self.fault(Fault::CopyOff(n))?;
            self.nodes[n].live_on();
            self.fault(Fault::Resume(n))?;
            self.fault(Fault::Heal(n))?;
            self.fault(Fault::Flow(n))?;
            self.fault(Fault::Unmute(n))?;
            self.fault(Fault::Together(n))?;
            self.fault(Fault::AgentGoOn { node: n, clock_first: true })?;
            self.fault(Fault::ShimsGoOn(n))?;
            if self.nodes[n].clocks.lag > 0 {
                // As the alarm asks for, where the controller has found that the clock stood still.
                self.nodes[n].crash();
            }
            self.start_agent(n);
        }
        Ok(())
    }
}
