//! Holds things that have no name to be found by again, or another one than they were opened by, and uses them again
//! and again until it is told to stop: an unlinked file, a removed directory, a directory read halfway, and so on.
//!
//! It is for tests in which the file server is replaced meanwhile.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::Write;
use std::mem::MaybeUninit;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use clap::{Parser, ValueEnum};
use lanefsd_guest_tools::fill;
use rustix::fs::{Advice, AtFlags, RawDir, SeekFrom, StatxFlags, fadvise, seek, statx};

const SIZE: usize = 256 << 10;
const PIECE: usize = 4096;
const ENTRIES: usize = 400;
const PAUSE: Duration = Duration::from_millis(50);

#[derive(Parser)]
#[command(about)]
struct Options {
    /// A directory of its own, which it makes
    directory: PathBuf,
    /// Stop when this file exists
    #[arg(long)]
    until: PathBuf,
    /// Write the number of rounds that are done into this file
    #[arg(long)]
    rounds: PathBuf,
    /// What to hold
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = Kind::value_variants().to_vec())]
    things: Vec<Kind>,
    /// Keep files below this directory open as well
    #[arg(long)]
    files: Option<PathBuf>,
    /// So many
    #[arg(long, default_value_t = 0)]
    open: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Kind {
    /// A file that has lost its only name
    Unlinked,
    /// A file that was renamed over
    Replaced,
    /// This process's working directory, which was removed
    Removed,
    /// A directory that is read in small pieces
    Listing,
    /// A file that is renamed in each round, and its directory as well
    Renamed,
    /// A file whose name is no UTF-8
    Bytes,
    /// A file that is open for appending
    Append,
}

enum Thing {
    Content(Content),
    Removed(File),
    Listing { directory: File, seen: Vec<Vec<u8>> },
    Renamed { content: Content, home: PathBuf },
    Append { file: File, path: PathBuf },
}

fn main() -> Result<()> {
    let options = Options::parse();
    fs::create_dir_all(&options.directory).context("the directory cannot be made")?;
    let home = options.directory.canonicalize()?;
    let mut things = Vec::new();
    for kind in &options.things {
        things.push((*kind, Thing::make(*kind, &home).with_context(|| format!("{kind:?} cannot be made"))?));
    }
    let mut files = Vec::new();
    if let Some(directory) = &options.files {
        open_some(directory, options.open, &mut files)?;
        ensure!(files.len() == options.open, "{} files instead of {}", files.len(), options.open);
    }
    let mut round = 0;
    loop {
        // One round more after the end is asked for.
        let last = options.until.exists();
        round += 1;
        for (kind, thing) in &mut things {
            thing.check(round).with_context(|| format!("{kind:?}, round {round}"))?;
        }
        for file in &files {
            ensure!(
                file.read_at(&mut [0; 1], 0).context("reading a file of many failed")? == 1,
                "a file is empty"
            );
        }
        let scratch = options.rounds.with_extension("new");
        fs::write(&scratch, round.to_string())?;
        fs::rename(&scratch, &options.rounds)?;
        if last {
            println!("{round} rounds");
            return Ok(());
        }
        std::thread::sleep(PAUSE);
    }
}

/// Opens files below a directory until there are `count`.
fn open_some(directory: &Path, count: usize, files: &mut Vec<File>) -> Result<()> {
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        if files.len() == count {
            return Ok(());
        }
        if entry.file_type()?.is_dir() {
            open_some(&entry.path(), count, files)?;
        } else {
            files.push(File::open(entry.path())?);
        }
    }
    Ok(())
}

impl Thing {
    fn make(kind: Kind, home: &Path) -> Result<Thing> {
        let path = home.join(format!("{kind:?}").to_lowercase());
        Ok(match kind {
            Kind::Unlinked => {
                let content = Content::make(&path, 1)?;
                fs::remove_file(&path)?;
                Thing::Content(content)
            }
            Kind::Replaced => {
                let content = Content::make(&path, 2)?;
                let other = path.with_extension("new");
                fs::write(&other, "another")?;
                fs::rename(&other, &path)?;
                Thing::Content(content)
            }
            Kind::Removed => {
                fs::create_dir(&path)?;
                std::env::set_current_dir(&path)?;
                let directory = File::open(&path)?;
                fs::remove_dir(&path)?;
                Thing::Removed(directory)
            }
            Kind::Listing => {
                fs::create_dir(&path)?;
                for number in 0..ENTRIES {
                    File::create(path.join(format!("entry-{number:04}-with-a-longer-name")))?;
                }
                Thing::Listing { directory: File::open(&path)?, seen: Vec::new() }
            }
            Kind::Renamed => {
                let home = path.join("0");
                fs::create_dir_all(&home)?;
                Thing::Renamed { content: Content::make(&home.join("0"), 3)?, home: path }
            }
            Kind::Bytes => {
                let name = home.join(OsStr::from_bytes(b"bytes-\xff\xfe\x80"));
                Thing::Content(Content::make(&name, 4)?)
            }
            Kind::Append => {
                let file = File::options().create(true).append(true).open(&path)?;
                Thing::Append { file, path }
            }
        })
    }

