//! What is chosen when a cluster is set up, and by what names its members reach the controller.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;

use super::{Admission, BrokerChoice, Config, ConfigError, Flags, Settings};

impl Flags {
    /// Those of a cluster that is being set up.
    pub fn of(setup: Setup) -> Self {
        let Setup { hosts, data_dir, store, cluster, broker, listen_mqtt, listen_http } = setup;
        let settings = Settings {
            hosts: Some(hosts),
            data_dir,
            store,
            cluster,
            broker,
            listen_mqtt,
            listen_http,
            ..Settings::default()
        };
        Self { config: None, settings, admin: None }
    }
}

/// What is chosen when a cluster is set up.
#[derive(Debug, Clone, clap::Args)]
pub struct Setup {
    /// A name or address by which other machines reach this one, for its certificate; may be repeated, and the first is
    /// what those that join are told
    #[arg(long = "host", value_name = "HOST", required = true, value_delimiter = ',')]
    hosts: Vec<String>,
    /// Where the store and the depot live [default: /var/lib/berth/controller]
    #[arg(long, value_name = "DIR")]
    data_dir: Option<PathBuf>,
    /// `embedded`, or the etcd that several controllers share: etcd://HOST:PORT[,HOST:PORT…], or
    /// with certificates etcds://HOST:PORT[,HOST:PORT…]?ca=FILE&cert=FILE&key=FILE [default: embedded]
    #[arg(long, value_name = "STORE")]
    store: Option<String>,
    /// The cluster's name [default: default]
    #[arg(long, value_name = "NAME")]
    cluster: Option<String>,
    /// `embedded`, or the broker to use: mqtts://HOST[:PORT] [default: embedded]
    #[arg(long, value_name = "BROKER")]
    broker: Option<String>,
    /// Where the embedded broker listens [default: 0.0.0.0:8883]
    #[arg(long, value_name = "ADDRESS:PORT")]
    listen_mqtt: Option<SocketAddr>,
    /// Where the depot, /healthz and /metrics listen, and those that join are answered [default: 0.0.0.0:7420]
    #[arg(long, value_name = "ADDRESS:PORT")]
    listen_http: Option<SocketAddr>,
}

impl Setup {
    /// The configuration that says so.
    pub fn file(&self) -> String {
        // JSON's strings are among TOML's.
        let quoted = |text: &str| serde_json::Value::from(text).to_string();
        let mut text =
            "# Written by `berth-controller init`. Names are those of the flags: berth-controller --help\n"
                .to_owned();
        let hosts: Vec<String> = self.hosts.iter().map(|host| quoted(host)).collect();
        text += &format!("host = [{}]\n", hosts.join(", "));
        let listens = |address: Option<SocketAddr>| address.map(|address| address.to_string());
        for (key, value) in [
            ("data-dir", self.data_dir.as_ref().map(|dir| dir.display().to_string())),
            ("store", self.store.clone()),
            ("cluster", self.cluster.clone()),
            ("broker", self.broker.clone()),
            ("listen-mqtt", listens(self.listen_mqtt)),
            ("listen-http", listens(self.listen_http)),
        ] {
            text.extend(value.map(|value| format!("{key} = {}\n", quoted(&value))));
        }
        text
    }
}

/// Names and addresses of this machine, as certificates have them.
pub(super) fn hosts(named: Option<Vec<String>>) -> Result<Vec<String>, ConfigError> {
    let hosts = named.unwrap_or_default();
    if hosts.is_empty() {
        return Err(ConfigError::NoIdentity);
    }
    let plain = |host: &str| host.chars().all(|c| c.is_ascii_alphanumeric() || "-.".contains(c));
    let fits =
        |host: &str| host.parse::<IpAddr>().is_ok() || !host.is_empty() && host.len() < 254 && plain(host);
    match hosts.iter().find(|host| !fits(host)) {
        Some(bad) => Err(ConfigError::Host(bad.clone())),
        None => Ok(hosts),
    }
}

/// `HOST:PORT`, an IPv6 address in brackets.
fn authority(host: &str, port: u16) -> String {
    if host.contains(':') { format!("[{host}]:{port}") } else { format!("{host}:{port}") }
}

impl Config {
    /// Where those that join find the controller's HTTP; `None` with `--dev`.
    pub fn members_url(&self) -> Option<String> {
        let Admission::Members { hosts } = &self.admission else { return None };
        Some(format!("https://{}", authority(hosts.first()?, self.listen_http.port())))
    }

    /// Likewise the broker.
    pub fn members_broker(&self) -> Option<String> {
        let Admission::Members { hosts } = &self.admission else { return None };
        Some(match &self.broker {
            BrokerChoice::Embedded => {
                format!("mqtts://{}", authority(hosts.first()?, self.listen_mqtt.port()))
            }
            BrokerChoice::Url(url) => url.to_string(),
        })
    }
}
