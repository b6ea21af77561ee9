//! The controller's doors: who is let in at the broker and over HTTP, and by what this controller is known.

use std::sync::Arc;

use berth_protocol::broker::BrokerUrl;
use berth_protocol::ids::ClusterName;
use berth_protocol::sign::{Key, PublicKey, Signer};
use berth_protocol::tls::Clients;
use berth_protocol::topic::filter;
use rustls::ClientConfig;

use super::RunError;
use crate::config::{Admission, BrokerChoice, Config};
use crate::io::broker::{Broker, BrokerOptions, CONTROLLER_CLIENT_ID};
use crate::io::bus::BusOptions;
use crate::io::ca::Ca;
use crate::io::front::Tls;
use crate::io::http::{About, Hall};
use crate::io::members::Members;
use crate::io::metrics::Refusals;
use crate::io::random;
use crate::io::store::Store;
use crate::io::vouch::Voucher;

/// What the key is for that is drawn from the store's secret.
const SIGNING: &str = "berth controller signing 1";

/// Signs what controllers of a store with this secret say.
pub fn signer(cluster: &ClusterName, secret: &[u8; 32]) -> Signer {
    Signer::new(cluster.clone(), Key::derived(secret, SIGNING))
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
    controller: PublicKey,
) -> Result<Option<Belonging>, RunError> {
    let (Admission::Members { hosts }, Some(about)) = (&config.admission, about(config, controller)) else {
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
pub fn about(config: &Config, controller: PublicKey) -> Option<About> {
    let (broker, url) = (config.members_broker()?, config.members_url()?);
    Some(About { cluster: config.cluster.clone(), controller, broker, url })
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
