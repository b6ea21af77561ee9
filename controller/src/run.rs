//! The controller's one loop: events to the core, its writes to the store, and only then its effects to the world.
//! It decides nothing; it owns every part of `io` and the order in which they start and end.

mod doors;
mod inquiries;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use berth_protocol::chain::chain;
use berth_protocol::codec;
use berth_protocol::delegation::Delegation;
use berth_protocol::ids::Term;
use berth_protocol::sign::{SEED_BYTES, Signer};
use berth_protocol::topic::Topic;
use berth_protocol::units::Timestamp;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;

use self::doors::{Belonging, belonging, connect};
pub use self::doors::{KeyError, about, signer};
use crate::config::Config;
use crate::core::{self, Controller, Effect, Event, SetAside, Write};
use crate::io::broker::{Broker, BrokerError};
use crate::io::bus::{Bus, BusEvent, BusEvents};
use crate::io::ca::CaError;
use crate::io::clock;
use crate::io::depot::{Bucket, Depot, DepotError, GRACE, Item};
use crate::io::http::{HttpError, Inquiry, Server};
use crate::io::members::Members;
use crate::io::memory;
use crate::io::metrics::Refusals;
use crate::io::random;
use crate::io::store::{Op, Store, StoreError};
use crate::io::systemd::Notifier;

/// Events that one transaction takes together.
const BATCH_EVENTS_MAX: usize = 256;
/// Entries of the audit log that are read for one page.
const AUDIT_ROWS: usize = 100;
/// Inquiries that may wait for the loop.
const INQUIRIES_MAX: usize = 16;
/// Results of work beside the loop that may wait for it.
const RESULTS_MAX: usize = 4;
/// tokio's clock stands still while the machine sleeps, so that CLOCK_BOOTTIME is looked at this often.
const WAKE_CHECK_MAX: Duration = Duration::from_secs(10);
/// Nothing changed for this long: the controller makes itself small.
const TRIM_AFTER: Duration = Duration::from_secs(4);

