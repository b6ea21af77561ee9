//! Who may say and hear what at the embedded broker.

use std::net::SocketAddr;

use berth_protocol::ids::{ClusterName, Namespace, NodeId};
use berth_protocol::tls::{Party, Peer};
use berth_protocol::topic::{JobTopic, NodeTopic, Topic, filter};

use super::CONTROLLER_CLIENT_ID;
use crate::config::Cidr;
use crate::io::front::Guests;

/// Who is on the other end; a user with `--dev` is anybody.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Client {
    Controller,
    Node(NodeId),
    User(Option<Peer>),
}

impl Client {
    /// As it says itself.
    pub fn of(client_id: &str) -> Self {
        if client_id == CONTROLLER_CLIENT_ID {
            return Client::Controller;
        }
        let node = client_id.split_once('.').and_then(|(node, _)| NodeId::parse(node).ok());
        node.map_or(Client::User(None), Client::Node)
    }
}

/// What may be said and heard.
pub(super) struct Rules {
    pub cluster: ClusterName,
    pub network: Option<Cidr>,
    pub password: String,
    /// None with `--dev`.
    pub guests: Option<Guests>,
}

impl Rules {
    /// Who it is that has been let in.
    pub fn client(&self, client_id: &str, from: Option<SocketAddr>) -> Option<Client> {
        let said = Client::of(client_id);
        let Some(guests) = self.guests.as_ref().filter(|_| said != Client::Controller) else {
            return Some(said);
        };
        let (peer, _) = guests.at(from?)?;
        match &peer.party {
            Party::Node(node) => Some(Client::Node(node.clone())),
            Party::User(_) => Some(Client::User(Some(peer))),
            Party::Controller | Party::Broker => None,
        }
    }

    /// Whether a client may connect, and as whom.
    pub fn admit(
        &self,
        client_id: &str,
        from: Option<SocketAddr>,
        password: Option<&[u8]>,
    ) -> Option<Client> {
        let client = self.client(client_id, from)?;
        if client == Client::Controller {
            return (password == Some(self.password.as_bytes())).then_some(client);
        }
        if self.guests.is_some() {
            // By a node's client id nobody else connects, who would end the node's connection by it.
            let fits = match &client {
                Client::Node(_) => Client::of(client_id) == client,
                _ => true,
            };
            return fits.then_some(client);
        }
        let from = from?.ip();
        let near = from.is_loopback() || self.network.as_ref().is_some_and(|network| network.contains(from));
        near.then_some(client)
    }

    pub fn may_publish(&self, client: &Client, topic: &str) -> bool {
        let Some(topic) = Topic::parse(&self.cluster, topic) else { return false };
        match (client, topic) {
            (Client::Controller, _) => true,
            (Client::Node(own), Topic::Node { node, kind }) => {
                use NodeTopic::{Bye, Event, Heartbeat, Hello};
                *own == node && matches!(kind, Hello | Heartbeat | Event | Bye)
            }
            (Client::Node(_), Topic::Logs { .. }) => true,
            // With --dev a user's too, for users' clients have dots in their ids as well.
            (Client::Node(_), _) if self.guests.is_some() => false,
            (_, Topic::Job { kind, .. }) => matches!(kind, JobTopic::Submit | JobTopic::Command),
            (_, Topic::QueryRequest { .. }) => true,
            _ => false,
        }
    }

    pub fn may_subscribe(&self, client: &Client, filter: &str) -> bool {
        let own = match client {
            Client::Controller => return true,
            Client::Node(own) => filter::agent(&self.cluster, own).iter().any(|allowed| allowed == filter),
            Client::User(_) => false,
        };
        match (client, &self.guests) {
            (Client::Node(_), Some(_)) => return own,
            (Client::User(Some(peer)), Some(guests)) => return self.may_hear(guests, peer, filter),
            _ => {}
        }
        let prefix = format!("berth/v1/{}/", self.cluster);
        let below = |branch| filter.strip_prefix(&prefix).is_some_and(|rest| rest.starts_with(branch));
        // Replies are for those who know the client's name: no wildcards.
        let reply = matches!(Topic::parse(&self.cluster, filter), Some(Topic::QueryReply { .. }));
        own || reply || below("jobs/") || below("logs/") || below("state/")
    }
}

