//! `cargo xtask dist`: makes what lanefsd is distributed as, in `target/dist/`: manual pages and completions from the
//! options, and a Debian package for the machine that it runs on.

mod debian;
mod files;

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail};
use clap::Parser;
use rustix::fs::{FlockOperation, flock};

/// Make what lanefsd is distributed as.
#[derive(Debug, Parser)]
#[command(bin_name = "cargo xtask")]
enum Task {
    /// Make manual pages, completions and a Debian package in target/dist/
    Dist {
        /// Package this lanefsd, instead of building one
        #[arg(long, value_name = "FILE")]
        program: Option<PathBuf>,

        /// Package this lanefsctl, instead of building one
        #[arg(long, value_name = "FILE")]
        client: Option<PathBuf>,

        /// Make only manual pages and completions, which takes none of Debian's tools
        #[arg(long, conflicts_with_all = ["program", "client"])]
        pages_only: bool,
    },
}

fn main() -> Result<()> {
    let Task::Dist { program, client, pages_only } = Task::parse();
    let [program, client] = [program, client].map(|path| path.map(std::path::absolute).transpose());
    let (program, client) = (program?, client?);
    let repository = Path::new(env!("CARGO_MANIFEST_DIR")).parent().context("xtask/ is in the repository")?;
    std::env::set_current_dir(repository)?;
    let target =
        std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| repository.join("target"), PathBuf::from);
    let dist = target.join("dist");
    let _lock = locked(&dist)?;
    files::write_all(&dist)?;
    println!("{}", dist.join("man").display());
    println!("{}", dist.join("completions").display());
    if pages_only {
        return Ok(());
    }
    let program = given_or_built(program, &target, "lanefsd")?;
    let client = given_or_built(client, &target, "lanefsctl")?;
    println!("{}", debian::package(&dist, [&program, &client])?.display());
    Ok(())
}

/// Makes the folder, and waits for other processes that work in it: until the file is closed, none begins.
fn locked(folder: &Path) -> Result<File> {
    fs::create_dir_all(folder)?;
    let file = File::create(folder.join(".lock"))?;
    flock(&file, FlockOperation::LockExclusive)?;
    Ok(file)
}

/// The path of a program, which is built if none is given.
fn given_or_built(given: Option<PathBuf>, target: &Path, package: &str) -> Result<PathBuf> {
    if let Some(path) = given {
        return Ok(path);
    }
    run(Command::new("cargo").args(["build", "--release", "--locked", "--package", package]))?;
    Ok(target.join("release").join(package))
}

/// Runs a program, whose failure is an error.
fn run(command: &mut Command) -> Result<()> {
    let status = command.status().with_context(|| format!("cannot run {command:?}"))?;
    if !status.success() {
        bail!("{command:?} has failed: {status}");
    }
    Ok(())
}

/// What a program prints, in one line.
fn output(command: &mut Command) -> Result<String> {
    let output = command.output().with_context(|| format!("cannot run {command:?}"))?;
    if !output.status.success() {
        bail!("{command:?} has failed: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(String::from_utf8(output.stdout)?.trim().to_owned())
}
