//! Many processes make, change, link, rename and remove files at random, each in a directory of its own, and know what
//! every call has to return and what every file has to hold.
//!
//! The same seed leaves the same tree: a share can be compared with a directory of the host on which this
//! program has run, too.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::ErrorKind;
use std::os::unix::fs::{FileExt, PermissionsExt, symlink};
use std::path::PathBuf;

use anyhow::{Context, Result, bail, ensure};
use clap::Parser;
use lanefsd_guest_tools::{Rng, Writers, fill, wait_for_start};
use rustix::fs::{CWD, FallocateFlags, FlockOperation, RenameFlags, fallocate, flock, renameat_with};

/// Names in a directory.
const NAMES: u64 = 40;
/// Most bytes of a file.
const MOST: u64 = 200_000;

#[derive(Parser)]
#[command(about)]
struct Options {
    /// Where the directories of the processes are made
    directory: PathBuf,
    /// Processes
    #[arg(long, default_value_t = 4)]
    writers: u64,
    /// Steps of each
    #[arg(long, default_value_t = 1000)]
    steps: u64,
    /// Seed of the random choices
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Do the part of one process
    #[arg(long, hide = true)]
    one: Option<u64>,
}

/// What a name stands for.
#[derive(Clone)]
enum Node {
    /// One of the files, which may have further names.
    File(usize),
    Directory,
    Link(String),
}

struct Churn {
    home: PathBuf,
    rng: Rng,
    names: BTreeMap<String, Node>,
    /// What files hold, also those that are gone.
    files: Vec<Vec<u8>>,
    writer: u64,
}

fn main() -> Result<()> {
    let options = Options::parse();
    let Some(writer) = options.one else { return Writers::spawn(options.writers)?.run() };
    let home = options.directory.join(format!("churn-{writer}"));
    let rng = Rng::new(options.seed.wrapping_mul(1_000_003).wrapping_add(writer));
    let mut churn = Churn { home, rng, names: BTreeMap::new(), files: Vec::new(), writer };
    wait_for_start()?;
    fs::create_dir(&churn.home).with_context(|| format!("{} cannot be made", churn.home.display()))?;
    for step in 0..options.steps {
        churn.step().with_context(|| format!("process {writer}, step {step}"))?;
    }
    churn.check_all().with_context(|| format!("process {writer}, at the end"))
}

impl Churn {
    fn step(&mut self) -> Result<()> {
        let name = format!("n{}", self.rng.below(NAMES));
        let other = format!("n{}", self.rng.below(NAMES));
        match (self.rng.below(20), self.names.get(&name).cloned()) {
            (0..9, None) => self.create(&name),
            (9..11, None) => self.make_directory(&name),
            (11..13, None) => self.make_link(&name),
            (13..15, None) => self.unnamed(&name),
            (_, None) => self.expect_missing(&name),
            (0..5, Some(Node::File(file))) => self.write(&name, file),
            (5..7, Some(Node::File(file))) => self.truncate(&name, file),
            (7..9, Some(Node::File(file))) => self.append(&name, file),
            (9, Some(Node::File(file))) => self.punch(&name, file),
            (10, Some(Node::File(file))) => self.link(&name, file, &other),
            (11..13, Some(node @ Node::File(_))) => self.rename(&name, node, &other),
            (13, Some(node)) => self.exchange(&name, node, &other),
            (14..16, Some(node)) => self.remove(&name, &node),
            (16, Some(_)) => self.list(),
            (17, Some(_)) => self.expect_exclusive(&name),
            (_, Some(node)) => self.check(&name, &node),
        }
        .with_context(|| format!("{name} (the other one was {other})"))
    }

    fn path(&self, name: &str) -> PathBuf {
        self.home.join(name)
    }

    /// Some bytes that no other write has.
    fn bytes(&mut self, most: u64) -> Vec<u8> {
        let len = usize::try_from(1 + self.rng.below(most)).unwrap_or(1);
        let mut data = vec![0; len];
        let place = self.rng.below(1 << 40);
        fill(&mut data, self.writer, place);
        data
    }

    fn open(&self, name: &str) -> Result<File> {
        File::options().read(true).write(true).open(self.path(name)).context("opening failed")
    }

    fn create(&mut self, name: &str) -> Result<()> {
        let file =
            File::options().write(true).create_new(true).open(self.path(name)).context("creating failed")?;
        let data = self.bytes(30_000);
        file.write_all_at(&data, 0).context("writing a new file failed")?;
        self.names.insert(name.into(), Node::File(self.files.len()));
        self.files.push(data);
        Ok(())
    }

    fn make_directory(&mut self, name: &str) -> Result<()> {
        fs::create_dir(self.path(name)).context("mkdir failed")?;
        self.names.insert(name.into(), Node::Directory);
        Ok(())
    }

    fn make_link(&mut self, name: &str) -> Result<()> {
        let target = format!("target-{}", self.rng.below(1000));
        symlink(&target, self.path(name)).context("symlink failed")?;
        self.names.insert(name.into(), Node::Link(target));
        Ok(())
    }

    /// A file that is used after its only name has gone.
    fn unnamed(&mut self, name: &str) -> Result<()> {
        let file = File::options().read(true).write(true).create_new(true).open(self.path(name))?;
        let data = self.bytes(20_000);
        file.write_all_at(&data, 0).context("writing failed")?;
        fs::remove_file(self.path(name)).context("unlink failed")?;
        flock(&file, FlockOperation::LockExclusive).context("flock failed")?;
        let mut found = vec![0; data.len()];
        file.read_exact_at(&mut found, 0).context("reading an unlinked file failed")?;
        ensure!(found == data, "an unlinked file holds something else");
        Ok(())
    }