impl Rules {
    /// A user: replies to itself, nodes, and in the namespaces that it has a role in what became of jobs. Not what others
    /// ask for; of all namespaces at once admins alone.
    fn may_hear(&self, guests: &Guests, peer: &Peer, filter: &str) -> bool {
        // A wildcard in place of a job, a pod or a node stands for one that has a name.
        let named = filter.replace('+', "any");
        let in_namespace = |namespace: &Namespace| match filter.split('/').nth(4) {
            Some("+") => guests.is_admin(peer),
            name => name == Some(namespace.as_str()) && guests.role(peer, namespace).is_some(),
        };
        match Topic::parse(&self.cluster, &named) {
            Some(Topic::Job { namespace, kind: JobTopic::Answer | JobTopic::Status, .. }) => {
                in_namespace(&namespace)
            }
            Some(Topic::QueryReply { .. }) => named == filter,
            Some(Topic::NodeState { .. }) => true,
            Some(_) => false,
            // A pod's name begins with its job's.
            None => match named.rsplit_once("/any") {
                Some((job, "")) => matches!(
                    Topic::parse(&self.cluster, &format!("{job}/{}-0", job.rsplit('/').next().unwrap_or(job))),
                    Some(Topic::Logs { namespace, .. }) if in_namespace(&namespace)
                ),
                _ => false,
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use super::*;

    fn rules() -> Rules {
        let cluster = ClusterName::parse("lab").unwrap();
        let network = Some(Cidr::parse("10.1.0.0/16").unwrap());
        Rules { cluster, network, password: "secret".to_owned(), guests: None }
    }

    #[test]
    fn who_may_connect() {
        let rules = rules();
        let admit = |id, from: &str, password: Option<&str>| {
            let from = from.parse().ok().map(|ip: IpAddr| SocketAddr::new(ip, 1));
            rules.admit(id, from, password.map(str::as_bytes))
        };
        let node = || Some(Client::Node(NodeId::parse("a1").unwrap()));
        assert_eq!(admit("mosq-xyz", "127.0.0.1", None), Some(Client::User(None)));
        assert_eq!(admit("a1.n0nce", "10.1.2.3", None), node());
        assert_eq!(admit("a1.n0nce", "10.2.0.1", None), None);
        assert_eq!(admit(CONTROLLER_CLIENT_ID, "127.0.0.1", None), None);
        assert_eq!(admit(CONTROLLER_CLIENT_ID, "127.0.0.1", Some("guess")), None);
        assert_eq!(admit(CONTROLLER_CLIENT_ID, "127.0.0.1", Some("secret")), Some(Client::Controller));
    }

    #[test]
    fn who_may_say_and_hear_what() {
        // client, topic below the cluster, may publish, may subscribe
        let table = [
            ("user", "jobs/default/j/submit", true, true),
            ("user", "jobs/default/j/command", true, true),
            ("user", "jobs/default/j/answer", false, true),
            ("user", "jobs/default/j/status", false, true),
            ("user", "jobs/+/+/status", false, true),
            ("user", "query/c1/request", true, false),
            ("user", "query/c1/reply", false, true),
            ("user", "query/+/reply", false, false),
            ("user", "query/#", false, false),
            ("user", "logs/default/j/j-0", false, true),
            ("user", "logs/default/j/+", false, true),
            ("user", "state/nodes/+", false, true),
            ("user", "state/nodes/a1", false, true),
            ("user", "nodes/a1/desired", false, false),
            ("user", "nodes/a1/hello", false, false),
            ("user", "nodes/#", false, false),
            ("user", "#", false, false),
            ("user", "jobs/default/j/nonsense", false, true),
            ("a1.x", "nodes/a1/hello", true, false),
            ("a1.x", "nodes/a1/bye", true, false),
            ("a1.x", "nodes/a1/desired", false, true),
            ("a1.x", "nodes/a1/lease", false, true),
            ("a1.x", "nodes/a2/hello", false, false),
            ("a1.x", "nodes/a2/desired", false, false),
            ("a1.x", "nodes/+/desired", false, false),
            ("a1.x", "logs/default/j/j-0", true, true),
            ("a1.x", "jobs/default/j/submit", true, true),
            ("a1.x", "jobs/default/j/status", false, true),
            (CONTROLLER_CLIENT_ID, "nodes/a1/desired", true, true),
        ];
        let rules = rules();
        for (id, topic, publish, subscribe) in table {
            let (client, topic) = (Client::of(id), format!("berth/v1/lab/{topic}"));
            assert_eq!(rules.may_publish(&client, &topic), publish, "{id} says {topic}");
            assert_eq!(rules.may_subscribe(&client, &topic), subscribe, "{id} hears {topic}");
        }
        assert!(!rules.may_publish(&Client::User(None), "berth/v1/other/jobs/default/j/submit"));
        assert!(!rules.may_subscribe(&Client::User(None), "berth/v1/other/jobs/#"));
        assert!(!rules.may_subscribe(&Client::User(None), "#"));
    }
}
