//! A real Mosquitto: what starts it.

use std::net::IpAddr;
use std::path::Path;
use std::process::Command;

/// It lets everybody in; its configuration is in `dir`.
pub fn command(address: IpAddr, port: u16, dir: &Path) -> std::io::Result<Command> {
    let config = dir.join("mosquitto.conf");
    let text = format!("listener {port} {address}\nallow_anonymous true\npersistence false\n");
    std::fs::write(&config, text)?;
    let mut command = Command::new("mosquitto");
    command.arg("-c").arg(config);
    Ok(command)
}
