//! The life of the process, in order: process, log, socket, sandbox, share, front ends.

use std::os::fd::AsFd;
use std::sync::Arc;

use log::debug;
use thiserror::Error;

use super::frontend::{self, FrontendError};
use super::remarks;
use super::share::{Share, Statistics};
use super::socket::{ListenError, Socket};
use crate::config::{Config, FsConfig, Store};
use crate::fs::FileSystem;
use crate::fs::null::NullStore;
use crate::fs::passthrough::{PassthroughFs, StartError};
use crate::fs::read_only::ReadOnly;
use crate::limits::Limits;
use crate::logging::{self, Remark, Scope};
use crate::process::{self, ProcessError, Signals};
use crate::sandbox::{
    self, CapabilityError, Parent, RequiredCaps, Role, SandboxError, Sandboxed, SeccompError,
};
use crate::server::Server;

/// Why the daemon did not start, or failed.
#[derive(Debug, Error)]
#[allow(missing_docs, reason = "each is the error of the step that it is named after")]
pub enum RunError {
    #[error(transparent)]
    Process(#[from] ProcessError),
    #[error(transparent)]
    Listen(#[from] ListenError),
    #[error(transparent)]
    Sandbox(#[from] SandboxError),
    #[error("the share cannot be served")]
    Share(#[from] StartError),
    #[error(transparent)]
    Capabilities(#[from] CapabilityError),
    #[error(transparent)]
    Seccomp(#[from] SeccompError),
    #[error(transparent)]
    Frontend(#[from] FrontendError),
}

/// Runs the daemon until a signal ends it or its front end has disconnected, and returns the status to exit with.
///
/// `wrap` may put a file system around that of the share, for daemons that are built on this one.
///
/// Must be called once, while the process has one thread and has opened nothing of its own.
pub fn run(
    mut config: Config,
    wrap: impl FnOnce(Arc<dyn FileSystem>) -> Arc<dyn FileSystem>,
) -> Result<u8, RunError> {
    process::reset(config.listen.inherited())?;
    logging::start(config.log_level, config.syslog);
    config.remarks.extend(process::prepare(&config.process)?);
    config.remarks.extend(remarks::about(&config));
    let mut socket = Socket::open(&config.listen, config.socket_group.as_deref())?;
    match sandbox::enter(config.sandbox, &config.shared_dir, &config.id_maps)? {
        Role::Supervisor(parent) => supervise(parent),
        Role::Server(sandboxed) => {
            if sandboxed.forked {
                socket.keep_path();
            }
            serve(config, socket, sandboxed, wrap)?;
            Ok(0)
        }
    }
}

/// The supervisor's part: waits for the server, outside the sandbox, and removes the socket at the end.
fn supervise(parent: Parent) -> Result<u8, RunError> {
    process::leave_directory();
    let signals = Signals::catch()?;
    let status = parent.wait(signals.as_fd())?;
    Ok(u8::try_from(status).unwrap_or(1))
}

/// Serves the share inside the sandbox. Privileges are dropped on the way, each as soon as it is not needed any more.
fn serve(
    config: Config,
    socket: Socket,
    sandboxed: Sandboxed,
    wrap: impl FnOnce(Arc<dyn FileSystem>) -> Arc<dyn FileSystem>,
) -> Result<(), RunError> {
    let name = Share::name_for(config.device.tag.as_deref(), &config.shared_dir);
    let _scope = Scope::of_share(&name).enter();
    process::prepare_for_requests(&sandboxed.proc_self_fd)?;
    let fs_config = FsConfig { readonly: config.readonly, ..config.fs.clone() };
    let limits = Limits::of_the_process(&sandboxed.proc_self_fd).map_err(StartError::System)?;
    let mut fs = PassthroughFs::new(sandboxed.root, sandboxed.proc_self_fd, limits, fs_config)?;
    let file_handles = fs.uses_file_handles();
    // Before the first thread is started: capabilities belong to threads.
    let required = RequiredCaps { readonly: config.readonly, xattr: config.fs.xattr, file_handles };
    sandbox::give_up_capabilities(required, config.capabilities)?;
    fs.try_labels()?;
    let signals = Signals::catch()?;
    let server = Arc::new(Server::new(wrap(stack(fs, config.store, config.readonly))));
    sandbox::install_seccomp(config.seccomp, file_handles)?;
    config.remarks.iter().for_each(Remark::log);
    let share = Share {
        name,
        directory: config.shared_dir,
        socket,
        keep_listening: config.keep_listening,
        device: config.device,
        server,
        statistics: Statistics::default(),
    };
    let served = frontend::serve(&share, &signals);
    let counted = &share.statistics;
    debug!("{} front ends connected, {} failed", counted.front_ends(), counted.failures());
    Ok(served?)
}

/// The file system of a share: what its options put around the host's directory.
fn stack(fs: PassthroughFs, store: Store, readonly: bool) -> Arc<dyn FileSystem> {
    match (store, readonly) {
        (Store::Host, false) => Arc::new(fs),
        (Store::Host, true) => Arc::new(ReadOnly::new(fs)),
        (Store::Null { latency }, false) => Arc::new(NullStore::new(fs, latency)),
        (Store::Null { latency }, true) => Arc::new(ReadOnly::new(NullStore::new(fs, latency))),
    }
}
