//! The packages on a real host: Debian with systemd as pid 1 and cgroup v2, in a virtual machine (tests/vm/). Few boots
//! for all of it: an emulated machine is ten times slower than this one.

mod cuts;
mod machine;

use machine::{Machine, missing, skip};

#[test]
fn packages_upgrades_and_reboots_on_a_real_host() {
    if let Some(why) = missing() {
        return skip(&why);
    }
    let machine = Machine::installed();

    // Installed, nothing runs before its owner has said who belongs.
    machine.sh("! systemctl is-active --quiet berth-agent berth-controller");
    machine.begin_cluster();
    assert!(machine.exposure("berth-controller") <= 2.0);
    machine.exposure("berth-agent");
    machine.sh(
        "[ $(readlink /proc/1/ns/mnt) = $(readlink /proc/$(systemctl show -P MainPID berth-agent)/ns/mnt) ]",
    );
    assert_eq!(machine.sh("berth run --network none -- sh -c 'echo hello-$((6*7))'"), "hello-42\n");
    // By a BPF program: what a container was not given opens to nobody.
    let device = "mknod /x c 1 11 && echo made; (: </x) 2>/dev/null && echo opened; echo kept";
    assert_eq!(machine.sh(&format!("berth run --network none -- sh -c '{device}'")), "made\nkept\n");
    // An image's root is none of the machine's, and what it writes nobody else's on disk.
    let users =
        "busybox cat /proc/self/uid_map; : >/told/made; busybox stat -c %u /told/made /run/berth/pod.json";
    machine.submit_with(
        "users",
        users,
        serde_json::json!({"image": machine.copy_image(), "checkpoint": {"mode": "none"}}),
    );
    machine.succeeded("users");
    let said = machine.sh("berth logs users");
    let words: Vec<&str> = said.split_whitespace().collect();
    assert!(matches!(words[..], ["0", first, "65536", "0", "0"] if first != "0"), "{said}");
    assert_eq!(machine.sh("stat -c %u /var/lib/berth/agent/volumes/default/users/told/made"), "0\n");

    // The agent is upgraded under a running job, and systemd reads everything anew: the job does not notice.
    machine.submit("long", "i=0; until [ -e /told/end ]; do i=$((i+1)); echo $i; sleep 0.1; done");
    let pids = "systemctl show -P MainPID berth-agent; pgrep -f 'berth-agent shim' | sort -n | head -n 1";
    let before = machine.sh(pids);
    machine.sh("dpkg -i /root/packages/berth-agent_*.deb && systemctl daemon-reload");
    machine.sh("berth get pods | grep -q 'long-0 *Running'");
    let after = machine.sh(pids);
    let (before, after): (Vec<_>, Vec<_>) = (before.lines().collect(), after.lines().collect());
    assert!(before[0] != after[0] && before[1] == after[1], "agent and shim: {before:?}, then {after:?}");
    let bounds = "cat $(find /sys/fs/cgroup/berth -name '*-0.1')/memory.max";
    assert_eq!(machine.sh(bounds), "67108864\n");
    machine.sh("touch /var/lib/berth/agent/volumes/default/long/told/end");
    let job = machine.succeeded("long");
    assert_eq!((&job["evictions"], &job["failures"]), (&0.into(), &0.into()), "{job:#}");
    let log = machine.sh("berth logs long");
    let numbers: String = (1..=log.lines().count()).map(|n| format!("{n}\n")).collect();
    assert_eq!(log, numbers);

    // A reboot is an eviction: both services come back, and the job begins anew (there is no CRIU here) and ends. On
    // its own it would not have: a shutdown waits for a while for pods to leave.
    machine.submit(
        "over",
        "cat /proc/sys/kernel/random/boot_id; [ -e /told/begun ] || { touch /told/begun; sleep 1000; }; echo ended",
    );
    println!("reboot: {} s", machine.vm(400, "reboot", &[]).trim());
    machine.until_online();
    let job = machine.succeeded("over");
    assert_eq!((&job["evictions"], &job["failures"]), (&1.into(), &0.into()), "{job:#}");
    let log = machine.sh("berth logs over");
    let lines: Vec<&str> = log.lines().collect();
    assert!(lines.len() == 3 && lines[0] != lines[1] && lines[2] == "ended", "{log}");

    // Saved, the power cut, booted: it goes on from where it was saved, and its log has no gap and nothing twice.
    machine.install_criu();
    machine.submit("saved", "i=0; until [ -e /told/end ]; do i=$((i+1)); echo $i; sleep 0.1; done");
    let said = machine.sh("berth checkpoint saved");
    println!("{said}");
    machine.vm(60, "powercut", &[]);
    println!("boot after a power cut: {} s", machine.vm(600, "start", &[]).trim());
    machine.until("it goes on", "berth describe job saved -o json | grep -q '\"evictions\": 1' && berth get pods | grep -q 'saved-0 *Running'");
    machine.sh("touch /var/lib/berth/agent/volumes/default/saved/told/end");
    let job = machine.succeeded("saved");
    assert_eq!((&job["evictions"], &job["failures"]), (&1.into(), &0.into()), "{job:#}");
    assert!(job["checkpoint"]["id"].is_string() && job["pods"][0]["message"].is_null(), "{job:#}");
    let log = machine.sh("berth logs saved");
    let numbers: String = (1..=log.lines().count()).map(|n| format!("{n}\n")).collect();
    assert_eq!(log, numbers);
    machine.vm(120, "stop", &[]);
}
