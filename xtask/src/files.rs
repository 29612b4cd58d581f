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
        (daemon.clone(), "lanefsd", "lanefsd\\-upgrade(8), lanefsd\\-reopen(8)"),
        (upgrade.name("lanefsd-upgrade"), "lanefsd-upgrade", "lanefsd(8)"),
        (reopen.name("lanefsd-reopen"), "lanefsd-reopen", "lanefsd(8)"),
    ] {
        fs::write(pages.join(format!("{name}.8")), page(command, see)?)?;
    }
    for shell in [Shell::Bash, Shell::Zsh, Shell::Fish] {
        clap_complete::generate_to(shell, &mut daemon.clone(), "lanefsd", &completions)?;
    }
    Ok(())
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
