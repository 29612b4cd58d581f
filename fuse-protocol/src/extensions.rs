//! Extensions of creating requests, behind their arguments: the supplementary group that matters, and
//! security labels for the new inode.

use core::ffi::CStr;

use zerocopy::FromBytes;

use crate::abi;
use crate::decode::DecodeError;
use crate::ids::GuestGid;
use crate::opcode::Opcode;

/// Extension types below this are the number of labels in it.
const LABEL_TYPES: u32 = abi::EXT_GROUPS;

/// A security label of a new inode: an extended attribute.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Label<'a> {
    /// The attribute's whole name, such as `security.selinux`.
    pub name: &'a CStr,
    /// Its value.
    pub value: &'a [u8],
}

/// The labels of a request, of which there is one as a rule.
#[derive(Clone, Copy, Debug, Default)]
pub struct Labels<'a> {
    count: u32,
    bytes: &'a [u8],
}

impl<'a> Labels<'a> {
    /// Each label.
    pub fn iter(&self) -> impl Iterator<Item = Label<'a>> {
        let mut rest = self.bytes;
        (0..self.count).map_while(move |_| {
            let (label, after) = take_label(rest)?;
            rest = after;
            Some(label)
        })
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }
}

/// The extensions of a request.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Extensions<'a> {
    pub group: Option<GuestGid>,
    pub labels: Labels<'a>,
}

impl<'a> Extensions<'a> {
    /// Reads the extensions in `bytes`. Unknown types are skipped.
    pub(crate) fn parse(opcode: Opcode, bytes: &'a [u8]) -> Result<Extensions<'a>, DecodeError> {
        Extensions::read(bytes).ok_or(DecodeError::Extensions(opcode))
    }

    fn read(mut rest: &'a [u8]) -> Option<Extensions<'a>> {
        let mut extensions = Extensions::default();
        while !rest.is_empty() {
            let (header, _) = abi::ExtHeader::read_from_prefix(rest).ok()?;
            let (this, next) = rest.split_at_checked(usize::try_from(header.size).ok()?)?;
            let body = this.get(size_of::<abi::ExtHeader>()..)?;
            if header.typ == abi::EXT_GROUPS {
                extensions.group = read_group(body)?;
            } else if header.typ < LABEL_TYPES {
                extensions.labels = read_labels(header.typ, body)?;
            }
            rest = next;
        }
        Some(extensions)
    }
}

/// The first group of a list, which may be empty.
fn read_group(body: &[u8]) -> Option<Option<GuestGid>> {
    let (groups, ids) = abi::SuppGroups::read_from_prefix(body).ok()?;
    if groups.nr_groups == 0 {
        return Some(None);
    }
    u32::read_from_prefix(ids).ok().map(|(id, _)| Some(GuestGid(id)))
}

/// As many labels as were announced.
fn read_labels(count: u32, bytes: &[u8]) -> Option<Labels<'_>> {
    let mut rest = bytes;
    for _ in 0..count {
        rest = take_label(rest)?.1;
    }
    Some(Labels { count, bytes })
}

fn take_label(bytes: &[u8]) -> Option<(Label<'_>, &[u8])> {
    let (header, rest) = abi::Secctx::read_from_prefix(bytes).ok()?;
    let name = CStr::from_bytes_until_nul(rest).ok()?;
    let value_at = name.count_bytes().checked_add(1)?;
    let end = value_at.checked_add(usize::try_from(header.size).ok()?)?;
    let value = rest.get(value_at..end)?;
    // Each label but the last is padded.
    let used = size_of::<abi::Secctx>().checked_add(end)?.checked_next_multiple_of(abi::RECORD_ALIGN)?;
    Some((Label { name, value }, bytes.get(used..).unwrap_or_default()))
}

#[cfg(test)]
mod tests {
    extern crate std;

    use std::vec::Vec;

    use super::*;
    use proptest::prelude::*;
    use zerocopy::IntoBytes;

    /// An extension of labels as Linux makes it.
    fn extension(labels: &[(&CStr, &[u8])]) -> Vec<u8> {
        let mut body = Vec::new();
        for (name, value) in labels {
            let size = u32::try_from(value.len()).unwrap();
            body.extend(abi::Secctx { size, padding: 0 }.as_bytes());
            body.extend(name.to_bytes_with_nul());
            body.extend(*value);
            body.resize(body.len().next_multiple_of(8), 0);
        }
        let size = u32::try_from(body.len() + 8).unwrap();
        let typ = u32::try_from(labels.len()).unwrap();
        [abi::ExtHeader { size, typ }.as_bytes(), &body].concat()
    }

    #[test]
    fn labels_and_groups_are_found() {
        let labels: [(&CStr, &[u8]); 2] =
            [(c"security.selinux", b"system_u:object_r:tmp_t:s0\0"), (c"security.SMACK64", b"_")];
        let groups = [16u32, 32, 1, 4711].map(u32::to_le_bytes).concat();
        for count in 0..=2 {
            let bytes = [extension(&labels[..count]), groups.clone()].concat();
            let found = Extensions::parse(Opcode::Mkdir, &bytes).unwrap();
            assert_eq!(found.group, Some(GuestGid(4711)));
            assert_eq!(found.labels.is_empty(), count == 0);
            let found: Vec<_> = found.labels.iter().map(|label| (label.name, label.value)).collect();
            assert_eq!(found, labels[..count]);
        }
    }

    #[test]
    fn malformed_extensions_are_refused() {
        let good = extension(&[(c"security.selinux", b"label")]);
        assert!(Extensions::parse(Opcode::Mkdir, &good).is_ok());
        for (at, value) in [(0, 200), (0, 3), (4, 2), (8, 200), (8, 255)] {
            let mut bad = good.clone();
            bad[at] = value;
            assert!(Extensions::parse(Opcode::Mkdir, &bad).is_err(), "{value} at {at}");
        }
        assert!(Extensions::parse(Opcode::Mkdir, &good[..good.len() - 1]).is_err());
        assert!(Extensions::parse(Opcode::Mkdir, &[0; 7]).is_err());
    }

    proptest! {
        /// Total, and a request has as many labels as it declares.
        #[test]
        fn any_bytes_are_read_or_refused(typ in 0u32..40, tail in proptest::collection::vec(any::<u8>(), 0..100)) {
            let size = u32::try_from(tail.len() + 8).unwrap();
            let bytes = [abi::ExtHeader { size, typ }.as_bytes(), &tail].concat();
            if let Ok(found) = Extensions::parse(Opcode::Create, &bytes) {
                prop_assert_eq!(found.labels.iter().count(), found.labels.count as usize);
            }
            let _ = Extensions::parse(Opcode::Create, &tail);
        }
    }
}