    fn check(&mut self, round: u64) -> Result<()> {
        match self {
            Thing::Content(content) => content.check(round),
            Thing::Removed(directory) => {
                check_removed(directory)?;
                let path = std::env::current_dir();
                ensure!(path.is_err(), "the working directory has the path {path:?}");
                check_removed(&File::open(".").context("the working directory cannot be opened")?)
            }
            Thing::Listing { directory, seen } => read_some(directory, seen),
            Thing::Renamed { content, home } => {
                let (old, new) = (home.join((round - 1).to_string()), home.join(round.to_string()));
                fs::rename(old.join((round - 1).to_string()), old.join(round.to_string()))?;
                fs::rename(&old, &new)?;
                content.check(round)
            }
            Thing::Append { file, path } => {
                file.write_all(&round.to_le_bytes()).context("appending failed")?;
                let found = fs::read(path)?;
                let wanted: Vec<u8> = (1..=round).flat_map(u64::to_le_bytes).collect();
                ensure!(found == wanted, "{} bytes are wrong, or not {}", found.len(), wanted.len());
                Ok(())
            }
        }
    }
}

/// It is still there, and has no name.
fn check_removed(directory: &File) -> Result<()> {
    // A question that the guest's kernel does not answer by itself.
    let flags = AtFlags::EMPTY_PATH | AtFlags::STATX_FORCE_SYNC;
    let facts = statx(directory, "", flags, StatxFlags::BASIC_STATS).context("statx failed")?;
    ensure!(facts.stx_mode & 0o170_000 == 0o040_000, "it is no directory");
    Ok(())
}

/// Reads the next entries; at the end of the directory each must have been there once.
fn read_some(directory: &File, seen: &mut Vec<Vec<u8>>) -> Result<()> {
    let mut buffer = [MaybeUninit::<u8>::uninit(); 4096];
    let mut entries = RawDir::new(directory, &mut buffer);
    let mut ended = true;
    while let Some(entry) = entries.next() {
        ended = false;
        seen.push(entry.context("reading failed")?.file_name().to_bytes().to_vec());
        // The rest of the buffer would be lost.
        if entries.is_buffer_empty() {
            break;
        }
    }
    if !ended {
        return Ok(());
    }
    seen.sort();
    let twice = seen.windows(2).find(|pair| pair.first() == pair.last());
    ensure!(twice.is_none(), "an entry is there twice: {twice:?}");
    ensure!(seen.len() == ENTRIES + 2, "{} entries instead of {}", seen.len(), ENTRIES + 2);
    seen.clear();
    seek(directory, SeekFrom::Start(0)).context("going back failed")?;
    Ok(())
}

/// An open file, and what it holds.
struct Content {
    file: File,
    data: Vec<u8>,
    writer: u64,
}

impl Content {
    fn make(path: &Path, writer: u64) -> Result<Content> {
        let file = File::options().read(true).write(true).create_new(true).open(path)?;
        let mut data = vec![0; SIZE];
        fill(&mut data, writer, 0);
        file.write_all_at(&data, 0)?;
        Ok(Content { file, data, writer })
    }

    /// Changes a part of the file, and reads all of it from the server.
    fn check(&mut self, round: u64) -> Result<()> {
        let place = usize::try_from(round)? * PIECE % SIZE;
        let piece = self.data.get_mut(place..place + PIECE).context("beyond the end")?;
        fill(piece, self.writer, round << 30);
        self.file.write_all_at(piece, u64::try_from(place)?).context("writing failed")?;
        self.file.sync_data().context("fdatasync failed")?;
        fadvise(&self.file, 0, None, Advice::DontNeed).context("the cache cannot be emptied")?;
        let size = self.file.metadata().context("fstat failed")?.len();
        ensure!(size == u64::try_from(SIZE)?, "the file has {size} bytes instead of {SIZE}");
        let mut found = vec![0; SIZE];
        self.file.read_exact_at(&mut found, 0).context("reading failed")?;
        let differs = found.iter().zip(&self.data).position(|(one, two)| one != two);
        ensure!(differs.is_none(), "byte {differs:?} is wrong");
        Ok(())
    }
}
