//! The plug pulled while jobs come, are saved and end, and while a package is being installed; and a machine that begins
//! anew without a controller. What was told before is true afterwards.
//!
//! `BERTH_VM_SEED` says when the plug is pulled, as a run that failed has printed it; `BERTH_VM_CUTS` how often.

use std::io::{BufRead, BufReader};
use std::process::{Child, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::thread::JoinHandle;
use std::time::Duration;

use serde_json::{Value, json};

use super::machine::{Machine, missing, skip};

/// After all is under way, at most.
const CUT_MS_MAX: u64 = 20_000;
/// Until its volume says that it is to end.
const TICKS: &str = "i=0; until [ -e /told/end ]; do i=$((i+1)); echo $i; sleep 0.1; done";
const SHORT: u32 = 5;

/// What goes on within until the power is cut: a script that says a line for each thing that is done.
struct Work {
    child: Child,
    reader: JoinHandle<()>,
    lines: Receiver<String>,
    said: Vec<String>,
}

impl Work {
    /// Once it has said its first line.
    fn begin(machine: &Machine, script: &str) -> Self {
        let mut command = machine.command(300, "exec", &["sh", "-c", script]);
        let mut child =
            command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().expect("tests/vm/vm starts");
        let stdout = child.stdout.take().expect("it is piped");
        let (sender, lines) = channel();
        // A line that the cut has torn says nothing.
        let reader = std::thread::spawn(move || {
            let (mut stdout, mut line) = (BufReader::new(stdout), String::new());
            while stdout.read_line(&mut line).is_ok() && line.ends_with('\n') {
                let _ = sender.send(line.trim().to_owned());
                line.clear();
            }
        });
        let first = lines.recv_timeout(Duration::from_secs(120));
        let first = first.unwrap_or_else(|_| panic!("nothing is done: {script}\n{}", machine.journal()));
        Self { child, reader, lines, said: vec![first] }
    }

    /// All that it has said, once the machine is dead.
    fn end(mut self) -> Vec<String> {
        let _ = self.child.wait();
        let _ = self.reader.join();
        self.said.extend(self.lines.try_iter());
        self.said
    }
}

fn numbers(last: usize) -> String {
    (1..=last).map(|n| format!("{n}\n")).collect()
}

/// A pod without checkpoints that was begun anew, perhaps: each time it counts from 1, with no gap and nothing twice.
fn counted_anew(log: &str) -> Vec<usize> {
    let mut runs: Vec<usize> = Vec::new();
    for line in log.lines() {
        let number: usize = line.parse().unwrap_or_else(|_| panic!("{line:?} in {log}"));
        match runs.last_mut() {
            Some(last) if number == *last + 1 => *last = number,
            _ if number == 1 => runs.push(1),
            _ => panic!("{number} comes out of turn: {log}"),
        }
    }
    runs
}

fn expected(number: &str) -> u32 {
    number.parse::<u32>().expect("a number") % 3 * 3
}

fn number_of(variable: &str) -> Option<u64> {
    std::env::var(variable)
        .ok()
        .map(|text| text.parse().unwrap_or_else(|_| panic!("{variable} is no number")))
}

#[test]
fn a_power_cut_takes_nothing_that_was_told() {
    if let Some(why) = missing() {
        return skip(&why);
    }
    let seed = number_of("BERTH_VM_SEED").unwrap_or_else(|| fastrand::u64(..100_000));
    println!("BERTH_VM_SEED={seed}");
    let mut random = fastrand::Rng::with_seed(seed);
    let machine = Machine::installed();
    machine.begin_cluster();
    machine.install_criu();
    machine.sh("sync");
    for round in 1..=number_of("BERTH_VM_CUTS").unwrap_or(1) {
        cut(&machine, round, random.u64(..CUT_MS_MAX));
    }
    goes_on_alone(&machine, random.u64(..CUT_MS_MAX));
    machine.vm(120, "stop", &[]);
}

fn cut(machine: &Machine, round: u64, after_ms: u64) {
    let (saved, plain) = (format!("saved-{round}"), format!("plain-{round}"));
    machine.submit(&saved, TICKS);
    machine.submit(&plain, TICKS);
    let short = json!({
        "name": format!("short-{round}-NUMBER"), "image": "host", "network": "none",
        "command": ["sh", "-c", format!("for n in $(seq {SHORT}); do echo $n; sleep 0.2; done; exit CODE")],
        "resources": {"cpu": "0.1", "memory": "32Mi"},
    });
    machine.sh(&format!("cat >/root/short.json <<'END'\n{short}\nEND"));

    let saves = format!("while :; do berth checkpoint {saved} -o name || :; done");
    // Of two jobs at a time: an emulated machine has its hands full.
    let jobs = format!(
        "i=0; while i=$((i+1)); do \
         sed \"s/NUMBER/$i/; s/CODE/$((i % 3 * 3))/\" /root/short.json | berth submit - >/dev/null && echo accepted $i; \
         j=$((i-1)); [ $j = 0 ] || {{ berth wait short-{round}-$j >/dev/null 2>&1; echo ended $j $?; }}; done"
    );
    let upgrades =
        "echo begun; while dpkg -i /root/packages/berth-agent_*.deb >/dev/null 2>&1; do echo installed; done";
    let work = [&jobs, &saves, upgrades].map(|script| Work::begin(machine, script));
    std::thread::sleep(Duration::from_millis(after_ms));
    machine.vm(60, "powercut", &[]);
    let [jobs, stored, installed] = work.map(Work::end);
    let those = |verb: &str| jobs.iter().filter_map(|line| line.strip_prefix(verb)).collect::<Vec<_>>();
    let (accepted, ended) = (those("accepted "), those("ended "));
    println!(
        "round {round}: cut {after_ms} ms after all had begun; told: {} checkpoints, {} upgrades, {jobs:?}",
        stored.len(),
        installed.len() - 1
    );
    println!("boot after a power cut: {} s", machine.vm(600, "start", &[]).trim());

    // dpkg itself goes on with a package only that it had unpacked.
    let whole = "dpkg --audit; dpkg --configure -a || :; dpkg -i /root/packages/berth-agent_*.deb; \
                 test -z \"$(dpkg --audit)\"";
    println!("{}", machine.vm(300, "exec", &["sh", "-ec", whole]));
    machine.until_online();
    println!("{}", machine.sh("berth-controller fsck"));

    let all = accepted.join(" ");
    let wait = format!(
        "for i in {all}; do berth wait short-{round}-$i --timeout 100s >/dev/null 2>&1; echo $i $?; done"
    );
    let codes = machine.vm(400, "exec", &["sh", "-c", &wait]);
    let expect: String = accepted.iter().map(|number| format!("{number} {}\n", expected(number))).collect();
    assert_eq!(codes, expect, "{}", machine.journal());
    for number in &accepted {
        let told = ended.iter().find_map(|line| line.strip_prefix(&format!("{number} ")));
        let log = machine.sh(&format!("berth logs short-{round}-{number}"));
        let runs = counted_anew(&log);
        assert_eq!(runs.last(), Some(&(SHORT as usize)), "{log}");
        if let Some(code) = told {
            assert_eq!(
                (code.parse(), runs.len()),
                (Ok(expected(number)), 1),
                "job {number} had ended: {log}"
            );
        }
    }

    let last = stored.last().expect("one is told before the cut");
    let kept = machine.sh("berth get checkpoints -o json");
    assert!(kept.contains(last), "checkpoint {last} was told: {kept}");
    for name in [&saved, &plain] {
        machine.sh(&format!("touch /var/lib/berth/agent/volumes/default/{name}/told/end"));
        let job = machine.succeeded(name);
        assert_eq!((&job["evictions"], &job["failures"]), (&1.into(), &0.into()), "{job:#}");
    }
    let log = machine.sh(&format!("berth logs {saved}"));
    assert_eq!(log, numbers(log.lines().count()));
    assert!(counted_anew(&machine.sh(&format!("berth logs {plain}"))).len() <= 2);
    // What was torn is in the depot as well, as far as it goes.
    machine.until("no pod is left on the node", "! ls /var/lib/berth/agent/pods | grep .");
}

/// The power is cut, and only the machine comes back: its pod goes on from the checkpoint that was told last, then from one
/// that the node has taken on its own.
fn goes_on_alone(machine: &Machine, after_ms: u64) {
    machine.submit_with(
        "alone",
        TICKS,
        json!({"checkpoint": {"mode": "criu", "interval": "10s"}, "onDisconnect": {"do": "continue"}}),
    );
    let job: Value = serde_json::from_str(&machine.sh("berth describe job alone -o json")).expect("JSON");
    let pod = format!("cd /var/lib/berth/agent/pods/{}-0.1", job["uid"].as_str().expect("a uid"));
    let ticks = format!("{pod}; cat log/*.log | grep -axE '[0-9]+' | tail -n 1");
    let goes_on = |before: &str| {
        println!("boot without a controller: {} s", machine.vm(600, "start", &[]).trim());
        machine.until("it goes on", &format!("[ $({ticks}) -gt {before} ]"));
        machine.sh("! systemctl is-active --quiet berth-controller");
    };
    machine.sh("systemctl disable berth-controller; sync");
    let before = machine.sh(&format!("berth checkpoint alone >&2; {ticks}"));
    machine.vm(60, "powercut", &[]);
    println!("alone: cut when it was saved and had counted to {}", before.trim());
    goes_on(before.trim());

    // Checkpoints of the node's own have numbers above 2^32.
    machine.until("it is saved by its node", &format!("{pod}; ls checkpoints/??????????*/manifest.json"));
    let before = machine.sh(&ticks);
    std::thread::sleep(Duration::from_millis(after_ms));
    machine.vm(60, "powercut", &[]);
    println!("alone: cut {after_ms} ms after its node had saved it and it had counted to {}", before.trim());
    goes_on(before.trim());

    machine.sh("systemctl enable --now berth-controller");
    machine.until_online();
    machine.sh("touch /var/lib/berth/agent/volumes/default/alone/told/end");
    let job = machine.succeeded("alone");
    assert_eq!((&job["evictions"], &job["failures"]), (&2.into(), &0.into()), "{job:#}");
    assert_eq!(job["pods"][0]["epoch"], 1, "{job:#}");
    let log = machine.sh("berth logs alone");
    assert_eq!(log, numbers(log.lines().count()));
    assert!(log.lines().count() > before.trim().parse().expect("a number"), "{log}");
}
