//! The bus and the embedded broker, for real: over loopback, and against Mosquitto.

mod common;

use std::io::{Read, Write};
use std::sync::Arc;
use std::time::Instant;

use berth_controller::io::broker::{BrokerError, BrokerOptions, CONTROLLER_CLIENT_ID};
use berth_controller::io::bus::BusEvent;
use berth_controller::io::metrics::Refusals;
use berth_protocol::broker::BrokerUrl;
use berth_protocol::codec;
use berth_protocol::limits::PACKET_BYTES_MAX;
use berth_protocol::sign::{Key, SEED_BYTES, Signer};
use berth_protocol::topic::Topic;
use common::*;

/// As an agent says it.
fn signed(topic: &Topic, message: &bool) -> Vec<u8> {
    let signer = Signer::new(cluster(), Key::from_seed(&[1; SEED_BYTES]));
    codec::sign(&signer, topic, &codec::encode(topic, message).unwrap()).unwrap()
}

const ALL: &[&str] = &["jobs/+/+/submit", "jobs/+/+/command", "query/+/request", "nodes/+/hello"];

#[tokio::test]
async fn a_submit_reaches_the_controller_and_the_retained_status_a_late_subscriber() {
    let refusals = Arc::new(Refusals::default());
    let broker = embedded(0, &refusals);
    let url = BrokerUrl::new(broker.address());
    let (controller, mut heard, _) = client(url.clone(), CONTROLLER_CLIENT_ID, ALL).await;
    let (user, _user_events, _) = client(url.clone(), "user", &["jobs/default/j/answer"]).await;

    assert!(user.publish(&topic("jobs/default/j/submit"), b"{}".to_vec(), false).await);
    assert_eq!(next_message(&mut heard).await, ("jobs/default/j/submit".to_owned(), b"{}".to_vec()));

    for status in ["first", "second"] {
        assert!(controller.publish(&topic("jobs/default/j/status"), status.into(), true).await);
    }
    assert!(controller.publish(&topic("jobs/default/gone/status"), b"x".to_vec(), true).await);
    assert!(controller.publish(&topic("jobs/default/gone/status"), Vec::new(), true).await);
    // Answers are not retained, even where somebody asks for it.
    assert!(controller.publish(&topic("jobs/default/j/answer"), b"a".to_vec(), true).await);
    assert!(controller.publish(&topic("state/nodes/n1"), b"{}".to_vec(), true).await);

    let mut late = client(url.clone(), "late", &["state/nodes/+"]).await.1;
    assert_eq!(next_message(&mut late).await.0, "state/nodes/n1");
    let (_bus, mut late, _) = client(url, "later", &["jobs/#"]).await;
    assert_eq!(next_message(&mut late).await, ("jobs/default/j/status".to_owned(), b"second".to_vec()));
    assert!(controller.publish(&topic("jobs/default/end/status"), b"{}".to_vec(), false).await);
    assert_eq!(next_message(&mut late).await.0, "jobs/default/end/status", "nothing else was retained");
}

#[tokio::test]
async fn what_is_not_allowed_does_not_arrive_and_is_counted() {
    let refusals = Arc::new(Refusals::default());
    let broker = embedded(0, &refusals);
    let url = BrokerUrl::new(broker.address());
    let (_controller, mut heard, _) = client(url.clone(), CONTROLLER_CLIENT_ID, ALL).await;
    let (node, mut orders, _) =
        client(url.clone(), "n1.nonce", &["nodes/n1/desired", "nodes/n1/lease"]).await;
    let (user, _events, _) = client(url.clone(), "user", &[]).await;
    let options = rumqttc::MqttOptions::new("curious", "127.0.0.1", broker.address().port());
    let (curious, mut connection) = rumqttc::AsyncClient::new(options, 10);
    for denied in ["nodes/n1/desired", "query/+/reply", "#"] {
        curious.subscribe(filter(denied), rumqttc::QoS::AtLeastOnce).await.unwrap();
    }
    let mut answers = Vec::new();
    while answers.len() < 3 {
        if let rumqttc::Event::Incoming(rumqttc::Packet::SubAck(ack)) = connection.poll().await.unwrap() {
            answers.extend(ack.return_codes);
        }
    }
    assert_eq!(answers, [rumqttc::SubscribeReasonCode::Failure; 3]);
    assert_eq!(refusals.count("subscribe"), 3);

    for forged in ["nodes/n1/desired", "nodes/n1/lease", "nodes/n1/hello", "jobs/default/j/status"] {
        assert!(user.publish(&topic(forged), b"forged".to_vec(), false).await);
    }
    assert!(node.publish(&topic("nodes/n2/hello"), b"forged".to_vec(), false).await);
    let hello = signed(&topic("nodes/n1/hello"), &true);
    assert!(node.publish(&topic("nodes/n1/hello"), hello.clone(), false).await);
    assert_eq!(next_message(&mut heard).await, ("nodes/n1/hello".to_owned(), hello));
    wait_until("forged publishes are counted", || refusals.count("publish") == 5);
    assert_eq!(orders.try_next(), None);

    // A last will that may not be said, and the controller's own name, do not even connect.
    let mut options = rumqttc::MqttOptions::new("evil", "127.0.0.1", broker.address().port());
    options.set_last_will(rumqttc::LastWill::new(
        filter("nodes/n1/desired"),
        "x",
        rumqttc::QoS::AtLeastOnce,
        false,
    ));
    let (_client, mut connection) = rumqttc::AsyncClient::new(options, 10);
    assert!(matches!(connection.poll().await, Err(rumqttc::ConnectionError::ConnectionRefused(_))));
    let options = rumqttc::MqttOptions::new(CONTROLLER_CLIENT_ID, "127.0.0.1", broker.address().port());
    let (_client, mut connection) = rumqttc::AsyncClient::new(options, 10);
    assert!(matches!(connection.poll().await, Err(rumqttc::ConnectionError::ConnectionRefused(_))));
    assert_eq!(refusals.count("connect"), 1);
}

