//! Completion scripts and the manual's pages, both made from the command line's own definition.

use std::path::Path;

use anyhow::Context as _;
use clap::{Command, CommandFactory as _};
use clap_complete::Shell;

use super::command::Cli;

pub fn completion(shell: Shell) -> anyhow::Result<u8> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "berth", &mut script);
    std::io::Write::write_all(&mut std::io::stdout(), &script)?;
    Ok(0)
}

/// Writes `berth.1` and a page for every verb.
pub fn man(dir: &Path) -> anyhow::Result<u8> {
    std::fs::create_dir_all(dir).with_context(|| format!("cannot make {}", dir.display()))?;
    let mut command = Cli::command();
    command.build();
    page(dir, &command, "berth")?;
    Ok(0)
}

fn page(dir: &Path, command: &Command, name: &str) -> anyhow::Result<()> {
    let command = command.clone().display_name(name.to_owned());
    let mut text = Vec::new();
    clap_mangen::Man::new(command.clone()).title(name.to_owned()).render(&mut text)?;
    let path = dir.join(format!("{name}.1"));
    std::fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))?;
    for verb in command.get_subcommands().filter(|verb| !verb.is_hide_set()) {
        page(dir, verb, &format!("{name}-{}", verb.get_name()))?;
    }
    Ok(())
}
