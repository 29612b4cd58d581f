//! A file system of the host that is a FUSE server's: one directory of files, whose inode numbers and directory
//! offsets are chosen by the test. It is served by a thread, without a FUSE library: those have inode numbers
//! that are also the kernel's names for inodes.
#![allow(clippy::cast_possible_truncation, reason = "its numbers are small")]

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use fuse_protocol::abi;
use fuse_protocol::opcode::Opcode;
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use zerocopy::{FromBytes, IntoBytes};

/// A file of the store, which holds its own name.
#[derive(Clone, Debug)]
pub struct HostFile {
    /// Its name.
    pub name: String,
    /// The inode number that stat(2) shows.
    pub shown: u64,
}

/// A mounted store. It is unmounted when it is dropped.
pub struct FuseHost {
    path: PathBuf,
    files: Arc<Mutex<Vec<HostFile>>>,
}

/// The directory's own node; the files' are from 2 on.
const ROOT: u64 = 1;
/// The first of the files.
const FIRST: u64 = 2;

impl FuseHost {
    /// Mounts it on a directory. `offset_of` says which directory offset stands behind the entry with an index.
    pub fn mount(path: &Path, files: Vec<HostFile>, offset_of: fn(usize) -> u64) -> FuseHost {
        let device =
            File::options().read(true).write(true).custom_flags(libc::O_CLOEXEC).open("/dev/fuse").unwrap();
        let options = format!("fd={},rootmode=40000,user_id=0,group_id=0,allow_other\0", device.as_raw_fd());
        let options = std::ffi::CStr::from_bytes_with_nul(options.as_bytes()).unwrap();
        mount("fuse-host", path, "fuse", MountFlags::empty(), options).unwrap();
        let files = Arc::new(Mutex::new(files));
        let server = Server { device, files: Arc::clone(&files), offset_of };
        std::thread::spawn(move || server.serve());
        FuseHost { path: path.to_owned(), files }
    }

    /// Names that are there.
    pub fn names(&self) -> Vec<String> {
        let files = self.files.lock().unwrap();
        files.iter().filter(|file| !file.name.is_empty()).map(|file| file.name.clone()).collect()
    }
}

impl Drop for FuseHost {
    fn drop(&mut self) {
        // The first one ends the connection, also while it is in use.
        let _ = unmount(&self.path, UnmountFlags::FORCE);
        let _ = unmount(&self.path, UnmountFlags::DETACH);
    }
}

struct Server {
    device: File,
    files: Arc<Mutex<Vec<HostFile>>>,
    offset_of: fn(usize) -> u64,
}

impl Server {
    fn serve(mut self) {
        let mut buffer = vec![0; 1 << 20];
        // It ends with ENODEV.
        while let Ok(len) = self.device.read(&mut buffer) {
            let (header, argument) = abi::InHeader::read_from_prefix(&buffer[..len]).unwrap();
            let opcode = Opcode::from_number(header.opcode);
            let no_reply = [Opcode::Forget, Opcode::BatchForget, Opcode::Interrupt];
            if opcode.is_some_and(|opcode| no_reply.contains(&opcode)) {
                continue;
            }
            let reply =
                opcode.map_or(Err(libc::ENOSYS), |opcode| self.answer(opcode, header.nodeid, argument));
            let (error, body) = reply.map_or_else(|errno| (-errno, Vec::new()), |body| (0, body));
            let size = size_of::<abi::OutHeader>() + body.len();
            let out = abi::OutHeader { len: size as u32, error, unique: header.unique };
            let _ = self.device.write_all(&[out.as_bytes(), &body].concat());
        }
    }

    fn answer(&self, opcode: Opcode, node: u64, argument: &[u8]) -> Result<Vec<u8>, i32> {
        let name = || {
            let name = argument.split(|byte| *byte == 0).next().unwrap_or_default();
            String::from_utf8_lossy(name).into_owned()
        };
        match opcode {
            Opcode::Init => {
                let init = abi::InitOut {
                    major: 7,
                    minor: 31,
                    max_readahead: 65536,
                    max_write: 65536,
                    ..abi::InitOut::default()
                };
                Ok(init.as_bytes().to_vec())
            }
            Opcode::Lookup => {
                let files = self.files.lock().unwrap();
                let index = files.iter().position(|file| file.name == name()).ok_or(libc::ENOENT)?;
                let nodeid = FIRST + index as u64;
                let entry = abi::EntryOut { nodeid, attr: attr(&files, nodeid)?, ..abi::EntryOut::default() };
                Ok(entry.as_bytes().to_vec())
            }
            Opcode::Getattr => {
                let attr = attr(&self.files.lock().unwrap(), node)?;
                Ok(abi::AttrOut { attr, ..abi::AttrOut::default() }.as_bytes().to_vec())
            }
            Opcode::Open | Opcode::Opendir => Ok(abi::OpenOut::default().as_bytes().to_vec()),
            Opcode::Read => {
                let files = self.files.lock().unwrap();
                let read = abi::ReadIn::read_from_prefix(argument).map_err(|_| libc::EINVAL)?.0;
                let file = files.get(node.wrapping_sub(FIRST) as usize).ok_or(libc::ESTALE)?;
                Ok(file.name.as_bytes().get(read.offset as usize..).unwrap_or_default().to_vec())
            }
            Opcode::Readdir => self.list(argument),
            Opcode::Unlink => {
                let mut files = self.files.lock().unwrap();
                let file = files.iter_mut().find(|file| file.name == name()).ok_or(libc::ENOENT)?;
                file.name.clear();
                Ok(Vec::new())
            }
            Opcode::Release | Opcode::Releasedir | Opcode::Flush | Opcode::Access => Ok(Vec::new()),
            _ => Err(libc::ENOSYS),
        }
    }

    fn list(&self, argument: &[u8]) -> Result<Vec<u8>, i32> {
        let read = abi::ReadIn::read_from_prefix(argument).map_err(|_| libc::EINVAL)?.0;
        let files = self.files.lock().unwrap();
        let offsets = (0..files.len()).map(self.offset_of);
        let start = if read.offset == 0 {
            0
        } else {
            offsets.clone().position(|offset| offset == read.offset).ok_or(libc::EINVAL)? + 1
        };
        let mut out = Vec::new();
        for (file, off) in files.iter().zip(offsets).skip(start).filter(|(file, _)| !file.name.is_empty()) {
            let dirent = abi::Dirent { ino: file.shown, off, namelen: file.name.len() as u32, typ: 8 };
            let record = [dirent.as_bytes(), file.name.as_bytes()].concat();
            if out.len() + record.len().next_multiple_of(8) > read.size as usize {
                break;
            }
            out.extend_from_slice(&record);
            out.resize(out.len().next_multiple_of(8), 0);
        }
        Ok(out)
    }
}

fn attr(files: &[HostFile], node: u64) -> Result<abi::Attr, i32> {
    let common = abi::Attr { nlink: 1, blksize: 4096, ..abi::Attr::default() };
    if node == ROOT {
        return Ok(abi::Attr { ino: 77, mode: libc::S_IFDIR | 0o755, ..common });
    }
    let file = files.get(node.wrapping_sub(FIRST) as usize).ok_or(libc::ESTALE)?;
    Ok(abi::Attr { ino: file.shown, size: file.name.len() as u64, mode: libc::S_IFREG | 0o644, ..common })
}
