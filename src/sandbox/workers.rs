//! The sandbox that workers serve in, one after the other, while their parent stays outside.
//!
//! The first worker makes the sandbox and leaves the descriptors of it open; later ones join it. They must not make one
//! of their own: mounts that the host has made below the share since would be missing, and the guest's inodes are on the
//! mounts of the first. The parent makes the user namespace, if there is one, so that all workers are in the same.

use std::os::fd::{AsFd, AsRawFd as _, OwnedFd, RawFd};
use std::path::{Path, PathBuf, absolute};

use rustix::io::{Errno, fcntl_dupfd_cloexec};
use rustix::process::{Gid, Uid, getegid, geteuid};
use rustix::thread::UnshareFlags;

use super::config::{IdMaps, Sandbox};
use super::namespace::Made;
use super::process::{ParentFd, Worker, clone_worker, leave_open};
use super::{
    SandboxError, Sandboxed, Share, drop_groups, enter_chroot, id_map, mounts, namespace, open_proc_self,
    open_share, step, strongest,
};
use crate::sys::inherited::{Identity, adopt, copy, identity};

/// Numbers of the descriptors that the first worker has left open for later ones; -1 for none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entered {
    root: RawFd,
    empty: RawFd,
    mounts: RawFd,
    network: RawFd,
}

impl Entered {
    /// Bytes of [`Entered::to_bytes`].
    pub const SIZE: usize = 16;

    /// For another process with the same descriptors.
    pub fn to_bytes(self) -> [u8; Entered::SIZE] {
        let mut bytes = [0; Entered::SIZE];
        let numbers = [self.root, self.empty, self.mounts, self.network].into_iter();
        bytes.iter_mut().zip(numbers.flat_map(RawFd::to_ne_bytes)).for_each(|(to, from)| *to = from);
        bytes
    }

    /// The reverse.
    pub fn from_bytes(bytes: [u8; Entered::SIZE]) -> Entered {
        let mut numbers = bytes
            .chunks_exact(size_of::<RawFd>())
            .map(|bytes| bytes.first_chunk().map_or(-1, |number| RawFd::from_ne_bytes(*number)));
        let mut next = || numbers.next().unwrap_or(-1);
        Entered { root: next(), empty: next(), mounts: next(), network: next() }
    }

    /// The descriptors.
    pub fn descriptors(self) -> impl Iterator<Item = RawFd> {
        [self.root, self.empty, self.mounts, self.network].into_iter().filter(|fd| *fd >= 0)
    }
}

/// What another program in place of the parent's needs to go on with the sandbox.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Prepared {
    /// Its kind.
    pub kind: Sandbox,
    /// User id and group id outside a user namespace, if there is one.
    pub outside: Option<(u32, u32)>,
    /// What the first worker has left open.
    pub entered: Entered,
    /// The shared directory, by an absolute path; `None` if the program before did not say it.
    pub path: Option<PathBuf>,
}

/// The sandbox of a daemon's workers, in their parent.
#[derive(Debug)]
pub struct Workers {
    kind: Sandbox,
    maps: IdMaps,
    /// The ids outside a user namespace, if there is one.
    outside: Option<(Uid, Gid)>,
    path: PathBuf,
    /// The shared directory outside the sandbox, for the first worker alone: it leads out.
    share: Option<OwnedFd>,
    parent: ParentFd,
    entered: Option<Entered>,
    /// The next worker opens the directory anew, and makes another sandbox.
    renews: bool,
    /// What these descriptors were when they were told: a worker could put others in their place, for the next one to
    /// join.
    identities: Vec<Option<Identity>>,
}

