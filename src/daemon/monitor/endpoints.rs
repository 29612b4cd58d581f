//! Where the monitor is reached: opened before the sandbox, with the rights of the user who has started the daemon.

use std::ffi::OsString;
use std::fs::File;
use std::io::Write as _;
use std::os::fd::{AsRawFd as _, OwnedFd, RawFd};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, Mode, OFlags, openat, renameat, unlinkat};
use rustix::io::Errno;
use thiserror::Error;

use super::{MonitorParts, SocketParts};
use crate::config::MonitorConfig;
use crate::daemon::socket::{ListenError, Removal, SideSocket};
use crate::sandbox;
use crate::sys::inherited::adopt;

/// Why one cannot be had.
#[derive(Debug, Error)]
pub enum EndpointError {
    /// A socket.
    // The reason is that of any socket; it names the option of another one.
    #[error("{}", reason.to_string().replace("--socket-path", option))]
    Socket {
        /// The option that names it.
        option: &'static str,
        /// Why: no source, whose text would follow.
        reason: ListenError,
    },
    /// The file.
    #[error(
        "--metrics-file {path} cannot be written: {source}; choose a file in a directory that the daemon's user may write to, also without capabilities"
    )]
    File {
        /// Its path.
        path: String,
        /// What the system call said.
        source: Errno,
    },
    /// A socket that another program has left.
    #[error("a socket that was handed over cannot be used: {0}")]
    Descriptor(Errno),
}

/// Where the monitor is reached.
#[derive(Debug, Default)]
pub struct Endpoints {
    /// For `lanefsctl`.
    pub(super) control: Option<SideSocket>,
    /// For Prometheus.
    pub(super) metrics: Option<SideSocket>,
    /// For node_exporter.
    pub(super) file: Option<PathBuf>,
}

const CONTROL: &str = "--control-socket";
const METRICS: &str = "--metrics-socket";

impl Endpoints {
    /// Opens those that are wanted. `group` may connect to the socket for counters.
    pub fn open(config: &MonitorConfig, group: Option<&str>) -> Result<Endpoints, EndpointError> {
        let open = |option: &'static str, path: &Option<PathBuf>, group| {
            let socket = path.as_ref().map(|path| SideSocket::open(path, group)).transpose();
            socket.map_err(|reason| EndpointError::Socket { option, reason })
        };
        if let Some(path) = &config.metrics_file {
            MetricsFile::open(path)?.try_to_write()?;
        }
        // One by one: what has been created is removed if the next one cannot be.
        let mut endpoints = Endpoints::default();
        endpoints.file.clone_from(&config.metrics_file);
        endpoints.control = open(CONTROL, &config.control_socket, None)?;
        endpoints.metrics = open(METRICS, &config.metrics_socket, group)?;
        Ok(endpoints)
    }

    /// Those of another program in this process.
    pub(super) fn go_on(parts: MonitorParts) -> Result<Endpoints, EndpointError> {
        let mut endpoints = Endpoints::default();
        for SocketParts { option, path, file, descriptor } in parts.sockets {
            let listener = adopt(descriptor).map_err(EndpointError::Descriptor)?;
            let (option, place) = match option.as_str() {
                CONTROL => (CONTROL, &mut endpoints.control),
                _ => (METRICS, &mut endpoints.metrics),
            };
            let socket = SideSocket::go_on(&path, listener, file);
            *place = Some(socket.map_err(|reason| EndpointError::Socket { option, reason })?);
        }
        endpoints.file = parts.file;
        Ok(endpoints)
    }

    /// What another program needs.
    pub(super) fn parts(&self) -> MonitorParts {
        let part = |option: &str, socket: &SideSocket| SocketParts {
            option: option.to_owned(),
            path: socket.path().to_owned(),
            file: socket.file(),
            descriptor: socket.listener().as_raw_fd(),
        };
        let control = self.control.iter().map(|socket| part(CONTROL, socket));
        MonitorParts {
            sockets: control.chain(self.metrics.iter().map(|socket| part(METRICS, socket))).collect(),
            file: self.file.clone(),
            ..MonitorParts::default()
        }
    }

    /// Whether there is none.
    pub(super) fn is_empty(&self) -> bool {
        self.control.is_none() && self.metrics.is_none() && self.file.is_none()
    }

    /// The sockets.
    pub(super) fn sockets(&self) -> impl Iterator<Item = &SideSocket> {
        self.control.iter().chain(&self.metrics)
    }

    /// Opens what is only the monitor's: directories.
    pub(super) fn own(&self) -> Result<OwnFiles, EndpointError> {
        let removals = self.sockets().filter_map(|socket| socket.removal().ok()).collect();
        Ok(OwnFiles { removals, file: self.file.as_deref().map(MetricsFile::open).transpose()? })
    }
}

