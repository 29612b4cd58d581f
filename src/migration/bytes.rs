//! Bytes in one piece for serde, which takes a `Vec<u8>` for a list of numbers and goes through them one by one. Postcard writes
//! both in the same form.

use std::fmt;

use serde::de::{Error, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

pub(super) fn serialize<S: Serializer>(bytes: &[u8], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_bytes(bytes)
}

pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<u8>, D::Error> {
    deserializer.deserialize_byte_buf(Bytes)
}

struct Bytes;

impl Visitor<'_> for Bytes {
    type Value = Vec<u8>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("bytes")
    }

    fn visit_bytes<E: Error>(self, bytes: &[u8]) -> Result<Vec<u8>, E> {
        Ok(bytes.to_vec())
    }
}

/// Lists of bytes, each with a number.
pub(super) mod numbered {
    use super::*;

    #[derive(Serialize)]
    struct ItemRef<'a>(u64, #[serde(with = "super")] &'a [u8]);

    #[derive(Deserialize)]
    struct Item(u64, #[serde(with = "super")] Vec<u8>);

    pub(in crate::migration) fn serialize<S: Serializer>(
        list: &[(u64, Vec<u8>)],
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(list.iter().map(|(number, bytes)| ItemRef(*number, bytes)))
    }

    pub(in crate::migration) fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Vec<(u64, Vec<u8>)>, D::Error> {
        let items = Vec::<Item>::deserialize(deserializer)?;
        Ok(items.into_iter().map(|Item(number, bytes)| (number, bytes)).collect())
    }
}

#[cfg(test)]
mod tests {
    use serde::{Deserialize, Serialize};

    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    struct Pieces {
        #[serde(with = "super")]
        bytes: Vec<u8>,
        #[serde(with = "super::numbered")]
        list: Vec<(u64, Vec<u8>)>,
    }

    #[derive(Serialize, Deserialize)]
    struct OneByOne {
        bytes: Vec<u8>,
        list: Vec<(u64, Vec<u8>)>,
    }

    #[test]
    fn bytes_in_one_piece_lie_in_a_stream_as_bytes_one_by_one() {
        for len in [0, 1, 127, 128, 300] {
            let bytes: Vec<u8> = (0..len).map(|byte: u32| byte.to_le_bytes()[0]).collect();
            let list = vec![(1, bytes.clone()), (1 << 40, Vec::new()), (3, bytes.clone())];
            let stream = postcard::to_stdvec(&OneByOne { bytes: bytes.clone(), list: list.clone() }).unwrap();
            let pieces = Pieces { bytes, list };
            assert_eq!(postcard::to_stdvec(&pieces).unwrap(), stream);
            assert_eq!(postcard::from_bytes::<Pieces>(&stream).unwrap(), pieces);
            for cut in 0..stream.len() {
                assert!(postcard::from_bytes::<Pieces>(&stream[..cut]).is_err());
            }
        }
    }
}
