//! A user with a plain MQTT client: publishes job files and hears statuses, each with the moment in which it came.

use std::collections::BTreeMap;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, Result, bail};
use rumqttc::{Client, Event, MqttOptions, Packet, QoS};
use serde_json::Value;

pub const PREFIX: &str = "berth/v1/default/jobs/default";

pub struct User {
    client: Client,
    statuses: Receiver<Status>,
    /// By job, the last one heard.
    pub last: BTreeMap<String, Status>,
}

#[derive(Debug, Clone)]
pub struct Status {
    pub job: String,
    pub at: Instant,
    pub body: Value,
}

impl Status {
    pub fn phase(&self) -> &str {
        self.body["phase"].as_str().unwrap_or_default()
    }

    pub fn is_final(&self) -> bool {
        matches!(self.phase(), "Succeeded" | "Failed" | "Cancelled" | "Rejected")
    }
}

/// A client that is told what is said of jobs on this kind of topic, with the moment, as long as `take` wants it.
pub fn listen(
    mut options: MqttOptions,
    kind: &str,
    mut take: impl FnMut(&str, Instant, &[u8]) -> bool + Send + 'static,
) -> Result<Client> {
    options.set_max_packet_size(96 * 1024, 96 * 1024);
    let (client, mut connection) = Client::new(options, 2048);
    let mut network = rumqttc::NetworkOptions::new();
    network.set_tcp_nodelay(true);
    connection.eventloop.set_network_options(network);
    let (ready, subscribed) = mpsc::channel();
    client.subscribe(format!("{PREFIX}/+/{kind}"), QoS::AtLeastOnce)?;
    std::thread::spawn(move || {
        for event in connection.iter() {
            match event {
                Ok(Event::Incoming(Packet::SubAck(_))) => drop(ready.send(())),
                Ok(Event::Incoming(Packet::Publish(message))) => {
                    let at = Instant::now();
                    let Some(job) = message.topic.split('/').nth_back(1) else { continue };
                    if !take(job, at, &message.payload) {
                        return;
                    }
                }
                Ok(_) => {}
                // The broker has gone, and with it this user.
                Err(_) => return,
            }
        }
    });
    subscribed.recv_timeout(Duration::from_secs(10)).context("the broker does not answer")?;
    Ok(client)
}

impl User {
    /// Connected and subscribed when it returns.
    pub fn connect(port: u16, name: &str) -> Result<Self> {
        let (to, statuses) = mpsc::channel();
        let client = listen(MqttOptions::new(name, "127.0.0.1", port), "status", move |job, at, payload| {
            let Ok(body) = serde_json::from_slice(payload) else { return true };
            to.send(Status { job: job.to_owned(), at, body }).is_ok()
        })?;
        Ok(Self { client, statuses, last: BTreeMap::new() })
    }

    /// Publishes a job file; returns the moment before, on both clocks.
    pub fn submit(&self, job: &str, file: &Value) -> Result<(Instant, SystemTime)> {
        let payload = file.to_string();
        let at = (Instant::now(), SystemTime::now());
        self.client.publish(format!("{PREFIX}/{job}/submit"), QoS::AtLeastOnce, false, payload)?;
        Ok(at)
    }

    pub fn cancel(&self, job: &str) -> Result<()> {
        let command = r#"{"command":"cancel"}"#;
        Ok(self.client.publish(format!("{PREFIX}/{job}/command"), QoS::AtLeastOnce, false, command)?)
    }

    /// The next status of any job, if one comes in time.
    pub fn hear(&mut self, limit: Duration) -> Result<Option<Status>> {
        match self.statuses.recv_timeout(limit) {
            Ok(status) => Ok(Some(status)),
            Err(RecvTimeoutError::Timeout) => Ok(None),
            Err(RecvTimeoutError::Disconnected) => bail!("the broker has gone"),
        }
    }

    /// The next status of any job.
    pub fn next(&mut self, limit: Duration) -> Result<Status> {
        match self.statuses.recv_timeout(limit) {
            Ok(status) => {
                self.last.insert(status.job.clone(), status.clone());
                Ok(status)
            }
            Err(RecvTimeoutError::Timeout) => bail!("no status within {} s", limit.as_secs()),
            Err(RecvTimeoutError::Disconnected) => bail!("the broker has gone"),
        }
    }

    /// The first status of `job` that `wanted` accepts.
    pub fn wait(&mut self, job: &str, limit: Duration, wanted: impl Fn(&Status) -> bool) -> Result<Status> {
        let end = Instant::now() + limit;
        loop {
            let left = end.saturating_duration_since(Instant::now());
            let status = self.next(left).with_context(|| match self.last.get(job) {
                Some(last) => format!("waiting for {job}, last seen as {}", last.body),
                None => format!("waiting for {job}, never seen"),
            })?;
            if status.job == job && wanted(&status) {
                return Ok(status);
            }
        }
    }

    /// Waits for a job's success.
    pub fn wait_success(&mut self, job: &str, limit: Duration) -> Result<Status> {
        let status = self.wait(job, limit, Status::is_final)?;
        if status.phase() != "Succeeded" {
            bail!("job {job} is {}: {}", status.phase(), status.body);
        }
        Ok(status)
    }
}

impl Drop for User {
    fn drop(&mut self) {
        let _ = self.client.disconnect();
    }
}