/// A socket that another one has taken the place of stays. So does the file: what it says was true.
impl Drop for Endpoints {
    fn drop(&mut self) {
        self.sockets().filter_map(|socket| socket.removal().ok()).for_each(|removal| removal.perform());
    }
}

/// What only the monitor has open, which shares no descriptors.
#[derive(Debug)]
pub(super) struct OwnFiles {
    removals: Vec<Removal>,
    pub file: Option<MetricsFile>,
}

impl OwnFiles {
    /// All descriptors.
    pub(super) fn descriptors(&self) -> impl Iterator<Item = RawFd> + '_ {
        let directory = self.file.iter().map(|file| file.directory.as_raw_fd());
        self.removals.iter().map(Removal::descriptor).chain(directory)
    }

    /// Removes the sockets.
    pub(super) fn remove_sockets(&self) {
        self.removals.iter().for_each(Removal::perform);
    }
}

/// The file with the counters, which always is there as a whole.
#[derive(Debug)]
pub(super) struct MetricsFile {
    directory: OwnedFd,
    name: OsString,
    path: PathBuf,
}

impl MetricsFile {
    fn open(path: &Path) -> Result<MetricsFile, EndpointError> {
        let failed = |source| EndpointError::File { path: path.display().to_string(), source };
        let name = path.file_name().ok_or(Errno::ISDIR).map_err(failed)?.to_owned();
        let parent = path.parent().filter(|parent| *parent != Path::new("")).unwrap_or(Path::new("."));
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let directory = openat(CWD, parent, flags, Mode::empty()).map_err(failed)?;
        Ok(MetricsFile { directory, name, path: path.to_owned() })
    }

    /// Whether the monitor can write it, before anything depends on it.
    fn try_to_write(&self) -> Result<(), EndpointError> {
        let failed = |source| EndpointError::File { path: self.path.display().to_string(), source };
        let temporary = self.temporary();
        let attempt = || {
            drop(self.create(&temporary)?);
            unlinkat(&self.directory, &temporary, AtFlags::empty())
        };
        sandbox::without_capabilities(attempt).and_then(|result| result).map_err(failed)
    }

    fn temporary(&self) -> OsString {
        // node_exporter reads what ends with .prom.
        let mut name = self.name.clone();
        name.push(".tmp");
        name
    }

    fn create(&self, name: &OsString) -> Result<File, Errno> {
        // Whatever is in its place was left behind, or is a trap: a link is not followed, and a FIFO not waited for.
        let _ = unlinkat(&self.directory, name, AtFlags::empty());
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
        let mode = Mode::RUSR | Mode::WUSR | Mode::RGRP | Mode::ROTH;
        openat(&self.directory, name, flags, mode).map(File::from)
    }

    /// Replaces its content.
    pub(super) fn write(&self, text: &str) -> std::io::Result<()> {
        let temporary = self.temporary();
        let written = self.create(&temporary)?.write_all(text.as_bytes());
        let replaced =
            written.and_then(|()| Ok(renameat(&self.directory, &temporary, &self.directory, &self.name)?));
        replaced.inspect_err(|_| {
            let _ = unlinkat(&self.directory, &temporary, AtFlags::empty());
        })
    }
}