    fn expect_missing(&self, name: &str) -> Result<()> {
        for error in [fs::metadata(self.path(name)).err(), fs::remove_file(self.path(name)).err()] {
            ensure!(error.is_some_and(|error| error.kind() == ErrorKind::NotFound), "it is there");
        }
        Ok(())
    }

    fn expect_exclusive(&self, name: &str) -> Result<()> {
        let made = File::options().write(true).create_new(true).open(self.path(name));
        ensure!(made.is_err_and(|error| error.kind() == ErrorKind::AlreadyExists), "it was created again");
        Ok(())
    }

    fn write(&mut self, name: &str, file: usize) -> Result<()> {
        let data = self.bytes(30_000);
        let at = self.rng.below(MOST - 30_000);
        self.open(name)?.write_all_at(&data, at).context("writing failed")?;
        let content = self.content(file)?;
        let (at, end) = (usize::try_from(at)?, usize::try_from(at)? + data.len());
        content.resize(content.len().max(end), 0);
        content.get_mut(at..end).context("the file is too short")?.copy_from_slice(&data);
        Ok(())
    }

    fn append(&mut self, name: &str, file: usize) -> Result<()> {
        let data = self.bytes(3000);
        let mut options = File::options();
        let mut opened = options.append(true).open(self.path(name)).context("opening failed")?;
        std::io::Write::write_all(&mut opened, &data).context("appending failed")?;
        self.content(file)?.extend_from_slice(&data);
        Ok(())
    }

    fn truncate(&mut self, name: &str, file: usize) -> Result<()> {
        let size = self.rng.below(MOST);
        self.open(name)?.set_len(size).context("truncating failed")?;
        let mode = 0o600 | u32::try_from(self.rng.below(0o100))?;
        fs::set_permissions(self.path(name), fs::Permissions::from_mode(mode)).context("chmod failed")?;
        self.content(file)?.resize(usize::try_from(size)?, 0);
        Ok(())
    }

    fn punch(&mut self, name: &str, file: usize) -> Result<()> {
        let (at, len) = (self.rng.below(MOST), 1 + self.rng.below(50_000));
        let mode = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        fallocate(self.open(name)?, mode, at, len).context("fallocate failed")?;
        let content = self.content(file)?;
        let end = usize::try_from(at + len)?.min(content.len());
        if let Some(hole) = content.get_mut(usize::try_from(at)?..end) {
            hole.fill(0);
        }
        Ok(())
    }

    fn content(&mut self, file: usize) -> Result<&mut Vec<u8>> {
        self.files.get_mut(file).context("no such file")
    }

    fn link(&mut self, name: &str, file: usize, other: &str) -> Result<()> {
        let made = fs::hard_link(self.path(name), self.path(other));
        if self.names.contains_key(other) {
            ensure!(made.is_err_and(|error| error.kind() == ErrorKind::AlreadyExists), "it was linked over");
            return Ok(());
        }
        made.context("link failed")?;
        self.names.insert(other.into(), Node::File(file));
        Ok(())
    }

    /// To a free name, or over a file. One that has both names keeps them.
    fn rename(&mut self, name: &str, node: Node, other: &str) -> Result<()> {
        let renamed = fs::rename(self.path(name), self.path(other));
        match (&node, self.names.get(other)) {
            (_, Some(Node::Directory)) => {
                ensure!(
                    renamed.is_err_and(|error| error.kind() == ErrorKind::IsADirectory),
                    "over a directory"
                );
                return Ok(());
            }
            (Node::File(one), Some(Node::File(two))) if one == two => {
                return renamed.context("rename failed");
            }
            _ => renamed.context("rename failed")?,
        }
        self.names.remove(name);
        self.names.insert(other.into(), node);
        Ok(())
    }

    fn exchange(&mut self, name: &str, node: Node, other: &str) -> Result<()> {
        let Some(there) = self.names.get(other).cloned() else { return self.check(name, &node) };
        renameat_with(CWD, self.path(name), CWD, self.path(other), RenameFlags::EXCHANGE)
            .context("exchanging failed")?;
        self.names.insert(name.into(), there);
        self.names.insert(other.into(), node);
        Ok(())
    }

    fn remove(&mut self, name: &str, node: &Node) -> Result<()> {
        match node {
            Node::Directory => fs::remove_dir(self.path(name)).context("rmdir failed")?,
            Node::File(_) | Node::Link(_) => fs::remove_file(self.path(name)).context("unlink failed")?,
        }
        self.names.remove(name);
        Ok(())
    }

    /// Each name is there once.
    fn list(&self) -> Result<()> {
        let mut found = Vec::new();
        for entry in fs::read_dir(&self.home).context("listing failed")? {
            found.push(entry.context("listing failed")?.file_name().to_string_lossy().into_owned());
        }
        found.sort();
        let known: Vec<String> = self.names.keys().cloned().collect();
        ensure!(found == known, "the directory has {found:?} instead of {known:?}");
        Ok(())
    }

    fn check(&self, name: &str, node: &Node) -> Result<()> {
        let path = self.path(name);
        match node {
            Node::Directory => ensure!(fs::read_dir(&path)?.next().is_none(), "the directory is not empty"),
            Node::Link(target) => ensure!(fs::read_link(&path)?.to_str() == Some(target), "another target"),
            Node::File(file) => {
                let Some(content) = self.files.get(*file) else { bail!("no such file") };
                let found = fs::read(&path).context("reading failed")?;
                let differs = found.iter().zip(content).position(|(one, two)| one != two);
                let (len, want) = (found.len(), content.len());
                ensure!(found == *content, "{len} bytes instead of {want}, different from {differs:?}");
            }
        }
        Ok(())
    }

    fn check_all(&self) -> Result<()> {
        self.list()?;
        self.names.iter().try_for_each(|(name, node)| self.check(name, node).context(name.clone()))
    }
}
