//! Which pods are given which secret.

use berth_protocol::ids::{Epoch, JobName, Namespace, PodId, SecretName};
use berth_protocol::job::{JobSpec, SecretMount};
use berth_protocol::limits::SECRETS_BYTES_MAX;
use berth_protocol::message::user::{JobPhase, JobStatus};
use berth_protocol::topic::{JobTopic, Topic};

use super::super::manage::{Change, NotChanged};
use super::super::secrets::NoSecrets;
use super::super::{Actor, Event};
use super::world::{World, inventory, spec};

fn secret(namespace: &str, name: &str) -> (Namespace, SecretName) {
    (Namespace::parse(namespace).unwrap(), SecretName::parse(name).unwrap())
}

fn job(name: &str, mounts: &[&str]) -> JobSpec {
    let mut job = spec(name);
    let mount = |name: &&str| SecretMount { name: secret("a", name).1, mount: format!("/run/{name}") };
    job.pod.containers[0].secrets = mounts.iter().map(mount).collect();
    job.pod.containers[0].command[1] = "100000".to_owned();
    job
}

fn status(world: &World, name: &str) -> JobStatus {
    let topic = Topic::job(&Namespace::default_namespace(), &JobName::parse(name).unwrap(), JobTopic::Status);
    serde_json::from_slice(&world.retained[&topic]).unwrap()
}

fn set(world: &mut World, name: &str, sealed: Option<&str>) {
    let (space, name) = secret("default", name);
    let change = Change::Secret(space, name, sealed.map(str::to_owned));
    assert_eq!(world.controller.may_change(&Actor::default(), &change), Ok(()));
    world.feed(Event::Change(Actor::default(), change));
}

#[test]
fn a_pod_has_what_its_file_names_where_it_was_placed() {
    let mut world = World::new();
    let node = world.add("n0", inventory(8, 0));
    let other = world.add("n1", inventory(0, 0));
    world.run(100);
    // One that waits for its secret holds nobody up, and begins once it is there.
    world.submit(&job("first", &["one", "two"]));
    world.submit(&job("plain", &[]));
    world.until("the plain one runs", |w| status(w, "plain").phase == JobPhase::Running);
    set(&mut world, "one", Some("sealed 1"));
    world.run(5_000);
    let waits = status(&world, "first");
    assert_eq!((waits.phase, waits.reason.as_deref()), (JobPhase::Pending, Some("SecretMissing")));
    assert!(waits.message.unwrap().contains("there is no secret two in namespace default"));
    set(&mut world, "two", Some("sealed 2"));
    world.until("it runs", |w| status(w, "first").phase == JobPhase::Running);

    let pod: PodId = status(&world, "first").uid.unwrap().pod(0);
    let given = |world: &World, node, epoch| {
        let given = world.controller.secrets_of(node, &pod, Epoch(epoch))?;
        Ok(given.sealed.into_iter().map(|(name, sealed)| format!("{name} {sealed}")).collect::<Vec<_>>())
    };
    assert_eq!(given(&world, &node, 1), Ok(vec!["one sealed 1".to_owned(), "two sealed 2".to_owned()]));
    let not_yours = |epoch| NoSecrets::NotYours { pod: pod.clone(), epoch: Epoch(epoch) };
    assert_eq!(given(&world, &other, 1), Err(not_yours(1)), "another node");
    assert_eq!(given(&world, &node, 2), Err(not_yours(2)), "another epoch");
    let plain = status(&world, "plain").uid.unwrap().pod(0);
    assert!(world.controller.secrets_of(&node, &plain, Epoch(1)).unwrap().sealed.is_empty());

    // They outlast the controller, and are each one's own.
    world.restart_controller();
    world.run(5_000);
    set(&mut world, "one", Some("sealed 3"));
    assert_eq!(given(&world, &node, 1), Ok(vec!["one sealed 3".to_owned(), "two sealed 2".to_owned()]));
    let told =
        |world: &World, space: &Namespace| world.controller.secrets_told(&Actor::default(), space).unwrap();
    let rows = told(&world, &Namespace::default_namespace());
    let rows: Vec<_> = rows.iter().map(|row| (row.name.as_str(), row.version)).collect();
    assert_eq!(rows, [("one", 2), ("two", 1)]);
    assert!(told(&world, &Namespace::parse("a").unwrap()).is_empty());
    set(&mut world, "two", None);
    assert!(matches!(given(&world, &node, 1), Err(NoSecrets::Missing { .. })));
}

#[test]
fn all_of_them_together_are_bounded() {
    let mut world = World::new();
    set(&mut world, "big", Some(&"0".repeat(2 * SECRETS_BYTES_MAX - 10)));
    let (space, name) = secret("other", "small");
    let may = |world: &World, sealed: Option<&str>| {
        let change = Change::Secret(space.clone(), name.clone(), sealed.map(str::to_owned));
        world.controller.may_change(&Actor::default(), &change)
    };
    assert_eq!(may(&world, Some("0123456789")), Ok(()));
    assert_eq!(may(&world, Some("01234567890")), Err(NotChanged::SecretsFull));
    assert!(matches!(may(&world, None), Err(NotChanged::Unknown(_))));
    // In its own place there is room for it.
    set(&mut world, "big", Some(&"0".repeat(2 * SECRETS_BYTES_MAX)));
}
