//! The real client against a real broker, a fake controller and a fake depot.

mod fake;

use std::os::unix::fs::PermissionsExt as _;
use std::process::Stdio;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::time::{Duration, Instant};

use berth_protocol::ids::ContainerName;
use berth_protocol::log::{Record, Stream};
use berth_protocol::message::query::Query;
use berth_protocol::message::user::Command as JobVerb;
use berth_protocol::units::Timestamp;
use serde_json::{Value, json};

use fake::{Broker, Bus, Controller, DEADLINE, Depot, Ended, Request, berth, output, output_in};

fn status(job: &str, generation: u64, phase: &str, pods: Value) -> Value {
    json!({"namespace": "default", "job": job, "uid": "u1", "generation": generation, "phase": phase, "pods": pods,
        "podCounts": {}, "failures": 0, "evictions": 0, "migrations": 0, "submittedAt": "2026-01-01T00:00:00.000Z"})
}

fn pod(name: &str, epoch: u64, phase: &str, code: u8, records: u64) -> Value {
    json!({"pod": name, "epoch": epoch, "node": "n1", "phase": phase, "exitCode": code, "restarts": 0,
        "finishedAt": "2026-01-01T00:00:01.000Z", "logRecords": records})
}

fn node(name: &str, hostname: &str, kernel: &str) -> Value {
    let amounts = json!({"cpuMilli": 1000, "memoryBytes": 1 << 30, "gpuMilli": 0});
    json!({"node": name, "state": "online", "capacity": amounts, "allocated": amounts, "labels": {}, "gpus": [],
        "hostname": hostname, "arch": "x86_64", "kernel": kernel, "os": "Debian", "agentVersion": "0", "pods": 0})
}

/// This machine.
fn this_node() -> Value {
    let read =
        |name: &str| std::fs::read_to_string(format!("/proc/sys/kernel/{name}")).unwrap().trim().to_owned();
    node("here", &read("hostname"), &read("osrelease"))
}

fn sources(sources: Value, finished: bool, depot: Value) -> Value {
    json!({"sources": sources, "finished": finished, "many": false, "depot": depot})
}

fn no_depot() -> Value {
    json!({"url": "http://127.0.0.1:1", "token": "", "expires": 0})
}

fn stored(records: &[(u64, Stream, &str)]) -> Vec<u8> {
    let mut file = Vec::new();
    for (seq, stream, text) in records {
        let container = ContainerName::parse("main").unwrap();
        Record { seq: *seq, at: Timestamp(1000), stream: *stream, container, bytes: text.as_bytes() }
            .write(&mut file);
    }
    file
}

/// A controller that accepts every submit and answers what `run` asks; the rest is `then`'s.
fn runs(
    broker: &Broker,
    nodes: Vec<Value>,
    logs: impl Fn(usize) -> Value + Send + 'static,
    mut then: impl FnMut(&Bus, &Request) + Send + 'static,
) -> Controller {
    let mut asked = 0;
    Controller::start(broker, move |bus, request| {
        match &request {
            Request::Submit { job, payload } => bus.accept(job, None, payload, 1),
            Request::Query { client, id, query: Query::Nodes { .. } } => {
                bus.reply(client, id, json!({"rows": nodes}))
            }
            Request::Query { client, id, query: Query::Logs { .. } } => {
                asked += 1;
                bus.reply(client, id, logs(asked));
            }
            _ => {}
        }
        then(bus, &request);
    })
}

#[test]
fn run_shows_each_record_once_in_order_and_ends_with_the_jobs_code() {
    let broker = Broker::start();
    let _controller = runs(
        &broker,
        vec![this_node()],
        |_| sources(json!([]), false, no_depot()),
        |bus, request| {
            let Request::Submit { job, payload } = request else { return };
            let spec: Value = serde_json::from_slice(payload).unwrap();
            assert_eq!((&spec["image"], &spec["command"]), (&json!("host"), &json!(["sh", "-c", "exit 3"])));
            assert_eq!(spec.get("workspace"), None);
            let name = format!("{job}-0");
            for (seq, stream, text) in [
                (2, "stderr", "two\n"),
                (1, "stdout", "one\n"),
                (2, "stderr", "two\n"),
                (4, "stdout", "four"),
                (3, "stdout", "three\n"),
            ] {
                bus.log(&name, 1, seq, stream, text);
            }
            bus.status(&status(job.as_str(), 1, "Failed", json!([pod(&name, 1, "Failed", 3, 4)])));
        },
    );
    let ended = output(&broker, &["run", "--", "sh", "-c", "exit 3"]);
    assert_eq!(ended, Ended { code: 3, out: "one\nthree\nfour".into(), err: "two\n".into() });
}

