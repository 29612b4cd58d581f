//! The files that are worked on. They are made once and then used by every measurement, whichever
//! program made them: all find the same blocks.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::Path;

use lanefsd_frontend::client::{Client, ROOT};

use crate::error::{LoadError, Result};
use crate::options::Work;

/// The data file.
pub const DATA: &str = "load.data";
/// The name of a data file.
pub fn data(number: usize) -> String {
    if number == 0 { DATA.to_string() } else { format!("{DATA}.{number}") }
}

/// The directory where files come and go.
pub const CHURN: &str = "load.churn";
/// Length of a name made by [`entry_name`].
pub const NAME_LEN: usize = 9;
/// Bytes that are written at once.
const PIECE: usize = 256 << 10;

/// The directory with this many files.
pub fn many(entries: u32) -> String {
    format!("load.many.{entries}")
}

/// The name of a file in a directory of ours.
pub fn entry_name(index: u32) -> String {
    format!("f{index:08}")
}

/// A directory in the root, through a back end; made if it is not there.
pub fn directory(client: &Client<'_>, name: &str) -> Result<u64> {
    match client.lookup(ROOT, name) {
        Ok(entry) => Ok(entry.nodeid),
        Err(error) if error.errno().is_some_and(|errno| errno.0 == libc::ENOENT) => {
            Ok(client.mkdir(ROOT, name, 0o755, 0)?.nodeid)
        }
        Err(error) => Err(error.into()),
    }
}

/// The data files through a back end, open: their nodes and handles.
pub fn data_files(client: &Client<'_>, work: &Work) -> Result<Vec<(u64, u64)>> {
    (0..usize::from(work.files)).map(|number| data_file(client, work, &data(number))).collect()
}

fn data_file(client: &Client<'_>, work: &Work, name: &str) -> Result<(u64, u64)> {
    let size = work.bytes_of_file();
    let node = match client.lookup(ROOT, name) {
        Ok(entry) if entry.attr.size >= size => entry.nodeid,
        Ok(entry) => {
            let fh = client.open(entry.nodeid, libc::O_RDWR)?.fh;
            fill(client, entry.nodeid, fh, size)?
        }
        Err(error) if error.errno().is_some_and(|errno| errno.0 == libc::ENOENT) => {
            let (entry, opened) = client.create(ROOT, name, libc::O_RDWR, 0o644, 0)?;
            fill(client, entry.nodeid, opened.fh, size)?
        }
        Err(error) => return Err(error.into()),
    };
    Ok((node, client.open(node, work.open_flags())?.fh))
}

/// Any file of the share, open for reading: its node and handle.
pub fn file(client: &Client<'_>, path: &str) -> Result<(u64, u64)> {
    let node = client.walk(ROOT, path)?.nodeid;
    Ok((node, client.open(node, libc::O_RDONLY)?.fh))
}

fn fill(client: &Client<'_>, node: u64, fh: u64, size: u64) -> Result<u64> {
    let piece = vec![0x5a; PIECE];
    for offset in (0..size).step_by(PIECE) {
        let len = usize::try_from(size - offset).unwrap_or(PIECE).min(PIECE);
        client.write(node, fh, offset, piece.get(..len).unwrap_or_default())?;
    }
    client.fsync(node, fh, false)?;
    client.release(node, fh)?;
    Ok(node)
}

/// The directory with many files through a back end: its node, and the files' nodes if they are
/// wanted.
pub fn entries(client: &Client<'_>, count: u32, want_nodes: bool) -> Result<(u64, Vec<u64>)> {
    let dir = directory(client, &many(count))?;
    if client.lookup(dir, entry_name(count - 1)).is_err() {
        for index in 0..count {
            let (entry, opened) = client.create(dir, entry_name(index), libc::O_RDWR, 0o644, 0)?;
            client.release(entry.nodeid, opened.fh)?;
        }
    }
    let wanted = if want_nodes { 0..count } else { 0..0 };
    let look_up = |index| Ok(client.lookup(dir, entry_name(index))?.nodeid);
    Ok((dir, wanted.map(look_up).collect::<Result<_>>()?))
}

/// Makes all of it without a back end.
pub fn prepare(share: &Path, work: &Work) -> Result<()> {
    let say = |path: &Path| format!("make {}", path.display());
    (0..usize::from(work.files))
        .try_for_each(|number| make_data(&share.join(data(number)), work.bytes_of_file()))?;
    let churn = share.join(CHURN);
    fs::create_dir_all(&churn).map_err(LoadError::system(say(&churn)))?;
    make_entries(share, work.entries)
}

fn make_data(data: &Path, size: u64) -> Result<()> {
    let say = |path: &Path| format!("make {}", path.display());
    let file = fs::OpenOptions::new().write(true).create(true).truncate(false).open(data);
    let file = file.map_err(LoadError::system(say(data)))?;
    let len = file.metadata().map_err(LoadError::system(say(data)))?.len();
    if len < size {
        let piece = vec![0x5a; PIECE];
        for offset in (0..size).step_by(PIECE) {
            let len = usize::try_from(size - offset).unwrap_or(PIECE).min(PIECE);
            file.write_all_at(&piece[..len], offset).map_err(LoadError::system(say(data)))?;
        }
        file.sync_all().map_err(LoadError::system(say(data)))?;
    }
    Ok(())
}

/// Makes the directory with many files without a back end.
pub fn make_entries(share: &Path, count: u32) -> Result<()> {
    let say = |path: &Path| format!("make {}", path.display());
    let many = share.join(many(count));
    fs::create_dir_all(&many).map_err(LoadError::system(say(&many)))?;
    if !many.join(entry_name(count - 1)).exists() {
        for index in 0..count {
            let path = many.join(entry_name(index));
            fs::File::create(&path).map_err(LoadError::system(say(&path)))?;
        }
    }
    Ok(())
}
