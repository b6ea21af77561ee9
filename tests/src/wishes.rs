//! What people ask of a cluster while it is disturbed: checkpoints, moves, nodes drained.

use berth_protocol::ids::{ClientId, JobName, Namespace, NodeId, RequestId};
use berth_protocol::message::query::{Query, QueryRequest};
use berth_protocol::message::user::{Command, JobCommand};
use berth_protocol::topic::{JobTopic, Topic};
use berth_protocol::units::Millis;

use crate::world::World;

#[derive(Debug, Clone, Copy)]
pub(crate) enum Wish {
    Drain(usize),
    Uncordon(usize),
    Checkpoint(usize),
    Migrate {
        job: usize,
        node: usize,
    },
    /// An operator gives the machine up; as powered off, where it is for good.
    Lost(usize),
    /// From the start.
    Restart {
        job: usize,
        id: u32,
    },
}

/// Draws one wish of a history, with what takes it back.
pub(crate) fn draw(rng: &mut fastrand::Rng, nodes: usize, jobs: usize, span: u64) -> Vec<(u64, Wish)> {
    let (at, node, job) = (rng.u64(1_000..span), rng.usize(0..nodes), rng.usize(0..jobs));
    match rng.u8(0..4) {
        0 => vec![(at, Wish::Drain(node)), (at + rng.u64(10..150_000), Wish::Uncordon(node))],
        1 => vec![(at, Wish::Checkpoint(job))],
        2 => vec![(at, Wish::Migrate { job, node })],
        // Whoever is not answered sends it again.
        _ => {
            let (id, again) = (rng.u32(..), at + rng.u64(10..60_000));
            vec![(at, Wish::Restart { job, id }), (again, Wish::Restart { job, id })]
        }
    }
}

impl World {
    /// Sent once: a wish that is lost is not repeated by itself.
    pub(crate) fn wish(&mut self, wish: &Wish) {
        let job = |n: usize| JobName::parse(&format!("job{n}")).expect("a name");
        let id = |n: usize| self.nodes[n].id.clone();
        let query = |query: Query| {
            let client = ClientId::parse("sim").expect("a name");
            let request = QueryRequest { id: RequestId::parse("sim").expect("a token"), query };
            (Topic::QueryRequest { client }, serde_json::to_vec(&request))
        };
        let command = |n: usize, command: Command, node: Option<NodeId>, id: u64| {
            let topic = Topic::job(&Namespace::default_namespace(), &job(n), JobTopic::Command);
            let id = RequestId::parse(&format!("wish-{id}")).ok();
            (topic, serde_json::to_vec(&JobCommand { id, command, node, checkpoint: None }))
        };
        let (topic, payload) = match wish {
            Wish::Drain(n) => query(Query::Drain { node: id(*n), deadline: Some(Millis(40_000)) }),
            Wish::Uncordon(n) => query(Query::Uncordon { node: id(*n) }),
            Wish::Lost(n) => query(Query::NodeLost { node: id(*n), powered_off: self.is_burnt(*n) }),
            Wish::Checkpoint(n) => command(*n, Command::Checkpoint, None, self.sequence),
            Wish::Migrate { job, node } => command(*job, Command::Migrate, Some(id(*node)), self.sequence),
            Wish::Restart { job, id } => command(*job, Command::Restart, None, u64::MAX - u64::from(*id)),
        };
        if let Wish::Restart { job, id } = wish {
            self.oracle.changed(&format!("job{job}"), format!("restart {id}"));
        }
        self.send(topic, payload.expect("plain data"));
    }
}
