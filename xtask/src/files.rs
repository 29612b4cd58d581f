//! Manual pages and completions, from the options as the program knows them.

use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result};
use clap_complete::Shell;
use clap_mangen::Man;

/// Writes them below `dist`.
pub(super) fn write_all(dist: &Path) -> Result<()> {
    let [daemon, upgrade, reopen] = lanefsd::cli::commands();
    let (pages, completions) = (dist.join("man"), dist.join("completions"));
    for folder in [&pages, &completions] {
        fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
    }
    for (command, name, see) in [
        (daemon.clone(), "lanefsd", "lanefsd\\-upgrade(8), lanefsd\\-reopen(8), lanefsctl(1)"),
        (upgrade.name("lanefsd-upgrade"), "lanefsd-upgrade", "lanefsd(8)"),
        (reopen.name("lanefsd-reopen"), "lanefsd-reopen", "lanefsd(8)"),
    ] {
        fs::write(pages.join(format!("{name}.8")), page(command, see)?)?;
    }
    fs::write(pages.join("lanefsctl.1"), client_page(lanefsctl::command())?)?;
    for shell in [Shell::Bash, Shell::Zsh, Shell::Fish] {
        clap_complete::generate_to(shell, &mut daemon.clone(), "lanefsd", &completions)?;
        clap_complete::generate_to(shell, &mut lanefsctl::command(), "lanefsctl", &completions)?;
    }
    Ok(())
}

/// The page of `lanefsctl`, with a section for each command in place of a page for each.
fn client_page(client: clap::Command) -> Result<Vec<u8>> {
    // Before it is built, a command has only its own options.
    let sections = client.get_subcommands().map(command_section).collect::<Result<Vec<_>>>()?;
    let page = Man::new(client).section("1").manual("User Commands");
    let mut text = Vec::new();
    page.render_title(&mut text)?;
    page.render_name_section(&mut text)?;
    page.render_synopsis_section(&mut text)?;
    page.render_description_section(&mut text)?;
    page.render_options_section(&mut text)?;
    text.extend_from_slice(b".SH COMMANDS\n");
    text.extend_from_slice(sections.concat().as_bytes());
    text.extend_from_slice(CLIENT_FILES.as_bytes());
    Ok(text)
}

/// A command, without the options that all of them have.
fn command_section(command: &clap::Command) -> Result<String> {
    let name = command.get_name().to_owned();
    let own = command.clone().disable_help_flag(true).disable_version_flag(true);
    let own = own.bin_name(format!("lanefsctl {name}"));
    let has_options = own.get_arguments().next().is_some();
    let page = Man::new(own);
    let (mut synopsis, mut text) = (Vec::new(), Vec::new());
    page.render_synopsis_section(&mut synopsis)?;
    page.render_description_section(&mut text)?;
    if has_options {
        page.render_options_section(&mut text)?;
    }
    let without_headings = |section: Vec<u8>| -> Result<String> {
        let lines = String::from_utf8(section)?;
        Ok(lines.lines().filter(|line| !line.starts_with(".SH")).map(|line| format!("{line}\n")).collect())
    };
    let (synopsis, text) = (without_headings(synopsis)?, without_headings(text)?);
    Ok(format!(".SS {name}\n{synopsis}.PP\n{text}"))
}

fn page(command: clap::Command, see: &str) -> Result<Vec<u8>> {
    let page = Man::new(command).section("8").manual("System administration");
    let mut text = Vec::new();
    page.render(&mut text)?;
    text.extend_from_slice(
        format!("{FILES}.SH \"SEE ALSO\"\n{see}, mount(8), systemd.socket(5)\n").as_bytes(),
    );
    Ok(text)
}

/// The end of the page of `lanefsctl`.
const CLIENT_FILES: &str = "\
.SH FILES
.TP
/run/lanefsd/NAME.ctl
The control socket of the share NAME.
.SH \"SEE ALSO\"
lanefsd(8), lanefsd\\-upgrade(8)
";

/// What the options do not say.
const FILES: &str = "\
.SH FILES
.TP
/etc/lanefsd/NAME.conf
Options of the share NAME, for lanefsd@NAME.socket and lanefsd@NAME.service of systemd.
.TP
/run/lanefsd/NAME.sock
Its socket: systemctl start lanefsd@NAME.socket makes it, and the first connection starts the daemon.
.TP
/usr/share/qemu/vhost\\-user/60\\-lanefsd.json
Tells libvirt of the program.
";