#[test]
fn what_was_lost_on_the_way_comes_from_the_depot() {
    let (broker, depot) = (Broker::start(), Depot::start());
    let file =
        stored(&[(1, Stream::Stdout, "one\n"), (2, Stream::Stdout, "two\n"), (3, Stream::Stderr, "three\n")]);
    depot.files.lock().unwrap().insert("/v1/logs/u1/0/1".into(), file);
    let access = depot.access();
    let logs = move |asked| {
        let source = json!([{"pod": "j-0", "epoch": 1, "records": 3, "stored": "v1/logs/u1/0/1"}]);
        if asked == 1 {
            sources(json!([]), false, access.clone())
        } else {
            sources(source, true, access.clone())
        }
    };
    let _controller = runs(&broker, vec![this_node()], logs, |bus, request| {
        if let Request::Submit { job, .. } = request {
            bus.log("j-0", 1, 1, "stdout", "one\n");
            bus.log("j-0", 1, 3, "stderr", "three\n");
            bus.status(&status(job.as_str(), 1, "Succeeded", json!([pod("j-0", 1, "Succeeded", 0, 3)])));
        }
    });
    let ended = output(&broker, &["run", "--name", "j", "--", "x"]);
    assert_eq!(ended, Ended { code: 0, out: "one\ntwo\n".into(), err: "three\n".into() });
}

#[test]
fn an_evicted_pod_is_followed_to_its_next_epoch() {
    let broker = Broker::start();
    let logs = |_| {
        let sources_ = json!([{"pod": "j-0", "epoch": 1, "records": 1}, {"pod": "j-0", "epoch": 2}]);
        sources(sources_, false, no_depot())
    };
    let _controller = runs(&broker, vec![this_node()], logs, |bus, request| {
        if let Request::Submit { job, .. } = request {
            bus.log("j-0", 2, 1, "stdout", "second\n");
            bus.log("j-0", 1, 1, "stdout", "first\n");
            bus.status(&status(job.as_str(), 1, "Succeeded", json!([pod("j-0", 2, "Succeeded", 0, 1)])));
        }
    });
    let ended = output(&broker, &["run", "--name", "j", "--", "x"]);
    assert_eq!(ended, Ended { code: 0, out: "first\nsecond\n".into(), err: String::new() });
}

#[test]
fn a_new_generation_shows_nothing_of_the_one_before() {
    let broker = Broker::start();
    let nodes = json!({"rows": [this_node()]});
    let controller = Controller::start(&broker, move |bus, request| match request {
        Request::Submit { job, payload } => {
            bus.accept(&job, None, &payload, 2);
            bus.log("j-0", 1, 1, "stdout", "old\n");
            bus.log("j-0", 2, 1, "stdout", "new\n");
            bus.status(&status("j", 2, "Succeeded", json!([pod("j-0", 2, "Succeeded", 0, 1)])));
        }
        Request::Query { client, id, query: Query::Nodes { .. } } => bus.reply(&client, &id, nodes.clone()),
        Request::Query { client, id, .. } => {
            let list = json!([{"pod": "j-0", "epoch": 1, "records": 1}, {"pod": "j-0", "epoch": 2}]);
            bus.reply(&client, &id, sources(list, false, no_depot()));
        }
        Request::Command { .. } => {}
    });
    controller.bus.status(&status("j", 1, "Failed", json!([pod("j-0", 1, "Failed", 9, 1)])));
    let ended = output(&broker, &["run", "--name", "j", "--", "x"]);
    assert_eq!(ended, Ended { code: 0, out: "new\n".into(), err: String::new() });
}