/// Why the controller ended, or did not start.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error("cannot read the state in the store")]
    Load(#[from] core::LoadError),
    #[error(transparent)]
    Broker(#[from] BrokerError),
    #[error(transparent)]
    Depot(#[from] DepotError),
    #[error(transparent)]
    Http(#[from] HttpError),
    #[error(transparent)]
    Key(#[from] KeyError),
    #[error("this controller cannot show who it is")]
    Ca(#[from] CaError),
    #[error("this controller cannot show who it is")]
    Tls(#[from] rustls::Error),
    #[error("cannot use the system's random generator, sockets or signals")]
    System(#[from] std::io::Error),
}

/// A controller that has started and waits for `run`.
pub struct Daemon {
    controller: Controller,
    store: Store,
    term: Term,
    depot: Arc<Depot>,
    bus: Bus,
    /// Of what agents are told.
    signer: Signer,
    /// Why its key may sign, for those that join.
    delegation: watch::Sender<Option<Delegation>>,
    /// The seed of one that the root may name next.
    drawn: Option<[u8; SEED_BYTES]>,
    events: BusEvents,
    inquiries: mpsc::Receiver<Inquiry>,
    /// What comes of work that the core asked for and that takes its time: the depot's contents, prices.
    results: mpsc::Receiver<Event>,
    worked: mpsc::Sender<Event>,
    http: JoinHandle<()>,
    http_address: SocketAddr,
    /// Who belongs, where not everybody is let in.
    members: Option<Arc<Members>>,
    /// Behind the bus, so that it ends after it.
    broker: Option<Broker>,
    /// When what only the start, or the last change, needed is given back.
    trim_at: Option<Instant>,
}

impl Daemon {
    /// Opens the store and takes the lead; then listens and connects. Needs a tokio runtime.
    pub async fn start(config: Config) -> Result<Self, RunError> {
        let refusals = Arc::new(Refusals::default());
        let mut store = Store::open(&config.store, &config.data_dir, &config.cluster).await?;
        let term = lead(&mut store).await?;
        let bucket = config.depot.as_deref().map(Bucket::parse).transpose().map_err(DepotError::from)?;
        let quota = config.checkpoint_quota.map(|bytes| bytes.0);
        let depot = Depot::open(config.data_dir.join("depot"), bucket, &store.identity().secret, quota)?;
        depot.survey().await?;
        let depot = Arc::new(depot);
        let (worked, results) = mpsc::channel(RESULTS_MAX);
        let (ask, inquiries) = mpsc::channel(INQUIRIES_MAX);
        let secret = store.identity().secret;
        let entries = store.list().await?;
        let (signer, root) = signer(&config.cluster, &secret, &entries)?;
        let (delegation, told) = watch::channel(signer.delegation().cloned());
        let belonging = belonging(&config, &secret, root, told)?;
        let members = belonging.as_ref().map(|belonging| belonging.hall.tls.members.clone());
        let ca = belonging.as_ref().map(|belonging| belonging.hall.ca.pem());
        let (hall, gate, own) = match belonging {
            Some(Belonging { hall, gate, own }) => (Some(hall), Some(gate), Some(own)),
            None => (None, None, None),
        };
        let http =
            Server::bind(config.listen_http, depot.clone(), secret, refusals.clone(), ask, hall).await?;
        let http_address = http.address()?;
        let depot_url = config.depot_url.clone().or_else(|| config.members_url());
        let controller = Controller::load(
            core::Config {
                cluster: config.cluster.clone(),
                store: store.identity().id.clone(),
                term,
                depot_url: depot_url.unwrap_or_else(|| format!("http://{http_address}")),
                namespaces: config.namespaces.clone(),
                moves_max: usize::from(config.moves),
                secret,
                ca,
                seed: u64::from_ne_bytes(random::bytes()?),
            },
            entries,
            clock::now(),
        )?;
        if let Some(members) = &members {
            let known = controller.members().clone();
            known.into_iter().for_each(|(party, member)| members.set(party, Some(member)));
        }
        report(controller.set_aside());
        if let Some(wait) = controller.holds_for(clock::now()) {
            tracing::warn!(
                "the store was restored: nothing is placed for {wait}, no pod before those of its job that it knows nothing of have stopped"
            );
        }
        if let Some(ending) = controller.key_ending(clock::now()) {
            tracing::warn!("{ending}");
        }
        let (broker, bus) = connect(&config, &store, &refusals, gate, own)?;
        let (bus, events) = Bus::connect(bus, refusals);
        let http = tokio::spawn(http.run());
        tracing::info!(cluster = %config.cluster, store = %store.identity().id, %term, http = %http_address, "started");
        Ok(Self {
            controller,
            store,
            term,
            depot,
            bus,
            signer,
            delegation,
            drawn: None,
            events,
            inquiries,
            results,
            worked,
            http,
            http_address,
            members,
            broker,
            trim_at: Some(Instant::now() + TRIM_AFTER),
        })
    }

    /// Where the embedded broker listens.
    pub fn mqtt_address(&self) -> Option<SocketAddr> {
        self.broker.as_ref().map(Broker::address)
    }

    pub fn http_address(&self) -> SocketAddr {
        self.http_address
    }

    /// Works until `shutdown` ends, or the store fails: then nothing more may be answered, and the program must end.
    pub async fn run(mut self, shutdown: impl Future<Output = ()>) -> Result<(), RunError> {
        let notifier = Notifier::from_env();
        notifier.send("READY=1");
        if matches!(self.store, Store::Etcd(..)) {
            notifier.send("STATUS=leading");
        }
        let result = self.work(shutdown, &notifier).await;
        notifier.send("STOPPING=1");
        self.http.abort();
        self.bus.close().await;
        // Behind the last message of this term.
        self.store.resign().await;
        result
    }

    async fn work(
        &mut self,
        shutdown: impl Future<Output = ()>,
        notifier: &Notifier,
    ) -> Result<(), RunError> {
        let mut shutdown = std::pin::pin!(shutdown);
        let mut alive = beats(notifier);
        loop {
            let idle = self.trim_at.map_or(WAKE_CHECK_MAX, |at| at.saturating_duration_since(Instant::now()));
            let wait = self.until_wake().min(idle);
            tokio::select! {
                biased;
                () = &mut shutdown => return Ok(()),
                () = beat(&mut alive) => notifier.send("WATCHDOG=1"),
                error = self.store.deposed() => return Err(error.into()),
                Some(inquiry) = self.inquiries.recv() => self.answer(inquiry).await?,
                Some(event) = self.results.recv() => self.step([event]).await?,
                Some(event) = self.events.next() => self.take(event).await?,
                () = tokio::time::sleep(wait) => {
                    if self.until_wake().is_zero() {
                        self.step([Event::Tick]).await?;
                    }
                    if self.trim_at.is_some_and(|at| at <= Instant::now()) {
                        self.trim_at = None;
                        memory::give_back();
                    }
                }
            }
        }
    }

    fn until_wake(&self) -> Duration {
        let wake = self.controller.next_wake();
        wake.map_or(WAKE_CHECK_MAX, |at| at.since(clock::boottime()).duration().min(WAKE_CHECK_MAX))
    }

    /// Takes an event and whatever waits behind it. A lone one waits for nothing.
    async fn take(&mut self, first: BusEvent) -> Result<(), RunError> {
        let mut batch = vec![event(first)];
        while batch.len() < BATCH_EVENTS_MAX
            && let Some(next) = self.events.try_next()
        {
            batch.push(event(next));
        }
        // Under a steady stream of events the timer above would starve.
        if self.until_wake().is_zero() {
            batch.push(Event::Tick);
        }
        self.step(batch).await
    }

    async fn step(&mut self, events: impl IntoIterator<Item = Event>) -> Result<(), RunError> {
        // Of several writes to a key the last one counts.
        let mut writes = BTreeMap::new();
        let step = self.controller.steps(clock::now(), events);
        writes.extend(step.writes.into_iter().map(|Write { key, value }| (key, value)));
        if !writes.is_empty() {
            let ops = writes.into_iter().map(|(key, value)| match value {
                Some(value) => Op::Put { key, value },
                None => Op::Delete { key },
            });
            self.store.txn(self.term, ops.collect()).await?;
            self.trim_at = Some(Instant::now() + TRIM_AFTER);
        }
        // Of one that may be deposed already a grant could hold beside those of the next, a status stand for good.
        if !step.effects.is_empty() {
            self.store.leads().await?;
        }
        for effect in step.effects {
            self.release(effect).await;
        }
        Ok(())
    }

    async fn release(&self, effect: Effect) {
        match effect {
            Effect::ReadAudit(question) => {
                match self.store.audit(question.before.as_deref(), AUDIT_ROWS).await {
                    Ok(entries) => {
                        let whole = entries.len() < AUDIT_ROWS;
                        let (topic, payload) = question.reply(entries, whole);
                        self.bus.publish(&topic, payload, false).await;
                    }
                    Err(error) => tracing::error!("the audit log cannot be read: {error}"),
                }
            }
            Effect::TrimAudit { before } => {
                if let Err(error) = self.store.trim_audit(&before).await {
                    tracing::warn!("the audit log keeps what is old: {error}");
                }
            }
            Effect::Publish { topic, payload, retain } => {
                let payload = match topic {
                    Topic::Node { .. } => codec::sign(&self.signer, &topic, &payload),
                    _ => Ok(payload),
                };
                match payload {
                    Ok(payload) => drop(self.bus.publish(&topic, payload, retain).await),
                    Err(error) => tracing::error!("a message on {topic} cannot be signed: {error}"),
                }
            }
            Effect::DeleteLog { pod, epoch } => self.delete(Item::Log { pod, epoch }),
            Effect::DeleteBlob(digest) => self.delete(Item::Blob(digest)),
            Effect::DeleteCheckpoint(id) => {
                let depot = self.depot.clone();
                tokio::spawn(async move { told(depot.delete_manifest(&id).await) });
            }
            Effect::TidyDepot => {
                let (depot, worked) = (self.depot.clone(), self.worked.clone());
                tokio::spawn(async move {
                    told(depot.collect(GRACE).await.map(drop));
                    let at = |time: std::time::SystemTime| {
                        let since = time.duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
                        Timestamp(u64::try_from(since.as_millis()).unwrap_or(u64::MAX))
                    };
                    let held = depot.manifests().into_iter().map(|(id, time)| (id, at(time))).collect();
                    // One that waits already tells the same.
                    let _ = worked.try_send(Event::DepotListed(held));
                });
            }
            Effect::Price(quote) => {
                let worked = self.worked.clone();
                tokio::task::spawn_blocking(move || {
                    // The loop has ended where nobody listens.
                    let _ = worked.blocking_send(Event::Priced(Box::new(quote.prices())));
                });
            }
            Effect::Note(note) if note.is_warning() => tracing::warn!("{note}"),
            Effect::Note(note) => tracing::info!("{note}"),
        }
    }

    fn delete(&self, item: Item) {
        let depot = self.depot.clone();
        tokio::spawn(async move { told(depot.delete(&item).await) });
    }
}

fn report(aside: &SetAside) {
    for key in &aside.damaged {
        tracing::error!("the store's record {key} is damaged, and left as it is");
    }
    for job in &aside.jobs {
        tracing::error!(
            "the job with uid {job} is set aside: a record of it is damaged or lost. `berth-controller fsck` says which, \
             `berth-controller restore` puts a backup in the store's place"
        );
    }
}

fn told(result: Result<(), DepotError>) {
    if let Err(error) = result {
        tracing::warn!("{}", chain(&error));
    }
}

/// Waits until this controller leads: a standby is a service that has started.
async fn lead(store: &mut Store) -> Result<Term, StoreError> {
    let notifier = Notifier::from_env();
    if matches!(store, Store::Etcd(..)) {
        notifier.send("READY=1");
        notifier.send("STATUS=standing by");
    }
    let mut alive = beats(&notifier);
    let mut campaign = std::pin::pin!(store.campaign());
    loop {
        tokio::select! {
            term = &mut campaign => return term,
            () = beat(&mut alive) => notifier.send("WATCHDOG=1"),
        }
    }
}

fn event(event: BusEvent) -> Event {
    match event {
        BusEvent::Up => Event::BusUp,
        BusEvent::Down => Event::BusDown,
        BusEvent::Message { topic, payload, by } => Event::Message { topic, payload, by },
    }
}

/// The service manager's watchdog, where it has one; it begins to watch behind `READY=1`.
fn beats(notifier: &Notifier) -> Option<tokio::time::Interval> {
    let period = notifier.watchdog_period()?;
    Some(tokio::time::interval_at(tokio::time::Instant::now() + period, period))
}

async fn beat(alive: &mut Option<tokio::time::Interval>) {
    match alive {
        Some(interval) => {
            interval.tick().await;
        }
        None => std::future::pending().await,
    }
}
