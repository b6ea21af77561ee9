//! `berth-agent doctor`: what this machine lacks for running and saving pods, and how to get it. Changes nothing.

use std::fs;
use std::net::{TcpStream, ToSocketAddrs};
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use berth_protocol::broker::BrokerUrl;

use super::confine;
use super::probe::{criu, cuda, nvidia};
use crate::config::Config;
use crate::shim::cgroup::Layout;
use crate::shim::users;

const CONNECT_MAX: Duration = Duration::from_secs(3);

/// One thing that was looked at: fine, in words; or what is wrong and what to do.
type Finding = (&'static str, Result<String, String>);

/// Prints a line a finding; the code is 1 where anything is missing.
pub fn main(config: anyhow::Result<Config>) -> ExitCode {
    let mut findings = vec![
        ("rights", root()),
        ("control groups", control_groups()),
        ("overlay file system", overlay()),
        ("confinement", confinement()),
        ("memory of GPUs", cuda()),
        ("tar", program("tar", "CRIU and checkpoints need it: install tar")),
        ("gzip", program("gzip", "CRIU needs it for /dev/shm and the like: install gzip")),
    ];
    match config {
        Ok(config) => findings.extend([
            ("criu", criu(&config)),
            // Whoever else might write it keeps the agent from starting.
            ("policy", Ok(config.policy.granted.to_string())),
            ("broker", broker(&config.broker)),
            // The last: it leaves this process's children another clock.
            ("users of pods", users(&config)),
        ]),
        Err(error) => findings.push(("configuration", Err(format!("the agent does not start: {error:#}")))),
    }
    let print = |(what, found): &Finding| match found {
        Ok(fine) => println!("ok       {what}: {fine}"),
        Err(wrong) => println!("missing  {what}: {wrong}"),
    };
    findings.iter().for_each(print);
    if findings.iter().all(|(_, found)| found.is_ok()) { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn root() -> Result<String, String> {
    match nix::unistd::geteuid().is_root() {
        true => Ok("root".to_owned()),
        false => Err("pods are made by root: run the agent as its service does".to_owned()),
    }
}

fn control_groups() -> Result<String, String> {
    match Layout::detect() {
        Ok(Layout::V2) => Ok("version 2".to_owned()),
        Ok(Layout::V1(_)) => Ok("version 1".to_owned()),
        Err(error) => Err(error.to_string()),
    }
}

fn overlay() -> Result<String, String> {
    let known = fs::read_to_string("/proc/filesystems").unwrap_or_default();
    match known.lines().any(|line| line.ends_with("\toverlay")) {
        true => Ok("known to the kernel".to_owned()),
        false => Err("the kernel does not know it (yet): modprobe overlay".to_owned()),
    }
}

fn confinement() -> Result<String, String> {
    match confine::landlock_version() {
        Some(version) => Ok(format!("Landlock, version {version}")),
        None => Err("this kernel has no Landlock that serves (Linux 5.19 and later have, where `lsm=` names it): what reads \
             images reaches more files than its own"
            .to_owned()),
    }
}

fn users(config: &Config) -> Result<String, String> {
    match users::check(&config.data_dir) {
        Ok(()) => Ok("their own, but where docs/security.md says otherwise".to_owned()),
        Err(why) => {
            Err(format!("{why}; root in pods is root of this machine by number, with few of its rights"))
        }
    }
}

fn criu(config: &Config) -> Result<String, String> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(|error| error.to_string())?;
    let program = std::env::current_exe().ok();
    let path = std::env::var("PATH").unwrap_or_default();
    let candidates = criu::candidates(config.criu.as_deref(), program.as_deref(), &path);
    match runtime.block_on(criu::find(&candidates)) {
        Ok(found) => Ok(format!("{} at {}", found.version, found.path.display())),
        Err(error) => Err(format!(
            "{error}; pods run, and cannot be saved; `tests/criu /usr/lib/berth/criu` of berth's sources unpacks one that works"
        )),
    }
}

fn cuda() -> Result<String, String> {
    match cuda::check(Path::new("/proc/self/exe")) {
        Ok(version) => Ok(format!("saved by NVIDIA's driver, CUDA {version}")),
        Err(_) if !nvidia::present(Path::new("/"), None) => Ok("no GPU of NVIDIA's is here".to_owned()),
        Err(why) => {
            Err(format!("{why}; pods with GPUs run, and cannot be saved unless they save themselves"))
        }
    }
}

fn program(name: &str, hint: &str) -> Result<String, String> {
    let path = std::env::var("PATH").unwrap_or_default();
    let found = path.split(':').map(|dir| Path::new(dir).join(name)).find(|path| path.is_file());
    found.map(|path| path.display().to_string()).ok_or_else(|| hint.to_owned())
}

fn broker(url: &BrokerUrl) -> Result<String, String> {
    let mut why = String::new();
    for (host, port) in url.hosts() {
        let addresses =
            (host.as_str(), *port).to_socket_addrs().map_err(|error| format!("{host}: {error}"))?;
        why = format!("{host} has no address");
        for address in addresses {
            match TcpStream::connect_timeout(&address, CONNECT_MAX) {
                Ok(_) => return Ok(format!("reached at {address}")),
                Err(error) => {
                    why = format!("{address}: {error}; is the controller running, and --broker right?");
                }
            }
        }
    }
    Err(why)
}
