//! Real members of RabbitMQ that speak MQTT: a cluster of them on loopback, gone with its handle. What they call
//! themselves they tell a name server of their own, so that those of the machine, and of other tests, never meet them.

use std::io::Write as _;
use std::net::TcpStream;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::ports::free_ports;

/// Debian's own in PATH gives root away for a user that it made.
const SERVER: &str = "/usr/lib/rabbitmq/bin/rabbitmq-server";

/// In which a member is there.
const PATIENCE: Duration = Duration::from_secs(90);

/// A cluster; dropping it ends its members.
pub struct RabbitMq {
    /// Where each takes clients, on loopback.
    pub members: Vec<u16>,
    commands: Vec<Command>,
    children: Vec<Option<Child>>,
    names: Child,
}

impl RabbitMq {
    /// Of `count` members, whose data and logs are in `dir`. One after the other: those that look for the others at one time
    /// may each wait for one of them for ever.
    pub fn start(count: usize, dir: &Path) -> Self {
        let ports = free_ports(2 * count + 1);
        let (members, others) = ports.split_at(count);
        let (names, peers) = others.split_first().expect("one more than members");
        secret(&dir.join(".erlang.cookie"));
        let mut server = Command::new("epmd");
        server.args(["-address", "127.0.0.1", "-port", &names.to_string()]);
        let names_child = server.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn();
        let commands = (0..count).map(|n| command((n, count), members[n], peers[n], *names, dir));
        let mut cluster = Self {
            members: members.to_vec(),
            commands: commands.collect(),
            children: (0..count).map(|_| None).collect(),
            names: names_child.expect("epmd starts: apt install rabbitmq-server"),
        };
        // Whoever does not find it ends.
        wait_for(*names);
        for member in 0..count {
            cluster.revive(member);
            cluster.wait_for(member);
        }
        cluster
    }

    /// Starts a member that is dead.
    pub fn revive(&mut self, member: usize) {
        let child = self.commands[member].spawn();
        self.children[member] = Some(child.expect("RabbitMQ starts: apt install rabbitmq-server"));
    }

    pub fn kill(&mut self, member: usize) {
        if let Some(mut child) = self.children[member].take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    /// Waits until it takes clients, as it does once it belongs to the cluster.
    pub fn wait_for(&self, member: usize) {
        wait_for(self.members[member]);
    }
}

fn wait_for(port: u16) {
    let end = Instant::now() + PATIENCE;
    while TcpStream::connect(("127.0.0.1", port)).is_err() {
        assert!(Instant::now() < end, "nothing listens on port {port} within {} s", PATIENCE.as_secs());
        std::thread::park_timeout(Duration::from_millis(20));
    }
}

impl Drop for RabbitMq {
    fn drop(&mut self) {
        (0..self.children.len()).for_each(|member| self.kill(member));
        let _ = self.names.kill();
        let _ = self.names.wait();
    }
}

/// By which members know each other: readable by nobody else, or they refuse it.
fn secret(path: &Path) {
    let file = std::fs::File::options().create(true).write(true).truncate(true).mode(0o400).open(path);
    file.and_then(|mut file| file.write_all(b"of-this-test-alone")).expect("the secret is written");
}

/// Of so many members one.
fn command((member, count): (usize, usize), mqtt: u16, peer: u16, names: u16, dir: &Path) -> Command {
    let home = dir.join(format!("rabbitmq{member}"));
    std::fs::create_dir_all(&home).expect("a directory");
    let (config, plugins) = (home.join("rabbitmq.conf"), home.join("plugins"));
    // The first finds nobody, and need not look for long.
    let text = format!(
        "listeners.tcp = none\n\
         mqtt.listeners.tcp.1 = 127.0.0.1:{mqtt}\n\
         mqtt.allow_anonymous = true\n\
         mqtt.retained_message_store = rabbit_mqtt_retained_msg_store_noop\n\
         cluster_partition_handling = pause_minority\n\
         cluster_formation.peer_discovery_backend = classic_config\n\
         cluster_formation.discovery_retry_limit = 2\n\
         cluster_formation.discovery_retry_interval = 100\n\
         log.console = true\n\
         log.file = false\n"
    );
    let peer_line = |n| format!("cluster_formation.classic_config.nodes.{} = m{n}@localhost\n", n + 1);
    let text = text + &(0..count).map(peer_line).collect::<String>();
    std::fs::write(&config, text).expect("the configuration is written");
    std::fs::write(&plugins, "[rabbitmq_mqtt].\n").expect("the plugins are written");
    let log =
        std::fs::File::options().create(true).append(true).open(dir.join(format!("rabbitmq{member}.log")));
    let log = log.expect("the log opens");
    let mut command = Command::new(SERVER);
    command
        .env("HOME", dir)
        // So that it becomes the server, and does not stay ahead of it.
        .env("RUNNING_UNDER_SYSTEMD", "1")
        .env("ERL_EPMD_ADDRESS", "127.0.0.1")
        .env("ERL_EPMD_PORT", names.to_string())
        .env("RABBITMQ_NODENAME", format!("m{member}@localhost"))
        .env("RABBITMQ_DIST_PORT", peer.to_string())
        .env("RABBITMQ_CONF_ENV_FILE", "/dev/null")
        .env("RABBITMQ_CONFIG_FILE", &config)
        .env("RABBITMQ_ENABLED_PLUGINS_FILE", &plugins)
        .env("RABBITMQ_MNESIA_BASE", home.join("data"))
        .env("RABBITMQ_LOG_BASE", home.join("log"))
        .env("RABBITMQ_GENERATED_CONFIG_DIR", home.join("generated"))
        .env("RABBITMQ_PID_FILE", home.join("pid"))
        .env(
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS",
            // Idle, it leaves the processors to others.
            "-kernel inet_dist_use_interface {127,0,0,1} -start_epmd false +sbwt none +sbwtdcpu none +sbwtdio none",
        )
        .stdin(Stdio::null())
        .stdout(log.try_clone().expect("a second handle"))
        .stderr(log);
    command
}
