//! The agent's loop: event → core → records on disk → actions. Everything else in `io` only feeds or serves it.

mod found;
mod launching;
mod messages;
mod preparing;
mod stores;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::future::Future;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use berth_protocol::ids::{IdError, LedgerId, SessionNonce};
use berth_protocol::job::PodTemplate;
use berth_protocol::message::node::{DepotAccess, HeldPod, NodeRequest};
use berth_protocol::sign::Signer;
use berth_protocol::topic::{NodeTopic, Topic};
use berth_protocol::units::Millis;
use tokio::sync::mpsc;

use crate::config::Config;
use crate::core::departure::Leaves;
use crate::core::ledger::PodKey;
use crate::core::{Action, Agent, Event, Identity, Now};
use crate::io::bus::Bus;
use crate::io::identity::{self, Authority, BadCertificate, IdentityError, Shown};
use crate::io::journal::{Journal, JournalError};
use crate::io::logs::Followers;
use crate::io::network::{self, Bridge};
use crate::io::prepare::Preparer;
use crate::io::probe::Probe;
use crate::io::probe::criu::Criu;
use crate::io::shims::Shims;
use crate::io::{checkpoint, clock, departure, join, notify};
use crate::shim;
use crate::shim::cgroup::{Cgroup, CgroupError};
use crate::task::{Order, Report};

/// Events taken together before the disk is synced for all of them.
const BATCH: usize = 64;
/// The longest sleep: timers run on CLOCK_BOOTTIME, which goes on through a suspend, and the sleep does not.
const NAP_MAX: Duration = Duration::from_secs(5);
/// While followers wait for room in the broker's queue.
const CATCH_UP: Duration = Duration::from_millis(10);
const COLLECT_FIRST: Duration = Duration::from_secs(60);
const COLLECT_EVERY: Duration = Duration::from_secs(600);
/// Quiet for this long, an agent makes itself small.
const TRIM_AFTER: Duration = Duration::from_secs(4);
/// The agent's start waits so long for CRIU's check; beyond it, pods that start meanwhile cannot be saved by it.
const CRIU_WAIT: Duration = Duration::from_secs(3);
/// Where pods may go on by themselves, and from a checkpoint: no less than a lease.
const CRIU_WAIT_BEGUN: Duration = Duration::from_secs(20);
/// To systemd, while pods leave a machine that shuts down: so much more, from each time it is said.
const STAYS: &str = "EXTEND_TIMEOUT_USEC=15000000";
/// Messages from the broker that may wait.
const BUS_QUEUE: usize = 256;

