//! lanefsd's own stream.
//!
//! | bytes | content |
//! |---|---|
//! | 8 | `LANEFSDM`. virtiofsd takes the first byte for a version that it does not know, and refuses it |
//! | 4 | version, little-endian like all that follows |
//! | 8 | length of the body |
//! | 4 | CRC-32 of version, length and body |
//! | | body: the options of the share, the share, and queues with requests that wait, by postcard |
//!
//! **Versions.** Postcard describes nothing, so each change of what [`DeviceState`] consists of is a new version. Streams of
//! all earlier versions are read: whoever raises the version keeps the types of the one before here and converts them.
//! A version that is newer is refused. `testdata/` beside this has a stream of each version, which a test reads.

use serde::{Deserialize, Serialize};

use crate::migration::config::ShareOptions;
use crate::migration::{DeviceState, MigrationError, Snapshot, Waiting};

const MAGIC: &[u8; 8] = b"LANEFSDM";
/// The version that is written.
const VERSION: u32 = 1;
/// Bytes before the body.
const HEADER: usize = 24;
/// Where the checksum is; it covers all behind [`MAGIC`] but itself.
const CHECKSUM: usize = 20;

/// What is written of version 1.
#[derive(Serialize)]
struct BodyRef<'a> {
    options: &'a ShareOptions,
    share: &'a Snapshot,
    queues: &'a [Waiting],
}

/// The same as it is read.
#[derive(Deserialize)]
struct Body {
    options: ShareOptions,
    share: Snapshot,
    queues: Vec<Waiting>,
}

/// Whether the stream begins as one of these does.
pub(super) fn is_begun_by(stream: &[u8]) -> bool {
    stream.first() == MAGIC.first() && MAGIC.starts_with(stream.get(..MAGIC.len()).unwrap_or(stream))
}

/// A state as a stream of this version.
pub(super) fn write(state: &DeviceState, options: &ShareOptions) -> Result<Vec<u8>, MigrationError> {
    let body = BodyRef { options, share: &state.share, queues: &state.queues };
    let mut stream = Vec::with_capacity(HEADER);
    stream.extend_from_slice(MAGIC);
    stream.extend_from_slice(&VERSION.to_le_bytes());
    stream.extend_from_slice(&[0; 12]);
    let stream = postcard::to_extend(&body, stream);
    let mut stream =
        stream.map_err(|error| MigrationError(format!("the state cannot be written: {error}")))?;
    let length = stream.len().saturating_sub(HEADER) as u64;
    put(&mut stream, 12, &length.to_le_bytes());
    let sum = checksum(&stream);
    put(&mut stream, CHECKSUM, &sum.to_le_bytes());
    Ok(stream)
}

/// The state in a stream of this or an earlier version.
pub(super) fn read(stream: &[u8], options: &ShareOptions) -> Result<DeviceState, MigrationError> {
    let cut = || MigrationError(format!("the stream ends within its header, after {} bytes", stream.len()));
    let version = number::<4>(stream, 8).map(u32::from_le_bytes).ok_or_else(cut)?;
    if version == 0 || version > VERSION {
        return Err(MigrationError(format!(
            "the stream has version {version}, and this lanefsd reads versions up to {VERSION}: migrate to one that is as \
             new as the source"
        )));
    }
    let length = number::<8>(stream, 12).map(u64::from_le_bytes).ok_or_else(cut)?;
    let sum = number::<4>(stream, CHECKSUM).map(u32::from_le_bytes).ok_or_else(cut)?;
    let body = stream.get(HEADER..).unwrap_or_default();
    if body.len() as u64 != length {
        return Err(MigrationError(format!(
            "the stream has {} bytes behind its header, which says {length}",
            body.len()
        )));
    }
    if checksum(stream) != sum {
        return Err(MigrationError("the checksum of the stream is wrong: it was changed on the way".into()));
    }
    let malformed = |error| MigrationError(format!("the stream is malformed: {error}"));
    let (body, rest): (Body, _) = postcard::take_from_bytes(body).map_err(malformed)?;
    if !rest.is_empty() {
        return Err(MigrationError(format!("the stream has {} bytes behind its end", rest.len())));
    }
    if let Some((name, here, there)) = options.difference(&body.options) {
        return Err(MigrationError(format!(
            "the source has {name} {there} and this daemon {name} {here}: start it with the options of the source"
        )));
    }
    Ok(DeviceState { share: body.share, queues: body.queues })
}

fn checksum(stream: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(stream.get(MAGIC.len()..CHECKSUM).unwrap_or_default());
    hasher.update(stream.get(HEADER..).unwrap_or_default());
    hasher.finalize()
}

fn number<const N: usize>(stream: &[u8], offset: usize) -> Option<[u8; N]> {
    stream.get(offset..)?.first_chunk().copied()
}

fn put(stream: &mut [u8], offset: usize, bytes: &[u8]) {
    let place = stream.get_mut(offset..offset.saturating_add(bytes.len()));
    place.into_iter().for_each(|place| place.copy_from_slice(bytes));
}
