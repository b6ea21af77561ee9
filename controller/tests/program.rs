//! The program itself: what it says to the service manager, to signals, and to somebody who gets it wrong.

mod common;

use std::os::unix::net::UnixDatagram;
use std::process::{Child, Command, Output, Stdio};

use common::*;

fn controller() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_berth-controller"));
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).env_remove("BERTH_BROKER");
    command
}

fn says(output: &Output, text: &str) {
    let err = String::from_utf8_lossy(&output.stderr);
    assert!(err.contains(text), "`{text}` is not in\n{err}");
}

struct Running(Option<Child>);

impl Running {
    fn start(command: &mut Command) -> Self {
        Self(Some(command.spawn().unwrap()))
    }

    fn terminate(mut self) -> Output {
        let child = self.0.take().unwrap();
        // SAFETY: signals the child that this test started and has not waited for.
        unsafe { libc::kill(child.id().cast_signed(), libc::SIGTERM) };
        child.wait_with_output().unwrap()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Some(child) = &mut self.0 {
            let _ = child.kill();
        }
    }
}

#[test]
fn it_is_a_good_service() {
    let dir = tempfile::tempdir().unwrap();
    let socket = UnixDatagram::bind(dir.path().join("notify")).unwrap();
    socket.set_read_timeout(Some(DEADLINE)).unwrap();
    let heard = || {
        let mut state = [0; 64];
        let bytes = socket.recv(&mut state).unwrap();
        String::from_utf8_lossy(&state[..bytes]).into_owned()
    };
    let data = dir.path().join("data");
    let flags = ["--dev", "--listen-mqtt=127.0.0.1:0", "--listen-http=127.0.0.1:0", "--data-dir"];
    let mut command = controller();
    command
        .args(flags)
        .arg(&data)
        .env("NOTIFY_SOCKET", dir.path().join("notify"))
        .env("WATCHDOG_USEC", "200000");
    let running = Running::start(command.env("JOURNAL_STREAM", "1:2"));
    assert_eq!(heard(), "READY=1");
    assert_eq!(heard(), "WATCHDOG=1");

    let second = controller().args(flags).arg(&data).output().unwrap();
    assert_eq!(second.status.code(), Some(1));
    says(&second, "in use by another berth-controller");

    let output = running.terminate();
    assert!(output.status.success());
    says(&output, " INFO started");
    assert!(String::from_utf8_lossy(&output.stderr).starts_with(" WARN --dev"), "the journal knows the time");
    while heard() != "STOPPING=1" {}
}

#[test]
fn a_mistake_is_one_sentence_and_code_2() {
    let output = controller().output().unwrap();
    assert_eq!(output.status.code(), Some(2));
    says(&output, "who may connect?");
    let output = controller().args(["--dev", "--listen-mqtt=0.0.0.0:1"]).output().unwrap();
    assert_eq!(output.status.code(), Some(2));
    says(&output, "not on loopback");
    let output = controller().args(["--clustre=x"]).output().unwrap();
    assert_eq!(output.status.code(), Some(2));
    says(&output, "--cluster");
}

#[test]
fn help_has_examples() {
    let output = controller().arg("--help").output().unwrap();
    assert!(output.status.success());
    let help = String::from_utf8_lossy(&output.stdout).into_owned();
    for text in ["berth-controller --dev", "--listen-mqtt", "BERTH_LISTEN_HTTP", "/var/lib/berth/controller"]
    {
        assert!(help.contains(text), "{help}");
    }
}

#[test]
fn variables_go_before_defaults_and_behind_flags() {
    let mut command = controller();
    command.env("BERTH_CLUSTER", "NOT-A-NAME").arg("--dev");
    says(&command.output().unwrap(), "cluster `NOT-A-NAME`");
    says(&command.arg("--cluster=ALSO-NOT").output().unwrap(), "cluster `ALSO-NOT`");
}
