//! What befalls the machines of a history.

use berth_agent::core::departure::Leaves;
use berth_agent::core::{Event as AgentEvent, Now as AgentNow};
use berth_controller::core::{Config, Controller, Event as ControllerEvent};
use berth_protocol::ids::{StoreId, Term};
use berth_protocol::units::Millis;

use super::World;

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
}

fn leaving(now: AgentNow) -> AgentEvent {
    let (why, at) = ("drawn".to_owned(), now.boot.plus(Millis(30_000)));
    AgentEvent::Leaving(Some(Leaves { why, at }))
}

impl World {
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
            Fault::ControllerCrash => self.controller = None,
            Fault::ControllerStart if self.controller.is_none() => {
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
                let entries = self.store.clone().into_iter().collect();
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