#[derive(Debug, thiserror::Error)]
pub enum RunError {
    #[error(transparent)]
    Journal(#[from] JournalError),
    #[error(transparent)]
    Identity(#[from] IdentityError),
    #[error(transparent)]
    Certificate(#[from] BadCertificate),
    #[error("cannot draw random numbers")]
    Random(#[source] std::io::Error),
    #[error("cannot tell this boot or machine from others")]
    Machine(#[from] IdError),
    #[error("cannot give chunks away at --listen-chunks {address}")]
    Chunks { address: SocketAddr, source: std::io::Error },
    #[error("cannot set up images")]
    Images(#[source] std::io::Error),
}

struct Agency {
    config: Config,
    core: Agent,
    journal: Journal,
    bus: Bus,
    shims: Shims,
    probe: Probe,
    preparer: Arc<Preparer>,
    preparing: preparing::Tasks,
    staging: preparing::Tasks,
    bridge: Option<Bridge>,
    depot: Option<DepotAccess>,
    criu: Option<Criu>,
    followers: Followers,
    log_turns: stores::LogTurns,
    events: mpsc::UnboundedSender<Event>,
    authority: Authority,
    /// Messages refused since the start, by kind; each kind is logged once.
    refused: BTreeMap<&'static str, u64>,
}

/// What the loop takes in: things to decide about, and requests that change nothing.
enum Input {
    Event(Event),
    Logs(NodeRequest),
    Criu(Option<Criu>),
}

impl Input {
    /// More than the pulse of an idle node.
    fn is_work(&self) -> bool {
        !matches!(self, Input::Event(Event::Tick | Event::Lease(_)))
    }
}

/// Runs an agent until `shutdown`. Pods go on without it.
pub async fn run(config: Config, shutdown: impl Future<Output = ()>) -> Result<(), RunError> {
    let (journal, ledger, damaged) = Journal::open(&config.data_dir)?;
    if damaged > 0 {
        tracing::error!("{damaged} damaged records in the ledger were passed over: is the disk failing?");
    }
    let key = identity::key(&config.data_dir)?;
    let authority = Authority::open(&config.data_dir, &config.cluster)?;
    let shown =
        config.membership.as_ref().map(|membership| Shown::new(membership, &key)).transpose()?.map(Arc::new);
    let bridge = Bridge::open(Path::new(network::SLOTS_DIR), &config.data_dir, &config.reach)
        .inspect_err(|error| tracing::warn!("no network for pods of their own: {error}"))
        .ok();
    let mut probe = Probe::new(found::probe_config(&config, bridge.is_some())).await;
    let random = || clock::random_token().map_err(RunError::Random);
    let nonce = SessionNonce::parse(&random()?[..16])?;
    let preparer = Arc::new(Preparer::open(&config, shown.clone()).map_err(RunError::Images)?);
    let chunks = match config.listen_chunks {
        Some(address) => Some(
            preparer
                .serve_chunks(address, shown.clone())
                .await
                .map_err(|source| RunError::Chunks { address, source })?,
        ),
        None => None,
    };
    let found = found::found_alive(&config);
    let identity = Identity {
        hardware: clock::hardware_id()?,
        boot: clock::boot_id()?,
        nonce: nonce.clone(),
        ledger: LedgerId::parse(&random()?)?,
        damaged: damaged > 0,
        chunks,
        found,
        granted: config.policy.granted.clone(),
    };
    let (events, mut inbox) = mpsc::unbounded_channel();
    let (bus_events, mut bus_inbox) = mpsc::channel(BUS_QUEUE);
    let shims = Shims::new(config.data_dir.join("pods"), events.clone());
    shims.sweep(|key| ledger.pods.contains_key(key));
    probe.sample().await;
    // A pod that is started knows by which CRIU it is saved: worth a moment, on a loaded board not more.
    let mut find_criu = tokio::spawn(found::find_criu(config.criu.clone()));
    let wait = if ledger.pods.values().any(|entry| entry.begun) { CRIU_WAIT_BEGUN } else { CRIU_WAIT };
    let found = tokio::time::timeout(wait, &mut find_criu).await;
    let mut searching = found.is_err();
    let criu = found.ok().and_then(Result::ok).flatten();
    probe.set_criu(criu.as_ref().map(|criu| criu.version.clone()));
    let (mut inventory, held) = (probe.inventory().clone(), preparer.held());
    inventory.images = held.borrow().clone();
    tokio::spawn(stores::tell_images(held, events.clone()));
    let (core, first) = Agent::start(ledger, identity, inventory, clock::now());
    match (&config.membership, &shown) {
        (Some(membership), Some(shown)) => {
            let (data_dir, membership) = (config.data_dir.clone(), membership.clone());
            tokio::spawn(join::renew(data_dir, membership, shown.clone()));
        }
        _ => tracing::warn!(
            "--dev: whoever reaches the broker runs programs on this machine; for one person's machine and for tests only"
        ),
    }
    let signer = Signer::new(config.cluster.clone(), key);
    let bus = Bus::connect(&config.broker, &config.node, &nonce, signer, shown, bus_events);
    tracing::info!(
        "node {} of cluster {}: {} cores, {} of memory, broker {}",
        config.node,
        config.cluster,
        probe.inventory().cpu,
        probe.inventory().memory,
        config.broker
    );
    let mut agency = Agency {
        core,
        journal,
        bus,
        shims,
        probe,
        preparer,
        preparing: preparing::Tasks::default(),
        staging: preparing::Tasks::default(),
        bridge,
        depot: None,
        criu,
        followers: Followers::default(),
        log_turns: stores::LogTurns::default(),
        events,
        authority,
        refused: BTreeMap::new(),
        config,
    };
    let mut collect_at = tokio::time::Instant::now() + COLLECT_FIRST;
    let mut trim_at = Some(tokio::time::Instant::now() + TRIM_AFTER);
    agency.journal.append(&first.records)?;
    if damaged > 0 {
        // What could not be read is not to be found again at the next start.
        agency.journal.rewrite(agency.core.ledger())?;
    }
    agency.perform(first.actions).await;
    notify::notify("READY=1");
    for source in agency.config.notices.clone() {
        tokio::spawn(departure::watch(source, agency.config.notice_within, agency.events.clone()));
    }
    let watchdog = notify::watchdog();
    let mut ending = None;
    tokio::pin!(shutdown);
    loop {
        let nap = Duration::from_millis(agency.core.next_wake().since(clock::now().boot).0);
        let behind = agency.bus.is_up() && agency.followers.behind();
        let nap_max = if behind { CATCH_UP } else { NAP_MAX };
        let nap = nap.min(nap_max).min(watchdog.unwrap_or(NAP_MAX));
        let mut batch = Vec::new();
        tokio::select! {
            biased;
            () = &mut shutdown, if ending.is_none() => match agency.last_stay().await {
                None => break,
                Some(stay) => {
                    ending = Some(stay.at);
                    batch.push(Input::Event(Event::Leaving(Some(stay))));
                }
            },
            // Leases first: what pods report, however much, must not make them wait.
            Some(event) = bus_inbox.recv() => batch.extend(agency.read(event)),
            Some(event) = inbox.recv() => batch.push(Input::Event(event)),
            criu = &mut find_criu, if searching => {
                searching = false;
                batch.push(Input::Criu(criu.ok().flatten()));
            }
            () = tokio::time::sleep(nap) => batch.push(Input::Event(Event::Tick)),
        }
        while batch.len() < BATCH {
            if let Ok(event) = bus_inbox.try_recv() {
                batch.extend(agency.read(event));
            } else if let Ok(event) = inbox.try_recv() {
                batch.push(Input::Event(event));
            } else {
                break;
            }
        }
        // Under a steady stream of events the sleep above would never end: heartbeats go out all the same.
        if agency.core.next_wake() <= clock::now().boot {
            batch.push(Input::Event(Event::Tick));
        }
        if batch.iter().any(Input::is_work) {
            trim_at = Some(tokio::time::Instant::now() + TRIM_AFTER);
        }
        agency.handle(batch).await?;
        for key in agency.followers.catch_up(&agency.bus) {
            agency.shims.order(&key, Order::Follow { follow: false });
        }
        // Once small, it stays small: a heartbeat touches more of the program than it needs.
        if trim_at.is_none_or(|at| at <= tokio::time::Instant::now()) {
            trim_at = None;
            give_memory_back();
        }
        if collect_at <= tokio::time::Instant::now() {
            collect_at = tokio::time::Instant::now() + COLLECT_EVERY;
            agency.collect();
        }
        if watchdog.is_some() {
            notify::notify("WATCHDOG=1");
        }
        if let Some(at) = ending {
            if agency.core.is_empty() || at <= clock::now().boot {
                break;
            }
            notify::notify(STAYS);
        }
    }
    notify::notify("STOPPING=1");
    tracing::info!("ending; pods go on under their supervisors");
    if let Some(bridge) = agency.bridge.take() {
        bridge.close();
    }
    // Where no pod is left, nor anything that the ledger does not know, nothing of this agent stays in the kernel.
    if agency.core.is_empty()
        && agency.scan().is_ok_and(|alive| alive.is_empty())
        && let Ok(groups) = Cgroup::new(&agency.cgroup_parent())
    {
        let _ = groups.remove();
    }
    agency.bus.disconnect();
    // The farewell is on its way when the connection's task has run once more.
    tokio::time::sleep(Duration::from_millis(50)).await;
    Ok(())
}

/// An agent is idle nearly always: what only its busy moments needed is not kept.
fn give_memory_back() {
    shim::sys::trim_memory();
    shim::sys::release_code();
}

impl Agency {
    /// Decides about a batch of events and does what was decided, the records of all of it durable first.
    async fn handle(&mut self, batch: Vec<Input>) -> Result<(), RunError> {
        let now: Now = clock::now();
        let (mut records, mut actions) = (Vec::new(), Vec::new());
        let mut grown = BTreeSet::new();
        let mut inputs = VecDeque::from(batch);
        while let Some(input) = inputs.pop_front() {
            let event = match input {
                Input::Event(event) => event,
                Input::Logs(request) => {
                    self.follow(request);
                    continue;
                }
                Input::Criu(criu) => {
                    self.probe.set_criu(criu.as_ref().map(|criu| criu.version.clone()));
                    self.criu = criu;
                    Event::Inventory(Box::new(self.probe.inventory().clone()))
                }
            };
            if let Event::Shim { key, report: Report::Log { .. } | Report::Exited { .. } } = &event {
                grown.insert(key.clone());
            }
            let step = self.core.step(now, event);
            records.extend(step.records);
            for action in step.actions {
                match action {
                    // The ledger names nothing of what this makes, so it need not wait for the disk; and what is ready
                    // at once, as host images are, shares one sync with the orders.
                    Action::Prepare { key, template, from, kept } => {
                        let ready = self.prepare(key, template, from, kept);
                        inputs.extend(ready.map(Input::Event));
                    }
                    // A preparation may be of this same step.
                    Action::Depot(access) => self.depot = Some(access),
                    action => actions.push(action),
                }
            }
        }
        grown.iter().for_each(|key| self.followers.grown(&self.bus, key));
        // The probes behind a heartbeat take a while, and nothing else need wait for them.
        actions.sort_by_key(|action| matches!(action, Action::Heartbeat(_)));
        self.journal.append(&records)?;
        self.journal.compact(self.core.ledger())?;
        self.perform(actions).await;
        Ok(())
    }

    /// Frees disk that no pod of the ledger needs.
    fn collect(&self) {
        let templates: Vec<PodTemplate> = self.core.specs().cloned().collect();
        let preparer = self.preparer.clone();
        tokio::spawn(async move { preparer.collect(templates.iter()).await });
        let pods = self.core.ledger().pods.keys().map(|key| key.pod.clone()).collect();
        let cache = self.checkpoints_kept();
        tokio::task::spawn_blocking(move || checkpoint::collect(&cache, &pods));
    }

    async fn perform(&mut self, actions: Vec<Action>) {
        for action in actions {
            match action {
                Action::Hello(mut hello) => match self.scan() {
                    Ok(alive) => {
                        let is_alive = |pod: &HeldPod| {
                            alive.iter().any(|held| held.pod == pod.pod && held.epoch == pod.epoch)
                        };
                        hello.pods.retain(|pod| !is_alive(pod));
                        hello.pods.extend(alive);
                        self.bus.publish(&self.topic(NodeTopic::Hello), &*hello);
                    }
                    // A pod that this hello left out would count as gone, and be placed anew while it runs.
                    Err(error) => tracing::error!(
                        "cannot tell which pods are alive, so the controller is not told either; trying again: \
                         {error}"
                    ),
                },
                Action::Heartbeat(mut heartbeat) => {
                    let sample = self.probe.sample().await;
                    heartbeat.usage = sample.usage;
                    if sample.changed {
                        let _ = self.events.send(Event::Inventory(Box::new(self.probe.inventory().clone())));
                    }
                    self.bus.publish(&self.topic(NodeTopic::Heartbeat), &*heartbeat);
                }
                Action::Events(events) => drop(self.bus.publish(&self.topic(NodeTopic::Event), &events)),
                Action::Prepare { key, template, from, kept } => {
                    let ready = self.prepare(key, template, from, kept);
                    ready.into_iter().for_each(|event| drop(self.events.send(event)));
                }
                Action::CancelPrepare { key } => self.preparing.cancel(&key),
                Action::Stage { key, template, from } => self.stage(key, template, from),
                Action::CancelStage { key } => self.staging.cancel(&key),
                Action::Launch(launch) => self.launch(*launch),
                Action::Order { key, order } => self.shims.order(&key, order),
                Action::Adopt { key, run } => self.shims.adopt(&key, run),
                Action::Kill { key, run } => self.shims.kill(&key, run),
                Action::StoreLog { key } => self.store_log(key),
                Action::StoreOutputs { key } => self.store_outputs(key),
                Action::StoreCheckpoint { key, run, spec, saved } => {
                    self.store_checkpoint(key, run, spec, *saved);
                }
                Action::KeepCheckpoint { key, level, id } => self.keep_checkpoint(&key, level, &id),
                Action::Drop { key } => {
                    self.preparer.secrets.forget(&key);
                    self.shims.drop_pod(&key);
                }
                Action::Depot(access) => self.depot = Some(access),
                Action::Warn(text) => tracing::warn!("{text}"),
            }
        }
    }

    /// The agent was told to end. Pods go on without it, unless the machine goes with it: then it stays until they have
    /// left, or until then.
    async fn last_stay(&self) -> Option<Leaves> {
        let grace = self.config.shutdown_grace;
        if grace == Millis::ZERO || self.core.is_empty() || !departure::machine_stops().await {
            return None;
        }
        Some(Leaves { why: "it shuts down".to_owned(), at: clock::now().boot.plus(grace) })
    }

    fn topic(&self, kind: NodeTopic) -> Topic {
        Topic::node(&self.config.node, kind)
    }

    /// Every pod that the machine holds, whatever the ledger says; its run is the ledger's, where that knows one.
    fn scan(&self) -> Result<Vec<HeldPod>, CgroupError> {
        let found = shim::scan(&self.cgroup_parent())?;
        let now = clock::now();
        let held = |(pod, epoch)| {
            let key = PodKey::new(&pod, epoch);
            let run = self.core.ledger().pods.get(&key).map(|entry| entry.run).unwrap_or_default();
            HeldPod { pod, epoch, run, alive: true, granted: self.core.is_granted(now, &key) }
        };
        Ok(found.into_iter().map(held).collect())
    }

    fn cgroup_parent(&self) -> PathBuf {
        found::cgroup_parent(&self.config)
    }
}