impl Workers {
    /// Prepares the sandbox `wanted`, or the strongest that is available, with `share` in it.
    ///
    /// Must be called while the process has one thread.
    pub fn prepare(wanted: Option<Sandbox>, share: &Path, maps: &IdMaps) -> Result<Workers, SandboxError> {
        let directory = open_share(share)?;
        let is_root = geteuid().is_root();
        let kind = wanted.unwrap_or_else(|| strongest(is_root, maps));
        if kind == Sandbox::Chroot && !is_root {
            return Err(SandboxError::ChrootNeedsRoot);
        }
        let own_users = kind == Sandbox::Namespace && (!is_root || !maps.is_empty());
        let outside = own_users.then(|| (geteuid(), getegid()));
        let parent = ParentFd::of_this_process()?;
        if own_users {
            id_map::unshare(UnshareFlags::empty(), maps)?;
        }
        // The parent changes its working directory, and may open the share anew later.
        let path = absolute(share).unwrap_or_else(|_| share.to_owned());
        let maps = maps.clone();
        Ok(Workers {
            kind,
            maps,
            outside,
            path,
            share: Some(directory),
            parent,
            entered: None,
            renews: false,
            identities: Vec::new(),
        })
    }

    /// The kind of the sandbox.
    pub fn kind(&self) -> Sandbox {
        self.kind
    }

    /// What another program needs to go on; `None` before the first worker is ready.
    pub fn prepared(&self) -> Option<Prepared> {
        let outside = self.outside.map(|(user, group)| (user.as_raw(), group.as_raw()));
        Some(Prepared { kind: self.kind, outside, entered: self.entered?, path: Some(self.path.clone()) })
    }

    /// The sandbox that another program has prepared in this process, for the same options.
    pub fn go_on(prepared: Prepared, share: &Path, maps: &IdMaps) -> Result<Workers, SandboxError> {
        let Prepared { kind, outside, entered, path } = prepared;
        let outside = outside.map(|(user, group)| (Uid::from_raw(user), Gid::from_raw(group)));
        let parent = ParentFd::of_this_process()?;
        let (maps, path) = (maps.clone(), path.unwrap_or_else(|| share.to_owned()));
        let mut workers = Workers {
            kind,
            maps,
            outside,
            path,
            share: None,
            parent,
            entered: None,
            renews: false,
            identities: Vec::new(),
        };
        workers.set_entered(entered);
        Ok(workers)
    }

    /// Makes a worker, which then calls [`Workers::enter`]; `None` in the worker. The first worker owns the shared
    /// directory.
    pub fn start(&mut self) -> Result<Option<Worker>, Errno> {
        let worker = clone_worker(self.kind == Sandbox::Namespace)?;
        if worker.is_some()
            && let Some(share) = self.share.take()
        {
            std::mem::forget(share);
        }
        Ok(worker)
    }

    /// Descriptors that belong to the parent, or to all workers.
    pub fn descriptors(&self) -> impl Iterator<Item = RawFd> {
        let own = [Some(self.parent.as_fd().as_raw_fd()), self.share.as_ref().map(|fd| fd.as_raw_fd())];
        own.into_iter().flatten().chain(self.entered.into_iter().flat_map(Entered::descriptors))
    }

    /// Notes what a worker has left open that has made the sandbox. What an earlier one was made of is closed.
    pub fn set_entered(&mut self, entered: Entered) {
        if self.entered.is_some() && !self.renews {
            return;
        }
        self.renews = false;
        let old = self.entered.replace(entered);
        let still = |fd: &RawFd| identity(*fd).is_ok();
        let intact = identities_of(old) == self.identities;
        // Of descriptors that a worker has put others in the place of, nobody knows whose they are.
        old.into_iter().filter(|_| intact).flat_map(Entered::descriptors).filter(still).for_each(|fd| {
            drop(adopt(fd));
        });
        self.identities = identities(entered);
    }

    /// Lets the next worker open the shared directory anew, by its path, and make another sandbox.
    pub fn renew(&mut self) {
        self.renews = true;
    }

    /// The next worker joins the sandbox that is there.
    pub fn keep(&mut self) {
        self.renews = false;
    }

    /// Whether the next worker makes another sandbox.
    pub fn renews(&self) -> bool {
        self.renews
    }

    /// A descriptor that is readable when the parent has died.
    pub fn parent_end(&self) -> Result<OwnedFd, Errno> {
        fcntl_dupfd_cloexec(&self.parent, 0)
    }

