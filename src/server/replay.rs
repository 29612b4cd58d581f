//! What the error of a request means that is served again.
//!
//! A worker may have died after the request had done its work and before the reply was complete. Served again, the
//! request then finds that there is nothing left to do, and the host says so by an error. Where opcode and errno
//! alone tell that, the guest gets the success that it would have got. What takes more is decided in the file system.

use fuse_protocol::opcode::Opcode;
use rustix::io::Errno;

/// Errors that mean that the work was done before.
///
/// A guest releases each handle once, and ends a session that it has.
const DONE_BEFORE: [(Opcode, Errno); 3] =
    [(Opcode::Release, Errno::BADF), (Opcode::Releasedir, Errno::BADF), (Opcode::Destroy, Errno::NOTCONN)];

/// The result of a request of this kind that is served again. None of these has a body in its reply.
#[cold]
pub(super) fn settle(opcode: Option<Opcode>, result: Result<(), Errno>) -> Result<(), Errno> {
    let (Some(opcode), Err(errno)) = (opcode, result) else { return result };
    if DONE_BEFORE.contains(&(opcode, errno)) { Ok(()) } else { result }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_an_error_that_says_that_nothing_is_left_to_do_is_a_success() {
        for (opcode, errno) in DONE_BEFORE {
            assert_eq!(settle(Some(opcode), Err(errno)), Ok(()));
            assert_eq!(settle(Some(opcode), Err(Errno::IO)), Err(Errno::IO));
            assert_eq!(settle(Some(opcode), Ok(())), Ok(()));
            assert_eq!(settle(Some(Opcode::Lookup), Err(errno)), Err(errno));
            assert_eq!(settle(None, Err(errno)), Err(errno));
        }
    }
}
