//! Topics: an enum that goes to a string and back, so that no other module joins or splits one.

use std::fmt;

use crate::ids::{ClientId, ClusterName, JobName, Namespace, NodeId, PodName};

/// The first two levels of every topic.
const PREFIX: &str = "berth/v1/";

/// A topic of one cluster, everything behind `berth/v1/{cluster}/`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Topic {
    Job {
        namespace: Namespace,
        job: JobName,
        kind: JobTopic,
    },
    Logs {
        namespace: Namespace,
        pod: PodName,
    },
    QueryRequest {
        client: ClientId,
    },
    QueryReply {
        client: ClientId,
    },
    Node {
        node: NodeId,
        kind: NodeTopic,
    },
    /// A node's status for whoever watches; retained.
    NodeState {
        node: NodeId,
    },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum JobTopic {
    Submit,
    Command,
    Answer,
    /// Retained.
    Status,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum NodeTopic {
    Hello,
    /// QoS 0.
    Heartbeat,
    Event,
    Bye,
    Desired,
    Spec,
    Request,
    /// QoS 0.
    Lease,
}

const JOB_TOPICS: [(JobTopic, &str); 4] = [
    (JobTopic::Submit, "submit"),
    (JobTopic::Command, "command"),
    (JobTopic::Answer, "answer"),
    (JobTopic::Status, "status"),
];

const NODE_TOPICS: [(NodeTopic, &str); 8] = [
    (NodeTopic::Hello, "hello"),
    (NodeTopic::Heartbeat, "heartbeat"),
    (NodeTopic::Event, "event"),
    (NodeTopic::Bye, "bye"),
    (NodeTopic::Desired, "desired"),
    (NodeTopic::Spec, "spec"),
    (NodeTopic::Request, "request"),
    (NodeTopic::Lease, "lease"),
];

fn word<T: Copy + PartialEq>(table: &[(T, &'static str)], kind: T) -> &'static str {
    table.iter().find(|(k, _)| *k == kind).map_or("", |(_, word)| word)
}

fn kind<T: Copy>(table: &[(T, &'static str)], text: &str) -> Option<T> {
    table.iter().find(|(_, word)| *word == text).map(|(kind, _)| *kind)
}

impl JobTopic {
    pub fn as_str(self) -> &'static str {
        word(&JOB_TOPICS, self)
    }
}

impl NodeTopic {
    pub fn as_str(self) -> &'static str {
        word(&NODE_TOPICS, self)
    }

    /// At most once, where a lost message is replaced by the next.
    pub fn is_qos0(self) -> bool {
        matches!(self, NodeTopic::Heartbeat | NodeTopic::Lease)
    }
}

impl Topic {
    pub fn job(namespace: &Namespace, job: &JobName, kind: JobTopic) -> Self {
        Topic::Job { namespace: namespace.clone(), job: job.clone(), kind }
    }

    pub fn node(node: &NodeId, kind: NodeTopic) -> Self {
        Topic::Node { node: node.clone(), kind }
    }

    /// The whole topic, for a broker.
    pub fn render(&self, cluster: &ClusterName) -> String {
        format!("{PREFIX}{cluster}/{self}")
    }

    /// Reads a broker's topic; `None` for another cluster's, and for what berth does not name.
    pub fn parse(cluster: &ClusterName, text: &str) -> Option<Self> {
        let rest = text.strip_prefix(PREFIX)?.strip_prefix(cluster.as_str())?.strip_prefix('/')?;
        let levels: Vec<&str> = rest.splitn(6, '/').collect();
        Some(match levels[..] {
            ["jobs", namespace, job, word] => Topic::Job {
                namespace: Namespace::parse(namespace).ok()?,
                job: JobName::parse(job).ok()?,
                kind: kind(&JOB_TOPICS, word)?,
            },
            ["logs", namespace, job, pod] => {
                let pod = PodName::parse(pod).ok().filter(|pod| pod.job.as_str() == job)?;
                Topic::Logs { namespace: Namespace::parse(namespace).ok()?, pod }
            }
            ["query", client, "request"] => Topic::QueryRequest { client: ClientId::parse(client).ok()? },
            ["query", client, "reply"] => Topic::QueryReply { client: ClientId::parse(client).ok()? },
            ["nodes", node, word] => {
                Topic::Node { node: NodeId::parse(node).ok()?, kind: kind(&NODE_TOPICS, word)? }
            }
            ["state", "nodes", node] => Topic::NodeState { node: NodeId::parse(node).ok()? },
            _ => return None,
        })
    }
}

impl fmt::Display for Topic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Topic::Job { namespace, job, kind } => write!(f, "jobs/{namespace}/{job}/{}", kind.as_str()),
            Topic::Logs { namespace, pod } => write!(f, "logs/{namespace}/{}/{pod}", pod.job),
            Topic::QueryRequest { client } => write!(f, "query/{client}/request"),
            Topic::QueryReply { client } => write!(f, "query/{client}/reply"),
            Topic::Node { node, kind } => write!(f, "nodes/{node}/{}", kind.as_str()),
            Topic::NodeState { node } => write!(f, "state/nodes/{node}"),
        }
    }
}

/// What the programs subscribe to.
pub mod filter {
    use super::{JobTopic, NODE_TOPICS, NodeTopic, PREFIX, Topic};
    use crate::ids::{ClientId, ClusterName, JobName, Namespace, NodeId};

    /// The controller's: submits, commands, queries, and what agents say.
    pub fn controller(cluster: &ClusterName) -> Vec<String> {
        ["jobs/+/+/submit", "jobs/+/+/command", "query/+/request"]
            .into_iter()
            .map(str::to_owned)
            .chain(NODE_TOPICS[..4].iter().map(|(_, word)| format!("nodes/+/{word}")))
            .map(|filter| format!("{PREFIX}{cluster}/{filter}"))
            .collect()
    }

    /// An agent's own four: desired, spec, request, lease.
    pub fn agent(cluster: &ClusterName, node: &NodeId) -> Vec<String> {
        [NodeTopic::Desired, NodeTopic::Spec, NodeTopic::Request, NodeTopic::Lease]
            .into_iter()
            .map(|kind| Topic::node(node, kind).render(cluster))
            .collect()
    }

    /// Answers to a client's queries.
    pub fn replies(cluster: &ClusterName, client: &ClientId) -> String {
        Topic::QueryReply { client: client.clone() }.render(cluster)
    }

    /// One job's answers, status and logs.
    pub fn job(cluster: &ClusterName, namespace: &Namespace, job: &JobName) -> [String; 3] {
        [
            Topic::job(namespace, job, JobTopic::Answer).render(cluster),
            Topic::job(namespace, job, JobTopic::Status).render(cluster),
            format!("{PREFIX}{cluster}/logs/{namespace}/{job}/+"),
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::limits::TOPIC_SLASHES_MAX;
    use proptest::prelude::*;

    fn cluster() -> ClusterName {
        ClusterName::parse("lab").unwrap()
    }

    #[test]
    fn the_contract() {
        for text in [
            "jobs/default/digits/submit",
            "jobs/default/digits/command",
            "jobs/default/digits/answer",
            "jobs/default/digits/status",
            "logs/default/digits/digits-3",
            "query/c1/request",
            "query/c1/reply",
            "nodes/n1/hello",
            "nodes/n1/heartbeat",
            "nodes/n1/event",
            "nodes/n1/bye",
            "nodes/n1/desired",
            "nodes/n1/spec",
            "nodes/n1/request",
            "nodes/n1/lease",
            "state/nodes/n1",
        ] {
            let whole = format!("berth/v1/lab/{text}");
            let topic = Topic::parse(&cluster(), &whole).unwrap_or_else(|| panic!("{text}"));
            assert_eq!(topic.render(&cluster()), whole);
            assert!(whole.matches('/').count() <= TOPIC_SLASHES_MAX, "{whole}");
        }
    }

    #[test]
    fn what_is_not_ours_is_none() {
        for text in [
            "",
            "berth/v1/lab/",
            "berth/v1/other/nodes/n1/hello",
            "berth/v2/lab/nodes/n1/hello",
            "berth/v1/lab/nodes/n1/hello/more",
            "berth/v1/lab/nodes/N1/hello",
            "berth/v1/lab/jobs/a/b/c/submit",
            "berth/v1/lab/logs/default/digits/other-3",
            "berth/v1/labor/nodes/n1/hello",
        ] {
            assert_eq!(Topic::parse(&cluster(), text), None, "{text}");
        }
    }

    proptest! {
        #[test]
        fn whatever_parses_prints_the_same(text in "(berth/v1/lab/)?[a-z/+#-]{0,60}") {
            if let Some(topic) = Topic::parse(&cluster(), &text) {
                prop_assert_eq!(topic.render(&cluster()), text);
            }
        }
    }
}
