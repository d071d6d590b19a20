//! What describes the command to others: manual pages and the shells' completions, both made from its own description.

use std::io::{self, Write};

use anyhow::{Context, Result};
use clap::Command;
use clap_complete::Shell;
use clap_mangen::Man;
use vfio_user_blk::config::Cli;

use crate::exit;

const NAME: &str = "vfio-user-blk";

/// Prints the script that a shell reads.
pub(crate) fn completions(shell: Shell) -> Result<()> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::words(), NAME, &mut script);
    print(&script)
}

/// Prints the page of a subcommand, or of the command as a whole.
pub(crate) fn page(subcommand: Option<&str>) -> Result<()> {
    print(&render(subcommand)?)
}

fn render(subcommand: Option<&str>) -> Result<Vec<u8>> {
    let mut root = Cli::words();
    root.build();
    let command = match subcommand {
        None => root.name(NAME),
        Some(name) => {
            let names = || root.get_subcommands().map(Command::get_name).collect::<Vec<_>>().join(", ");
            let found = root.find_subcommand(name);
            let found = found.with_context(|| format!("there is no command {name:?}; there are {}", names()))?;
            found.clone()
        }
    };
    let mut page = Vec::new();
    Man::new(command).render(&mut page).context("cannot write the page")?;
    writeln!(page, ".SH \"EXIT STATUS\"")?;
    for (status, meaning) in exit::MEANINGS {
        writeln!(page, ".TP\n\\fB{status}\\fR\n{meaning}")?;
    }
    Ok(page)
}

fn print(bytes: &[u8]) -> Result<()> {
    let mut out = io::stdout().lock();
    out.write_all(bytes).and_then(|()| out.flush()).context("cannot write to standard output")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_command_has_a_page() {
        let root = String::from_utf8(render(None).unwrap()).unwrap();
        for command in Cli::words().get_subcommands() {
            let name = command.get_name();
            let page = String::from_utf8(render(Some(name)).unwrap()).unwrap();
            assert!(page.contains(&format!("vfio\\-user\\-blk\\-{name}")), "{page}");
            assert!(page.contains("EXIT STATUS") && page.contains("78"));
            assert!(root.contains(&format!("\\-{name}(1)")), "{root}");
        }
        let serve = String::from_utf8(render(Some("serve")).unwrap()).unwrap();
        assert!(serve.contains("\\-\\-queue\\-size") && serve.contains("power of two"), "{serve}");
        assert!(render(Some("srve")).unwrap_err().to_string().contains("serve"));
    }
}