/// As where the broker lets everybody say everything.
#[tokio::test]
async fn a_nodes_message_without_its_signature_goes_no_further() {
    let broker = embedded(0, &Arc::new(Refusals::default()));
    let url = BrokerUrl::new(broker.address());
    let (_controller, mut heard, refusals) = client(url.clone(), CONTROLLER_CLIENT_ID, ALL).await;
    let (node, _orders, _) = client(url, "n1.nonce", &[]).await;
    let hello = topic("nodes/n1/hello");
    let of_another = signed(&topic("nodes/n2/hello"), &true);
    for forged in [codec::encode(&hello, &true).unwrap(), of_another, b"true".to_vec(), Vec::new()] {
        assert!(node.publish(&hello, forged, false).await);
    }
    let own = signed(&hello, &true);
    assert!(node.publish(&hello, own.clone(), false).await);
    assert_eq!(next_message(&mut heard).await, ("nodes/n1/hello".to_owned(), own));
    assert_eq!(["unsigned", "forged", "malformed"].map(|reason| refusals.count(reason)), [1, 1, 2]);
}

#[tokio::test]
async fn a_taken_port_says_what_to_do() {
    let refusals = Arc::new(Refusals::default());
    let first = embedded(0, &refusals);
    let options = BrokerOptions {
        listen: first.address(),
        cluster: cluster(),
        network: None,
        password: String::new(),
        tls: None,
    };
    let Err(error) = berth_controller::io::broker::Broker::start(options, refusals) else {
        panic!("two listen on {}", first.address())
    };
    assert!(
        matches!(&error, BrokerError::Listen { source, .. } if source.kind() == std::io::ErrorKind::AddrInUse)
    );
    assert!(error.to_string().contains("--listen-mqtt"), "{error}");
}

#[tokio::test]
async fn an_oversized_packet_hurts_nobody_else() {
    let refusals = Arc::new(Refusals::default());
    let broker = embedded(0, &refusals);
    let url = BrokerUrl::new(broker.address());
    let (_controller, mut heard, _) = client(url.clone(), CONTROLLER_CLIENT_ID, ALL).await;
    let (user, _events, said) = client(url, "user", &[]).await;
    assert!(!user.publish(&topic("jobs/default/j/submit"), vec![b'x'; PACKET_BYTES_MAX], false).await);
    assert_eq!(said.count("oversized"), 1);
    assert!(user.publish(&topic("jobs/default/j/submit"), vec![b'x'; PACKET_BYTES_MAX - 100], false).await);
    assert_eq!(next_message(&mut heard).await.1.len(), PACKET_BYTES_MAX - 100);

    oversized(broker.address().port(), 2 * PACKET_BYTES_MAX).await;
    wait_until("it is counted", || refusals.count("oversized") == 1);
    assert!(user.publish(&topic("jobs/default/j/submit"), b"after".to_vec(), false).await);
    assert_eq!(next_message(&mut heard).await.1, b"after");
}

#[tokio::test]
async fn a_packet_that_cannot_be_read_is_counted_and_a_connection_that_breaks_is_not() {
    let refusals = Arc::new(Refusals::default());
    let broker = embedded(0, &refusals);
    // CONNECT of MQTT 3.1.1 with a clean session and the client id `raw`.
    let connect = [0x10, 15, 0, 4, b'M', b'Q', b'T', b'T', 4, 2, 0, 60, 0, 3, b'r', b'a', b'w'];
    // Twice the same client: the first is gone when the second is let in.
    let open = |answered: &mut [u8]| {
        let mut stream = std::net::TcpStream::connect(broker.address()).unwrap();
        stream.write_all(&connect).unwrap();
        stream.read_exact(answered).unwrap();
        stream
    };
    // Closed with an answer half read, a connection is reset.
    drop(open(&mut [0; 2]));
    let mut answer = [0; 4];
    let mut bad = open(&mut answer);
    assert_eq!(answer, [0x20, 2, 0, 0]);
    // A packet of type 0 is none.
    bad.write_all(&[0, 0]).unwrap();
    wait_until("it is counted", || refusals.count("malformed") == 1);
}

