//! One fault at a time: whom it can hit just now, and how it is done.

use std::time::{Duration, Instant};

use anyhow::Result;

use super::faults::{Kind, Strike};
use super::ground::Role;
use super::leaks;
use super::run::{Soak, WATCHED};
use super::user::Errand;
use super::wire::{Link, Way};
use crate::bench::process::shims;

/// What has not been saved by then is stopped.
const DRAIN_DEADLINE: &str = "20s";

/// One of them.
fn chosen<T>(mut of: Vec<T>, whom: usize) -> Option<T> {
    (!of.is_empty()).then(|| of.swap_remove(whom / 16 % of.len()))
}

impl Soak {
    /// Whom it has hit; none where there is nobody for it.
    pub(super) fn inject(&mut self, kind: Kind, strike: &Strike) -> Result<Option<String>> {
        let leader = self.ground.leader();
        match kind {
            Kind::KillAgent => {
                let spared = self.is_second_half().then(|| self.ground.agent(WATCHED)).flatten();
                Ok(self.kill(Role::Agent, strike, |host| Some(host) != spared))
            }
            Kind::StopAgent => Ok(chosen(self.awake(Role::Agent), strike.whom).map(|host| {
                self.ground.stop(host, strike.lasts);
                self.name(host)
            })),
            Kind::KillLeader => {
                let spared = self.spared;
                Ok(self.kill(Role::Controller, strike, |host| Some(host) == leader && Some(host) != spared))
            }
            Kind::KillStandby => {
                let spared = self.spared;
                Ok(self.kill(Role::Controller, strike, |host| {
                    leader.is_some() && Some(host) != leader && Some(host) != spared
                }))
            }
            Kind::KillBroker => Ok(self.kill(Role::Broker, strike, |_| true)),
            Kind::KillEtcd => {
                let all = self.awake(Role::Member).len() == self.hosts(Role::Member).len();
                Ok(self.kill(Role::Member, strike, |_| all))
            }
            Kind::CutNode => {
                let (how, link) = match strike.whom % 5 {
                    0 => ("hears nothing", Link { into: Way::CUT, out: Way::FAIR }),
                    1 => ("is not heard", Link { into: Way::FAIR, out: Way::CUT }),
                    _ => ("", Link::both(Way::CUT)),
                };
                Ok(self.spoil(&[Role::Agent], link, strike).map(|node| format!("{node} {how}")))
            }
            Kind::CutController => Ok(self.spoil(&[Role::Controller], Link::both(Way::CUT), strike)),
            Kind::CutBroker => Ok(self.spoil(&[Role::Broker], Link::both(Way::CUT), strike)),
            Kind::WorseLine => {
                let way = Way {
                    delay: Duration::from_millis(20 + (strike.whom % 131) as u64),
                    jitter: Duration::from_millis(20 + (strike.whom % 181) as u64),
                    lost_of_1000: 20 + (strike.whom % 131) as u32,
                };
                let whom =
                    self.spoil(&[Role::Agent, Role::Controller, Role::Broker], Link::both(way), strike);
                Ok(whom.map(|whom| format!("{whom} {way:?}")))
            }
            Kind::KillShim => Ok(chosen(shims(&self.dir), strike.whom).and_then(|pid| {
                let words = leaks::words(pid).join(" ");
                kill(pid).then_some(words)
            })),
            Kind::KillProgram => {
                let forgives = |job: &String| self.work.jobs.get(job).is_some_and(|job| job.forgives());
                let programs = leaks::programs(&self.dir).into_iter().filter(|(_, job)| forgives(job));
                Ok(chosen(programs.collect(), strike.whom).filter(|(pid, _)| kill(*pid)).map(|(_, job)| job))
            }
            Kind::Drain => self.drain(strike),
            Kind::Migrate | Kind::Checkpoint => self.order(kind, strike),
        }
    }

    fn name(&self, host: usize) -> String {
        self.ground.programs[host].name.clone()
    }

    fn awake(&self, role: Role) -> Vec<usize> {
        let mut hosts = self.hosts(role);
        hosts.retain(|host| self.ground.programs[*host].awake().is_some());
        hosts
    }

    fn kill(&mut self, role: Role, strike: &Strike, may: impl Fn(usize) -> bool) -> Option<String> {
        let mut hosts = self.awake(role);
        hosts.retain(|host| may(*host));
        let host = chosen(hosts, strike.whom)?;
        self.ground.kill(host, strike.lasts);
        Some(self.name(host))
    }

    fn spoil(&mut self, roles: &[Role], link: Link, strike: &Strike) -> Option<String> {
        let mut hosts: Vec<usize> = roles.iter().flat_map(|role| self.hosts(*role)).collect();
        hosts.retain(|host| !self.ground.programs[*host].is_cut() && Some(*host) != self.spared);
        let host = chosen(hosts, strike.whom)?;
        self.ground.spoil(host, link, strike.lasts);
        Some(self.name(host))
    }

    fn drain(&mut self, strike: &Strike) -> Result<Option<String>> {
        let nodes: Vec<String> = self.ground.nodes().map(|(node, _)| node.to_owned()).collect();
        let Some(node) = chosen(nodes, strike.whom).filter(|_| self.drained.is_none()) else {
            return Ok(None);
        };
        let command = self.ground.berth(&["drain", &node, "--no-wait", "--deadline", DRAIN_DEADLINE])?;
        self.user.send(Errand::Order(format!("drain {node}")), command, None);
        self.drained = Some((node.clone(), Instant::now() + strike.lasts));
        Ok(Some(node))
    }

    /// Of a job that runs.
    fn order(&mut self, kind: Kind, strike: &Strike) -> Result<Option<String>> {
        let running = self.work.running().map(|(job, node)| (job.name.clone(), node.to_owned())).collect();
        let Some((job, node)) = chosen(running, strike.whom) else { return Ok(None) };
        let others = self.ground.nodes().map(|(other, _)| other.to_owned()).filter(|other| *other != node);
        let Some(to) = chosen(others.collect(), strike.whom / 256) else { return Ok(None) };
        let words = match kind {
            Kind::Migrate => vec!["migrate", &job, "--to", &to],
            _ => vec!["checkpoint", &job, "--no-wait"],
        };
        let what = words.join(" ");
        self.user.send(Errand::Order(what.clone()), self.ground.berth(&words)?, None);
        Ok(Some(what))
    }
}

/// True where there was such a process.
fn kill(pid: u32) -> bool {
    // SAFETY: no pointers.
    unsafe { libc::kill(pid as i32, libc::SIGKILL) == 0 }
}