    /// Moves a new worker into the sandbox, which the first one makes.
    pub fn enter(&mut self) -> Result<(Sandboxed, Entered), SandboxError> {
        if self.renews {
            return self.make(open_share(&self.path)?);
        }
        match (self.entered, self.share.take()) {
            (Some(entered), _) => self.join(entered).map(|sandboxed| (sandboxed, entered)),
            (None, Some(share)) => self.make(share),
            (None, None) => Err(step("opening the share")(Errno::BADF)),
        }
    }

    fn make(&self, share: OwnedFd) -> Result<(Sandboxed, Entered), SandboxError> {
        let (sandboxed, empty, namespaces) = match self.kind {
            Sandbox::None => (unsandboxed(share)?, None, None),
            Sandbox::Chroot => {
                let (sandboxed, empty) = enter_chroot(share, mounts::empty_directory())?;
                (sandboxed, empty, None)
            }
            Sandbox::Namespace => {
                let share = Share { path: &self.path, directory: share };
                // With the rights of the user who started the daemon.
                share.enter()?;
                drop(share);
                self.become_server()?;
                let Made { sandboxed, empty, namespaces } = namespace::make()?;
                (sandboxed, empty, Some(namespaces))
            }
        };
        let keep = |fd: Option<&OwnedFd>| {
            let kept = fd.map_or(Ok(-1), |fd| leave_open(fd.as_fd()));
            kept.map_err(step("copying a descriptor"))
        };
        let (mounts, network) =
            (namespaces.as_ref().map(|[mounts, _]| mounts), namespaces.as_ref().map(|[_, network]| network));
        let entered = Entered {
            root: keep(Some(&sandboxed.root))?,
            empty: keep(empty.as_ref())?,
            mounts: keep(mounts)?,
            network: keep(network)?,
        };
        Ok((sandboxed, entered))
    }

    fn join(&self, entered: Entered) -> Result<Sandboxed, SandboxError> {
        if identities(entered) != self.identities {
            return Err(step("joining the sandbox of the worker before")(Errno::STALE));
        }
        let copy = |number| copy(number).map_err(step("copying a descriptor"));
        let root = copy(entered.root)?;
        let empty = (entered.empty >= 0).then(|| copy(entered.empty)).transpose()?;
        match self.kind {
            Sandbox::None => unsandboxed(root),
            Sandbox::Chroot => enter_chroot(root, empty).map(|(sandboxed, _)| sandboxed),
            Sandbox::Namespace => {
                let namespaces = [copy(entered.mounts)?, copy(entered.network)?];
                self.become_server()?;
                let [proc_self_fd, proc_self_fdinfo] = namespace::join(&namespaces)?;
                mounts::change_root(empty.as_ref(), &proc_self_fd)?;
                Ok(Sandboxed { root, proc_self_fd, proc_self_fdinfo, forked: true })
            }
        }
    }

    /// Takes the ids that a worker has in a user namespace.
    fn become_server(&self) -> Result<(), SandboxError> {
        self.outside.map_or(Ok(()), |outside| id_map::become_server(outside, &self.maps))
    }
}

fn identities_of(entered: Option<Entered>) -> Vec<Option<Identity>> {
    entered.map_or_else(Vec::new, identities)
}

fn identities(entered: Entered) -> Vec<Option<Identity>> {
    entered.descriptors().map(|number| identity(number).ok()).collect()
}

fn unsandboxed(root: OwnedFd) -> Result<Sandboxed, SandboxError> {
    drop_groups();
    let [proc_self_fd, proc_self_fdinfo] = open_proc_self()?;
    Ok(Sandboxed { root, proc_self_fd, proc_self_fdinfo, forked: true })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_of_descriptors_can_be_told_to_the_parent() {
        let entered = Entered { root: 5, empty: -1, mounts: 70_000, network: 8 };
        assert_eq!(Entered::from_bytes(entered.to_bytes()), entered);
        assert_eq!(entered.descriptors().collect::<Vec<_>>(), [5, 70_000, 8]);
    }
}
