//! Streams of a share's state: any bytes are a state that passes all checks, or an error; and a state is the same behind
//! each stream that can carry it.

use lanefsd::config::{MigrationConfig, OnError, StreamFormat};
use lanefsd::migration::format::{check, read, write};

/// Bytes of the header of lanefsd's own stream.
const HEADER: usize = 24;

/// Reads `data`: a byte that chooses what is before it, and the stream or the body of one.
pub fn migration(data: &[u8]) {
    let Some((&choice, rest)) = data.split_first() else { return };
    let stream = match choice {
        0 | 1 => data.to_vec(),
        2 => seal(rest),
        _ => rest.to_vec(),
    };
    let own = MigrationConfig::default();
    let state = match read(&stream, &own) {
        Ok(state) => state,
        Err(error) => {
            assert!(!error.to_string().is_empty() && error.to_string().len() < 4096);
            return;
        }
    };
    check::check(&state).unwrap();
    let again = write(&state, &own).unwrap();
    assert_eq!(read(&again, &own).unwrap(), state);
    let format = StreamFormat::Virtiofsd;
    let theirs =
        MigrationConfig { format, on_error: OnError::GuestError, verify_handles: true, ..own.clone() };
    let once = read(&write(&state, &theirs).unwrap(), &own).unwrap();
    // What virtiofsd cannot have is lost once.
    let twice = read(&write(&once, &theirs).unwrap(), &own).unwrap();
    assert_eq!(once, twice);
}

/// The body of an own stream behind its header, as far as that is right: a fuzzer finds no checksum.
pub fn seal(body: &[u8]) -> Vec<u8> {
    let mut stream = b"LANEFSDM".to_vec();
    stream.extend_from_slice(&1u32.to_le_bytes());
    stream.extend_from_slice(&(body.len() as u64).to_le_bytes());
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&stream[8..]);
    hasher.update(body);
    stream.extend_from_slice(&hasher.finalize().to_le_bytes());
    assert_eq!(stream.len(), HEADER);
    stream.extend_from_slice(body);
    stream
}

/// What a fuzzer begins with: the streams that are kept for the tests.
pub fn seeds() -> Vec<Vec<u8>> {
    let own = include_bytes!("../../src/migration/format/testdata/lanefsd-1");
    let theirs = include_bytes!("../../src/migration/format/testdata/virtiofsd-1.14.0");
    let config = MigrationConfig { format: StreamFormat::Virtiofsd, ..MigrationConfig::default() };
    let converted = write(&read(theirs, &config).unwrap(), &MigrationConfig::default()).unwrap();
    let body = |stream: &[u8]| [&[2], &stream[HEADER..]].concat();
    let first = [&[0], &theirs[1..theirs.len() - 1]].concat();
    vec![theirs.to_vec(), first, body(own), body(&converted), [&[3], &own[..]].concat()]
}
