//! Names in requests. A [`Name`] is one safe path component.

use core::ffi::CStr;

use thiserror::Error;

use crate::errno::Errno;

/// Longest name of a directory entry in bytes (`FUSE_NAME_MAX`). Most file systems take 255; where names are
/// in UTF-16 on the disk (NTFS, CIFS, exFAT) those of 255 characters may have 765 bytes.
pub const NAME_MAX: usize = 1024;

/// Why bytes are not a [`Name`].
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum NameError {
    /// No bytes at all.
    #[error("a name is empty")]
    Empty,
    /// `.` or `..` where an entry has to be named.
    #[error("a name is \".\" or \"..\"")]
    Dots,
    /// More than one path component.
    #[error("a name holds a slash")]
    Slash,
    /// More than [`NAME_MAX`] bytes.
    #[error("a name is longer than {NAME_MAX} bytes")]
    TooLong,
}

impl NameError {
    /// The error for the reply.
    pub fn errno(self) -> Errno {
        match self {
            NameError::TooLong => Errno::NAMETOOLONG,
            NameError::Empty | NameError::Dots | NameError::Slash => Errno::INVAL,
        }
    }
}

/// One path component: not empty, not `.` or `..`, no `/`, no NUL, at most 1024 bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Name<'a>(&'a CStr);

impl<'a> Name<'a> {
    /// Checks `name`.
    pub fn new(name: &'a CStr) -> Result<Name<'a>, NameError> {
        match LookupName::new(name)? {
            LookupName::Entry(name) => Ok(name),
            LookupName::This | LookupName::Parent => Err(NameError::Dots),
        }
    }

    /// The name with its NUL, ready for a system call.
    pub fn as_c_str(self) -> &'a CStr {
        self.0
    }
}

/// What LOOKUP may name: an entry, the directory itself, or its parent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LookupName<'a> {
    /// `.`
    This,
    /// `..`
    Parent,
    /// Anything else.
    Entry(Name<'a>),
}

impl<'a> LookupName<'a> {
    /// Checks `name`.
    pub fn new(name: &'a CStr) -> Result<LookupName<'a>, NameError> {
        let bytes = name.to_bytes();
        match bytes {
            b"" => Err(NameError::Empty),
            b"." => Ok(LookupName::This),
            b".." => Ok(LookupName::Parent),
            _ if bytes.len() > NAME_MAX => Err(NameError::TooLong),
            _ if bytes.contains(&b'/') => Err(NameError::Slash),
            _ => Ok(LookupName::Entry(Name(name))),
        }
    }
}

#[cfg(test)]
mod tests {
    extern crate std;

    use std::ffi::CString;
    use std::vec;

    use super::*;
    use proptest::prelude::*;

    #[test]
    fn other_than_one_component_is_refused() {
        let long = CString::new(vec![b'a'; 1025]).unwrap();
        for (name, error) in [
            (c"", NameError::Empty),
            (c".", NameError::Dots),
            (c"..", NameError::Dots),
            (c"a/b", NameError::Slash),
            (c"/", NameError::Slash),
            (long.as_c_str(), NameError::TooLong),
        ] {
            assert_eq!(Name::new(name), Err(error));
        }
        assert!(Name::new(&CString::new(vec![b'a'; 1024]).unwrap()).is_ok());
        assert!(Name::new(c"...").is_ok());
    }

    proptest! {
        #[test]
        fn an_accepted_name_is_one_component(bytes in proptest::collection::vec(1u8.., 0..1100)) {
            let name = CString::new(bytes.clone()).unwrap();
            let good = !bytes.is_empty() && bytes.len() <= NAME_MAX && !bytes.contains(&b'/')
                && bytes != b"." && bytes != b"..";
            prop_assert_eq!(Name::new(&name).is_ok(), good);
        }
    }
}
