//! What people ask of a cluster while it is disturbed: checkpoints, moves, nodes drained.

use berth_protocol::ids::{ClientId, JobName, Namespace, NodeId, RequestId};
use berth_protocol::message::query::{Query, QueryRequest};
use berth_protocol::message::user::{Command, JobCommand};
use berth_protocol::topic::{JobTopic, Topic};
use berth_protocol::units::Millis;

use crate::world::{Due, FAULTS_MS, World};

#[derive(Debug, Clone)]
pub(crate) enum Wish {
    Drain(usize),
    Uncordon(usize),
    Checkpoint(usize),
    Migrate { job: usize, node: usize },
}

impl World {
    pub(crate) fn plan_wishes(&mut self) {
        for _ in 0..self.rng.usize(0..12) {
            let (at, node) = (self.rng.u64(1_000..FAULTS_MS), self.rng.usize(0..self.nodes.len()));
            let job = self.rng.usize(0..self.jobs.len());
            match self.rng.u8(0..3) {
                0 => {
                    let back = at + self.rng.u64(10..150_000);
                    self.at(at, Due::Wish(Wish::Drain(node)));
                    self.at(back, Due::Wish(Wish::Uncordon(node)));
                }
                1 => self.at(at, Due::Wish(Wish::Checkpoint(job))),
                _ => self.at(at, Due::Wish(Wish::Migrate { job, node })),
            }
        }
        // Whatever was lost on its way: in the end every node is there for pods.
        for node in 0..self.nodes.len() {
            self.at(FAULTS_MS + 30_000, Due::Wish(Wish::Uncordon(node)));
        }
    }

    /// Sent once: a wish that is lost is not repeated.
    pub(crate) fn wish(&mut self, wish: &Wish) {
        let job = |n: usize| JobName::parse(&self.jobs[n].name).expect("a name");
        let id = |n: usize| self.nodes[n].id.clone();
        let query = |query: Query| {
            let client = ClientId::parse("sim").expect("a name");
            let request = QueryRequest { id: RequestId::parse("sim").expect("a token"), query };
            (Topic::QueryRequest { client }, serde_json::to_vec(&request))
        };
        let command = |n: usize, command: Command, node: Option<NodeId>| {
            let topic = Topic::job(&Namespace::default_namespace(), &job(n), JobTopic::Command);
            let id = RequestId::parse(&format!("wish-{}", self.sequence)).ok();
            (topic, serde_json::to_vec(&JobCommand { id, command, node, checkpoint: None }))
        };
        let (topic, payload) = match wish {
            Wish::Drain(n) => query(Query::Drain { node: id(*n), deadline: Some(Millis(40_000)) }),
            Wish::Uncordon(n) => query(Query::Uncordon { node: id(*n) }),
            Wish::Checkpoint(n) => command(*n, Command::Checkpoint, None),
            Wish::Migrate { job, node } => command(*job, Command::Migrate, Some(id(*node))),
        };
        self.send(topic, payload.expect("plain data"));
    }
}
