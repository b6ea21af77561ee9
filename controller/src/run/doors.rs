//! The controller's doors: who is let in at the broker and over HTTP, and by what this controller is known.

use std::sync::Arc;

use berth_protocol::broker::BrokerUrl;
use berth_protocol::delegation::Delegation;
use berth_protocol::ids::ClusterName;
use berth_protocol::sign::{Key, PublicKey, Signer};
use berth_protocol::tls::Clients;
use berth_protocol::topic::filter;
use rustls::ClientConfig;
use tokio::sync::watch;

use super::RunError;
use crate::config::{Admission, BrokerChoice, Config};
use crate::core::LoadError;
use crate::core::keys::{self, SigningKey};
use crate::io::broker::{Broker, BrokerOptions, CONTROLLER_CLIENT_ID};
use crate::io::bus::BusOptions;
use crate::io::ca::Ca;
use crate::io::front::Tls;
use crate::io::http::{About, Hall};
use crate::io::members::Members;
use crate::io::metrics::Refusals;
use crate::io::random;
use crate::io::store::{Entries, Store};
use crate::io::vault::Vault;
use crate::io::vouch::Voucher;

/// What the key is for that is drawn from the store's secret, where the root has named none.
const SIGNING: &str = "berth controller signing 1";

#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    #[error(
        "the key that signs orders is damaged: `berth-controller restore` puts a backup in the store's place; then rotate it"
    )]
    Damaged(#[source] LoadError),
    #[error(
        "the key that signs orders is sealed with another store's secret: `berth-controller restore` puts a backup in the \
         store's place; then rotate it"
    )]
    Sealed,
}

/// Signs what controllers of this store say; and whom their members know for it.
pub fn signer(
    cluster: &ClusterName,
    secret: &[u8; 32],
    entries: &Entries,
) -> Result<(Signer, PublicKey), KeyError> {
    let Some(SigningKey { root, delegation, sealed }) =
        keys::in_entries(entries).map_err(KeyError::Damaged)?
    else {
        let signer = Signer::new(cluster.clone(), Key::derived(secret, SIGNING));
        let own = signer.public();
        return Ok((signer, own));
    };
    let seed = Vault::of(secret).open_seed(&sealed).ok_or(KeyError::Sealed)?;
    Ok((Signer::delegated(cluster.clone(), Key::from_seed(&seed), delegation), root))
}

/// What a controller that lets members alone in shows and asks for at its doors.
pub(super) struct Belonging {
    pub hall: Hall,
    /// Of the broker.
    pub gate: Tls,
    /// Towards a broker that is not this controller's.
    pub own: Arc<ClientConfig>,
}

pub(super) fn belonging(
    config: &Config,
    secret: &[u8; 32],
    root: PublicKey,
    delegation: watch::Receiver<Option<Delegation>>,
) -> Result<Option<Belonging>, RunError> {
    let about = about(config, root, delegation);
    let (Admission::Members { hosts }, Some(about)) = (&config.admission, about) else {
        return Ok(None);
    };
    let ca = Ca::of(secret, &config.cluster)?;
    let here = ["localhost", "127.0.0.1", "::1"].map(str::to_owned);
    let hosts: Vec<String> = hosts.iter().cloned().chain(here).collect();
    let own = ca.own(&hosts)?;
    let members = Arc::new(Members::default());
    let voucher = Voucher::new(random::hex::<16>()?);
    let gate = Tls { config: own.server(Clients::Known)?, members, voucher };
    let tls = Tls { config: own.server(Clients::Any)?, ..gate.clone() };
    Ok(Some(Belonging { own: own.client()?, hall: Hall { tls, ca, about }, gate }))
}

/// What this controller says of itself; none with `--dev`.
pub fn about(
    config: &Config,
    root: PublicKey,
    delegation: watch::Receiver<Option<Delegation>>,
) -> Option<About> {
    let (broker, url) = (config.members_broker()?, config.members_url()?);
    Some(About { cluster: config.cluster.clone(), root, delegation, broker, url })
}

/// The broker, where it is ours, and how to connect to it.
pub(super) fn connect(
    config: &Config,
    store: &Store,
    refusals: &Arc<Refusals>,
    gate: Option<Tls>,
    own: Option<Arc<ClientConfig>>,
) -> Result<(Option<Broker>, BusOptions), RunError> {
    let embedded = config.broker == BrokerChoice::Embedded;
    let voucher = gate.as_ref().filter(|_| embedded).map(|gate| gate.voucher.clone());
    let (broker, url, client_id, credentials) = match &config.broker {
        BrokerChoice::Embedded => {
            let password = random::hex::<16>()?;
            let options = BrokerOptions {
                listen: config.listen_mqtt,
                cluster: config.cluster.clone(),
                network: match config.admission {
                    Admission::Dev(network) => network,
                    Admission::Members { .. } => None,
                },
                password: password.clone(),
                tls: gate,
            };
            let broker = Broker::start(options, refusals.clone())?;
            let url = BrokerUrl::new(broker.own_address());
            let id = CONTROLLER_CLIENT_ID.to_owned();
            (Some(broker), url, id.clone(), Some((id, password)))
        }
        BrokerChoice::Url(url) => {
            (None, url.clone(), format!("{CONTROLLER_CLIENT_ID}-{}", store.identity().id), None)
        }
    };
    let filters = filter::controller(&config.cluster);
    let cluster = config.cluster.clone();
    let (retained, tls) = (false, own);
    Ok((broker, BusOptions { url, cluster, client_id, credentials, filters, retained, tls, voucher }))
}