/// Publishes a submit of so many bytes with a client that minds no limit, and waits for its end.
async fn oversized(port: u16, bytes: usize) {
    let mut options = rumqttc::MqttOptions::new("big", "127.0.0.1", port);
    options.set_max_packet_size(10 * bytes, 10 * bytes);
    let (client, mut connection) = rumqttc::AsyncClient::new(options, 10);
    client
        .publish(filter("jobs/default/j/submit"), rumqttc::QoS::AtLeastOnce, false, vec![b'x'; bytes])
        .await
        .unwrap();
    let end = Instant::now() + DEADLINE;
    loop {
        assert!(Instant::now() < end, "the broker says nothing");
        match connection.poll().await {
            Ok(rumqttc::Event::Incoming(rumqttc::Incoming::PubAck(_))) | Err(_) => return,
            Ok(_) => {}
        }
    }
}

#[tokio::test]
async fn with_mosquitto_an_oversized_packet_is_counted_and_the_bus_comes_back() {
    let Some(mosquitto) = Mosquitto::start(free_port()) else { return };
    let (_controller, mut heard, refusals) = client(mosquitto.url(), "controller", ALL).await;
    oversized(mosquitto.port, 2 * PACKET_BYTES_MAX).await;
    assert_eq!(next(&mut heard).await, BusEvent::Down);
    assert_eq!(next(&mut heard).await, BusEvent::Up);
    assert_eq!(refusals.count("oversized"), 1);
}

#[tokio::test]
async fn the_bus_survives_a_broker_that_is_killed_and_comes_back() {
    let port = free_port();
    let Some(first) = Mosquitto::start(port) else { return };
    let (controller, mut heard, _) = client(first.url(), "controller", ALL).await;
    drop(first);
    assert_eq!(next(&mut heard).await, BusEvent::Down);
    assert!(
        !controller.publish(&topic("jobs/default/j/answer"), b"{}".to_vec(), false).await,
        "dropped, not kept"
    );
    let second = Mosquitto::start(port).unwrap();
    assert_eq!(next(&mut heard).await, BusEvent::Up);
    let (user, _events, _) = client(second.url(), "user", &[]).await;
    assert!(user.publish(&topic("jobs/default/j/submit"), b"{}".to_vec(), false).await);
    assert_eq!(next_message(&mut heard).await.0, "jobs/default/j/submit");
}

#[tokio::test]
async fn the_embedded_broker_comes_back_on_its_port_at_once() {
    let refusals = Arc::new(Refusals::default());
    let first = embedded(0, &refusals);
    let port = first.address().port();
    let (_controller, mut heard, _) =
        client(BrokerUrl::new(first.address()), CONTROLLER_CLIENT_ID, ALL).await;
    drop(first);
    assert_eq!(next(&mut heard).await, BusEvent::Down);
    let second = embedded(port, &refusals);
    assert_eq!(second.address().port(), port);
    assert_eq!(next(&mut heard).await, BusEvent::Up);
}

#[tokio::test]
async fn retained_messages_are_dropped_where_they_are_not_wanted() {
    let Some(mosquitto) = Mosquitto::start(free_port()) else { return };
    let (user, _events, _) = client(mosquitto.url(), "user", &[]).await;
    assert!(user.publish(&topic("jobs/default/old/submit"), b"{}".to_vec(), true).await);
    let options = berth_controller::io::bus::BusOptions {
        url: mosquitto.url(),
        cluster: cluster(),
        client_id: "controller".to_owned(),
        credentials: None,
        filters: vec![filter("jobs/+/+/submit"), filter("nonsense/#")],
        retained: false,
        tls: None,
        voucher: None,
    };
    let refusals = Arc::new(Refusals::default());
    let (_bus, mut heard) = berth_controller::io::bus::Bus::connect(options, refusals.clone());
    assert_eq!(next(&mut heard).await, BusEvent::Up);
    let options = rumqttc::MqttOptions::new("nonsense", "127.0.0.1", mosquitto.port);
    let (nonsense, mut connection) = rumqttc::AsyncClient::new(options, 10);
    let task = tokio::spawn(async move { while connection.poll().await.is_ok() {} });
    nonsense.publish(filter("nonsense/x"), rumqttc::QoS::AtLeastOnce, false, "x").await.unwrap();
    assert!(user.publish(&topic("jobs/default/new/submit"), b"{}".to_vec(), false).await);
    assert_eq!(next_message(&mut heard).await.0, "jobs/default/new/submit");
    wait_until("an unknown topic is counted", || refusals.count("topic") == 1);
    task.abort();
}