#[test]
fn ctrl_c_cancels_and_a_second_one_leaves() {
    let broker = Broker::start();
    let (tx, rx) = mpsc::channel();
    let (obey, cancelled) = (Arc::new(AtomicBool::new(true)), Arc::new(AtomicBool::new(false)));
    let (obeys, is_cancelled, over) = (obey.clone(), cancelled.clone(), cancelled.clone());
    let _controller = runs(
        &broker,
        vec![this_node()],
        move |_| sources(json!([]), over.load(Ordering::SeqCst), no_depot()),
        move |bus, request| match request {
            Request::Submit { job, .. } => {
                bus.status(&status(job.as_str(), 1, "Running", json!([])));
                bus.log(&format!("{job}-0"), 1, 1, "stdout", "up\n");
            }
            Request::Command { job, command, payload } => {
                assert_eq!(command.command, JobVerb::Cancel);
                bus.accept(job, command.id.clone(), payload, 1);
                if obeys.load(Ordering::SeqCst) {
                    is_cancelled.store(true, Ordering::SeqCst);
                    bus.status(&status(job.as_str(), 1, "Cancelled", json!([])));
                }
                tx.send(()).unwrap();
            }
            Request::Query { client, id, query: Query::Job { .. } } => {
                let mut detail = status("j", 1, "Running", json!([]));
                detail["spec"] = json!({});
                bus.reply(client, id, detail);
            }
            _ => {}
        },
    );
    for second in [false, true] {
        obey.store(!second, Ordering::SeqCst);
        cancelled.store(false, Ordering::SeqCst);
        let mut child = berth(&broker, &["run", "--", "x"])
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut first = [0; 3];
        std::io::Read::read_exact(child.stdout.as_mut().unwrap(), &mut first).unwrap();
        assert_eq!(&first, b"up\n");
        let interrupt = || {
            assert!(
                std::process::Command::new("kill")
                    .args(["-INT", &child.id().to_string()])
                    .status()
                    .unwrap()
                    .success()
            )
        };
        interrupt();
        rx.recv_timeout(DEADLINE).unwrap();
        if second {
            interrupt();
        }
        let ended = Ended::of(child.wait_with_output().unwrap());
        assert_eq!(ended.code, 130, "{ended:?}");
        assert!(ended.err.contains("cancelling job default/"), "{ended:?}");
        assert_eq!(ended.err.contains("left job"), second, "{ended:?}");
    }
}

#[test]
fn a_job_outlives_a_broker_restart_under_run() {
    let broker = Broker::start();
    let port = broker.port();
    let (tx, rx) = mpsc::channel();
    let logs = |_| sources(json!([{"pod": "j-0", "epoch": 1}]), false, no_depot());
    let handle = move |bus: &Bus, request: &Request| {
        match request {
            Request::Submit { .. } => bus.log("j-0", 1, 1, "stdout", "before\n"),
            // Asked again after the reconnection: now the job has ended.
            Request::Query { query: Query::Logs { .. }, .. } => tx.send(()).unwrap(),
            _ => {}
        }
    };
    let controller = runs(&broker, vec![this_node()], logs, handle);
    let mut child = berth(&broker, &["run", "--name", "j", "--", "x"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut first = [0; 7];
    std::io::Read::read_exact(child.stdout.as_mut().unwrap(), &mut first).unwrap();
    rx.recv_timeout(DEADLINE).unwrap();
    drop(broker);
    let broker = Broker::start_on(port);
    rx.recv_timeout(DEADLINE).unwrap();
    controller.bus.log("j-0", 1, 1, "stdout", "before\n");
    controller.bus.log("j-0", 1, 2, "stdout", "after\n");
    controller.bus.status(&status("j", 1, "Succeeded", json!([pod("j-0", 1, "Succeeded", 0, 2)])));
    let ended = Ended::of(child.wait_with_output().unwrap());
    drop(broker);
    assert_eq!((ended.code, ended.out.as_str()), (0, "after\n"), "{ended:?}");
    assert!(ended.err.contains("lost the broker") && ended.err.contains("the broker is back"), "{ended:?}");
}

#[test]
fn the_directory_goes_along_where_the_job_may_land_elsewhere() {
    let (broker, depot) = (Broker::start(), Depot::start());
    let submitted = Arc::new(Mutex::new(Vec::new()));
    let (specs, access) = (submitted.clone(), depot.access());
    let nodes = vec![this_node(), node("far-away", "far-away", "6.1.0")];
    let _controller = runs(
        &broker,
        nodes,
        |_| sources(json!([]), false, no_depot()),
        move |bus, request| match request {
            Request::Submit { job, payload } => {
                specs.lock().unwrap().push(serde_json::from_slice::<Value>(payload).unwrap());
                bus.status(&status(
                    job.as_str(),
                    1,
                    "Succeeded",
                    json!([pod(&format!("{job}-0"), 1, "Succeeded", 0, 0)]),
                ));
            }
            Request::Query { client, id, query: Query::Depot { .. } } => {
                bus.reply(client, id, access.clone())
            }
            _ => {}
        },
    );
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("train.py"), "print()").unwrap();
    for flags in [&["run", "--", "x"][..], &["run", "--no-workspace", "--", "x"], &["run", "--", "x"]] {
        let ended = output_in(dir.path(), &broker, flags);
        assert_eq!(ended, Ended { code: 0, out: String::new(), err: String::new() });
    }
    let specs = submitted.lock().unwrap();
    let here = dir.path().canonicalize().unwrap();
    assert_eq!(specs[0]["workspace"]["path"], json!(here));
    assert_eq!((specs[1].get("workspace"), &specs[2]["workspace"]), (None, &specs[0]["workspace"]));
    let files = depot.files.lock().unwrap();
    let digest = specs[0]["workspace"]["digest"].as_str().unwrap().strip_prefix("sha256:").unwrap();
    assert_eq!(files.keys().collect::<Vec<_>>(), [&format!("/v1/blobs/{digest}")]);
}

#[test]
fn submit_sends_until_answered_and_tells_every_error() {
    let broker = Broker::start();
    let mut submits = 0;
    let _controller = Controller::start(&broker, move |bus, request| {
        let Request::Submit { job, payload } = request else { return };
        submits += 1;
        match (submits, job.as_str()) {
            // Lost.
            (1, _) => {}
            (_, "refused") => bus.reject(
                &job,
                None,
                &payload,
                json!({"code": "InvalidJob", "message": "the file has errors",
                    "errors": [{"field": "affinity", "line": 2, "column": 11, "message": "no such function `f`"}]}),
            ),
            _ => {
                // Somebody else's answer is not ours.
                bus.accept(&job, None, b"other", 7);
                bus.accept(&job, None, &payload, 1);
            }
        }
    });
    let dir = tempfile::tempdir().unwrap();
    let file = |name: &str, text: &str| {
        let path = dir.path().join(name);
        std::fs::write(&path, text).unwrap();
        path.to_str().unwrap().to_owned()
    };
    let digits = file("Digits.yaml", "image: host\ncommand: [x]\n");
    let start = Instant::now();
    let ended = output(&broker, &["submit", &digits]);
    assert_eq!(
        (ended.code, ended.out.as_str()),
        (0, "job default/digits accepted (generation 1)\n"),
        "{ended:?}"
    );
    assert!(ended.err.contains("sending again") && start.elapsed() >= Duration::from_secs(2), "{ended:?}");

    let json = output(&broker, &["submit", &digits, "-o", "json"]).json();
    assert_eq!(json, json!({"namespace": "default", "job": "digits", "accepted": true, "generation": 1}));

    let refused = file("refused.yaml", "image: host\naffinity: f(x)\n");
    let ended = output(&broker, &["submit", &refused]);
    assert_eq!((ended.code, ended.out.as_str()), (2, ""));
    assert!(
        ended.err.starts_with("berth: ") && ended.err.contains("refused.yaml is not a job file"),
        "{ended:?}"
    );
    assert!(ended.err.contains(":2:11: affinity: no such function `f`\n  2 | affinity: f(x)\n"), "{ended:?}");

    let wrong = file("wrong.yaml", "image: host\ncpus: 2\npriority: x\n");
    let ended = output(&broker, &["submit", &digits, &wrong]);
    assert_eq!((ended.code, ended.out.as_str()), (2, ""), "nothing is sent where one file is wrong");
    assert!(ended.err.contains(":2:1: cpus: ") && ended.err.contains(":3:11: priority: "), "{ended:?}");
}

#[test]
fn wait_ends_with_the_jobs_code() {
    let broker = Broker::start();
    let detail = |job: &str| {
        let pods = |phase: &str, code| json!([pod(&format!("{job}-0"), 1, phase, code, 0)]);
        let mut detail = match job {
            "ok" => status(job, 1, "Succeeded", pods("Succeeded", 0)),
            "three" => status(job, 1, "Failed", pods("Failed", 3)),
            "killed" => status(job, 1, "Failed", pods("Failed", 137)),
            "cancelled" => status(job, 1, "Cancelled", json!([])),
            "never" => status(
                job,
                1,
                "Failed",
                json!([{"pod": "never-0", "epoch": 1, "phase": "Failed", "restarts": 0}]),
            ),
            "large" => status(job, 1, "Failed", pods("Failed", 9)),
            _ => status(job, 1, "Running", json!([])),
        };
        if job == "large" {
            detail["podCounts"] = json!({"Failed": 101});
        }
        detail["spec"] = json!({});
        detail
    };
    let _controller = Controller::start(&broker, move |bus, request| match request {
        Request::Query { client, id, query: Query::Job { job, .. } } if job.as_str() == "missing" => {
            bus.refuse(&client, &id, "NotFound", "there is no job default/missing");
        }
        Request::Query { client, id, query: Query::Job { job, .. } } => {
            bus.reply(&client, &id, detail(job.as_str()));
            if job.as_str() == "later" {
                bus.status(&status("later", 1, "Failed", json!([pod("later-0", 1, "Failed", 4, 0)])));
            }
        }
        Request::Query { client, id, query: Query::Pods { after, .. } } => {
            // The first that failed is on the second page.
            let row = |index: u32, code: u8, second: u32| {
                json!({"namespace": "default", "job": "large", "pod": format!("large-{index}"), "epoch": 1, "phase": "Failed",
                    "exitCode": code, "restarts": 0, "finishedAt": format!("2026-01-01T00:00:0{second}.000Z")})
            };
            let page = match after {
                None => json!({"rows": [row(0, 9, 5)], "next": "large-0"}),
                Some(_) => json!({"rows": [row(1, 8, 2)]}),
            };
            bus.reply(&client, &id, page);
        }
        _ => {}
    });
    for (job, code) in [
        ("ok", 0),
        ("three", 3),
        ("killed", 137),
        ("cancelled", 130),
        ("never", 125),
        ("later", 4),
        ("missing", 125),
        ("large", 8),
    ] {
        let ended = output(&broker, &["wait", job]);
        assert_eq!(ended.code, code, "{job}: {ended:?}");
    }
    let start = Instant::now();
    assert_eq!(output(&broker, &["wait", "running", "--timeout", "300ms"]).code, 124);
    assert!(start.elapsed() < Duration::from_secs(5));
    let ended = output(&broker, &["wait", "three", "-o", "json"]);
    assert_eq!(ended.json(), status("three", 1, "Failed", json!([pod("three-0", 1, "Failed", 3, 0)])));
}

#[test]
fn wait_outlives_a_controller_that_does_not_answer_in_time() {
    let broker = Broker::start();
    let port = broker.port();
    let (tx, rx) = mpsc::channel();
    let mut asked = 0;
    let _controller = Controller::start(&broker, move |bus, request| {
        let Request::Query { client, id, query: Query::Job { .. } } = request else { return };
        asked += 1;
        let mut detail = match asked {
            1 => status("j", 1, "Running", json!([])),
            2..5 => return,
            _ => status("j", 1, "Failed", json!([pod("j-0", 1, "Failed", 4, 0)])),
        };
        detail["spec"] = json!({});
        bus.reply(&client, &id, detail);
        let _ = tx.send(());
    });
    let child = berth(&broker, &["wait", "j", "--request-timeout", "300ms"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    rx.recv_timeout(DEADLINE).unwrap();
    drop(broker);
    std::thread::sleep(Duration::from_millis(500));
    let broker = Broker::start_on(port);
    let ended = Ended::of(child.wait_with_output().unwrap());
    drop(broker);
    assert_eq!(ended.code, 4, "{ended:?}");
    assert_eq!(ended.err.matches("Asking again until there is one").count(), 1, "{ended:?}");
}

#[test]
fn lists_are_exactly_the_protocols_json() {
    let broker = Broker::start();
    // A field of a later version is passed on.
    let mut later = status("a", 1, "Running", json!([]));
    later["fromTheFuture"] = json!({"x": 1});
    let rows = [later, status("b", 1, "Pending", json!([]))];
    let expect = rows.clone();
    let _controller = Controller::start(&broker, move |bus, request| match request {
        Request::Query { client, id, query: Query::Jobs { after, namespace } } => {
            assert_eq!(namespace.unwrap().as_str(), "default");
            let page = match after {
                None => json!({"rows": [rows[0]], "next": "a"}),
                Some(_) => json!({"rows": [rows[1]]}),
            };
            bus.reply(&client, &id, page);
        }
        Request::Query { client, id, .. } => bus.reply(&client, &id, json!({"rows": []})),
        _ => {}
    });
    let ended = output(&broker, &["get", "jobs", "-o", "json"]);
    assert_eq!((ended.json(), ended.err.as_str()), (json!(expect), ""));
    assert_eq!(output(&broker, &["get", "jobs", "-o", "name"]).out, "a\nb\n");
    let yaml: Value = serde_yaml_ng::from_str(&output(&broker, &["get", "jobs", "-o", "yaml"]).out).unwrap();
    assert_eq!(yaml, json!(expect));
    let table = output(&broker, &["get", "jobs"]).out;
    assert!(table.starts_with("NAME  PHASE    PODS"), "{table}");
    assert_eq!(output(&broker, &["get", "nodes", "-o", "json"]).out, "[]\n");
    assert_eq!(
        output(&broker, &["get", "nodes"]),
        Ended { code: 0, out: String::new(), err: "berth: nothing found\n".into() }
    );
    assert_eq!(output(&broker, &["get", "jobs", "-l", "a=b"]).code, 2);
}

#[test]
fn watch_prints_what_changes() {
    let broker = Broker::start();
    let controller = Controller::start(&broker, |bus, request| {
        if let Request::Query { client, id, .. } = request {
            bus.reply(&client, &id, json!({"rows": [status("a", 1, "Pending", json!([]))]}));
        }
    });
    let mut child =
        berth(&broker, &["get", "jobs", "-w", "-o", "json"]).stdout(Stdio::piped()).spawn().unwrap();
    let mut lines = std::io::BufRead::lines(std::io::BufReader::new(child.stdout.take().unwrap()));
    let mut next =
        || serde_json::from_str::<Value>(&lines.next().unwrap().unwrap()).unwrap()["phase"].clone();
    assert_eq!(next(), "Pending");
    // The same again is no change.
    for phase in ["Pending", "Running", "Running", "Succeeded"] {
        controller.bus.status(&status("a", 1, phase, json!([])));
    }
    assert_eq!((next(), next()), (json!("Running"), json!("Succeeded")));
    child.kill().unwrap();
    child.wait().unwrap();
}

#[test]
fn logs_of_several_pods_carry_their_names() {
    let (broker, depot) = (Broker::start(), Depot::start());
    let put = |path: &str, records| depot.files.lock().unwrap().insert(path.into(), stored(records));
    put("/v1/logs/u1/0/1", &[(1, Stream::Stdout, "a\nb"), (2, Stream::Stdout, "c\n")]);
    put("/v1/logs/u1/1/1", &[(1, Stream::Stderr, "x\n")]);
    let access = depot.access();
    let _controller = Controller::start(&broker, move |bus, request| {
        let Request::Query { client, id, .. } = request else { return };
        let list = json!([{"pod": "j-0", "epoch": 1, "records": 2, "stored": "/v1/logs/u1/0/1"},
            {"pod": "j-1", "epoch": 1, "records": 1, "stored": "/v1/logs/u1/1/1"},
            {"pod": "j-2", "epoch": 1}]);
        bus.reply(&client, &id, json!({"sources": list, "finished": false, "many": true, "depot": access}));
        bus.log("j-2", 1, 1, "stdout", "live\n");
    });
    let ended = output(&broker, &["logs", "j"]);
    assert_eq!(ended.err, "j-1 | x\n");
    assert_eq!((ended.code, ended.out.as_str()), (0, "j-0 | a\nj-0 | bc\nj-2 | live\n"));
    assert_eq!(output(&broker, &["logs", "j/0"]).out, "a\nbc\n");
    assert_eq!(output(&broker, &["logs", "j/j-1", "--timestamps"]).err, "1970-01-01T00:00:01.000Z x\n");
    assert_eq!(output(&broker, &["logs", "j", "--stream", "stderr"]).out, "");
}

#[test]
fn commands_are_answered_by_id() {
    let broker = Broker::start();
    let _controller = Controller::start(&broker, |bus, request| {
        let Request::Command { job, command, payload } = request else { return };
        let id = command.id.clone();
        match job.as_str() {
            "done" => {
                bus.reject(&job, id, &payload, json!({"code": "JobFinished", "message": "the job has ended"}))
            }
            _ => bus.accept(&job, id, &payload, 2),
        }
    });
    let ended = output(&broker, &["cancel", "a", "b"]);
    assert_eq!(
        (ended.code, ended.out.as_str()),
        (0, "job default/a is being cancelled\njob default/b is being cancelled\n")
    );
    let ended = output(&broker, &["restart", "done"]);
    assert_eq!(
        (ended.code, ended.err.as_str()),
        (125, "berth: job default/done: JobFinished: the job has ended\n")
    );
}

#[test]
fn outputs_are_copied() {
    let (broker, depot) = (Broker::start(), Depot::start());
    let gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    let mut archive = tar::Builder::new(gzip);
    let mut header = tar::Header::new_gnu();
    header.set_size(1);
    header.set_mode(0o640);
    archive.append_data(&mut header, "srv/model/w", &b"W"[..]).unwrap();
    depot.files.lock().unwrap().insert("/v1/blobs/x".into(), archive.into_inner().unwrap().finish().unwrap());
    let access = depot.access();
    let _controller = Controller::start(&broker, move |bus, request| match request {
        Request::Query { client, id, query: Query::Outputs { .. } } => {
            let digest = format!("sha256:{}", "0".repeat(64));
            let row = json!({"pod": "j-0", "epoch": 1, "digest": digest, "bytes": 100, "path": "v1/blobs/x",
                "at": "2026-01-01T00:00:00.000Z"});
            bus.reply(&client, &id, json!({"rows": [row]}));
        }
        Request::Query { client, id, .. } => bus.reply(&client, &id, access.clone()),
        _ => {}
    });
    let dir = tempfile::tempdir().unwrap();
    let to = dir.path().join("new/dir");
    let ended = output(&broker, &["cp", "j:/srv/model", to.to_str().unwrap()]);
    assert_eq!(ended.code, 0, "{ended:?}");
    let file = to.join("model/w");
    assert_eq!(std::fs::read_to_string(&file).unwrap(), "W");
    assert_eq!(file.metadata().unwrap().permissions().mode() & 0o777, 0o640);
    let ended = output(&broker, &["cp", "j:/srv/other", to.to_str().unwrap()]);
    assert_eq!((ended.code, ended.err.as_str()), (125, "berth: the outputs of j hold no srv/other\n"));
}

#[test]
fn outputs_are_listed_to_the_last_page_and_their_absence_is_explained() {
    let broker = Broker::start();
    let _controller = Controller::start(&broker, |bus, request| match request {
        Request::Query { client, id, query: Query::Outputs { job, after, .. } } => {
            let digest = format!("sha256:{}", "0".repeat(64));
            let row = |pod: &str| {
                json!({"pod": pod, "epoch": 1, "digest": digest, "bytes": 100, "path": "v1/blobs/x",
                    "at": "2026-01-01T00:00:00.000Z"})
            };
            let page = match (job.as_str(), after.as_deref()) {
                ("none", _) => json!({"rows": []}),
                (_, None) => json!({"rows": [row("j-0")], "next": "j-0"}),
                (_, Some(_)) => json!({"rows": [row("j-1")]}),
            };
            bus.reply(&client, &id, page);
        }
        Request::Query { client, id, query: Query::Pods { .. } } => {
            let mut row = pod("none-0", 1, "Succeeded", 0, 1);
            (row["namespace"], row["job"]) = (json!("default"), json!("none"));
            row["message"] = json!("no outputs in the depot: none was there");
            bus.reply(&client, &id, json!({"rows": [row]}));
        }
        _ => {}
    });
    let listed = output(&broker, &["get", "outputs", "j", "-o", "json"]).json();
    assert_eq!((&listed[0]["pod"], &listed[1]["pod"]), (&json!("j-0"), &json!("j-1")));
    let dir = tempfile::tempdir().unwrap();
    let ended = output(&broker, &["cp", "none", dir.path().to_str().unwrap()]);
    let err = "berth: job default/none has no outputs in the depot: none was there\n";
    assert_eq!((ended.code, ended.err.as_str()), (125, err));
}

#[test]
fn who_does_not_answer_is_named() {
    let broker = Broker::start();
    let ended = output(&broker, &["get", "jobs", "--request-timeout", "300ms"]);
    assert_eq!(ended.code, 125);
    assert!(ended.err.contains("no answer from the controller of cluster `default`"), "{ended:?}");
    let url = broker.url();
    drop(broker);
    let other = Broker::start();
    let ended = output(&other, &["get", "jobs", "--broker", &url, "--request-timeout", "300ms"]);
    assert_eq!((ended.code, ended.out.as_str()), (125, ""));
    let line = format!(
        "berth: cannot reach the broker at {url}: connection refused; is berth-controller running? retrying for 300ms\n"
    );
    assert!(ended.err.starts_with(&line), "{ended:?}");
    // A broker that comes up meanwhile is found.
    let late = Broker::start();
    let port = late.port();
    drop(late);
    let mut child = berth(&other, &["version", "--broker", &format!("mqtt://127.0.0.1:{port}")])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut first = [0; 6];
    std::io::Read::read_exact(child.stderr.as_mut().unwrap(), &mut first).unwrap();
    let late = Broker::start_on(port);
    let _controller = Controller::start(&late, |bus, request| {
        if let Request::Query { client, id, .. } = request {
            bus.reply(&client, &id, json!({"version": "9", "cluster": "default"}));
        }
    });
    let ended = Ended::of(child.wait_with_output().unwrap());
    assert!(ended.out.ends_with("berth-controller 9 (cluster default)\n"), "{ended:?}");
}

#[test]
fn runs_one_after_the_other_each_show_their_output() {
    let broker = Broker::start();
    let _controller = runs(
        &broker,
        vec![this_node()],
        |_| sources(json!([]), false, no_depot()),
        |bus, request| {
            if let Request::Submit { job, .. } = request {
                let name = format!("{job}-0");
                bus.log(&name, 1, 1, "stdout", "x\n");
                bus.status(&status(job.as_str(), 1, "Succeeded", json!([pod(&name, 1, "Succeeded", 0, 1)])));
            }
        },
    );
    for _ in 0..30 {
        let ended = output(&broker, &["run", "--", "/bin/echo", "x"]);
        assert_eq!((ended.code, ended.out.as_str()), (0, "x\n"), "{ended:?}");
    }
}
