//! The daemon's start-up, in order: command line, what the launcher has left, messages, limits, socket, sandbox,
//! serve.

use std::os::fd::AsFd;
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::{Context, Result};
use lanefsd::cli::{self, CAPABILITIES, Command};
use lanefsd::config::{Config, FsConfig, Listen, Store};
use lanefsd::frontend::{self, Signals};
use lanefsd::fs::FileSystem;
use lanefsd::fs::null::NullStore;
use lanefsd::fs::passthrough::PassthroughFs;
use lanefsd::fs::read_only::ReadOnly;
use lanefsd::limits::Limits;
use lanefsd::listen::Socket;
use lanefsd::logging;
use lanefsd::remarks;
use lanefsd::sandbox::{self, Needs, Sandboxed, Side};
use lanefsd::service::Service;
use lanefsd::sys::{descriptors, inherited, process, signals};

fn main() -> ExitCode {
    match run() {
        Ok(status) => status,
        Err(error) => {
            let causes: Vec<String> = error.chain().map(ToString::to_string).collect();
            let lacks = error.chain().any(descriptors::is_lack);
            let remedy = if lacks { format!("; {}", descriptors::TOO_FEW) } else { String::new() };
            logging::report_fatal(&(causes.join(": ") + &remedy));
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<ExitCode> {
    let mut config = match cli::parse(std::env::args_os())? {
        Command::PrintCapabilities => {
            println!("{CAPABILITIES}");
            return Ok(ExitCode::SUCCESS);
        }
        Command::Serve(config) => config,
    };
    // Before anything is opened or started.
    signals::reset().context("signals cannot be set up")?;
    inherited::close_all(match config.listen {
        Listen::Fd(fd) => Some(fd),
        Listen::Path(_) => None,
    })
    .context("descriptors that the daemon was started with cannot be closed")?;
    logging::start(config.log_level, config.syslog);
    config.remarks.extend(sandbox::raise_descriptor_limit(config.rlimit_nofile)?);
    config.remarks.extend(remarks::about(&config));
    if let Some(cpus) = &config.cpus {
        sandbox::bind_to_cpus(cpus)?;
    }
    process::prepare();
    // From here on there is something to clean up.
    signals::hold();
    let mut socket = Socket::open(&config.listen, config.socket_group.as_deref())?;
    match sandbox::enter(config.sandbox, &config.shared_dir, &config.id_maps)? {
        Side::Waiting(parent) => {
            // It needs no path any more, and where it was started may be unmounted.
            let _ = rustix::process::chdir("/");
            let signals = Signals::catch()?;
            let status = parent.wait(signals.as_fd())?;
            Ok(ExitCode::from(u8::try_from(status).unwrap_or(1)))
        }
        Side::Serving(sandboxed) => {
            if sandboxed.forked {
                socket.keep_path();
            }
            serve(&config, &socket, sandboxed)?;
            Ok(ExitCode::SUCCESS)
        }
    }
}

fn serve(config: &Config, socket: &Socket, sandboxed: Sandboxed) -> Result<()> {
    let fs_config = FsConfig { readonly: config.readonly, ..config.fs.clone() };
    process::prepare_for_requests(&sandboxed.proc_self_fd)
        .context("the working directory cannot be changed")?;
    let limits = Limits::of_the_process(&sandboxed.proc_self_fd).context("the share cannot be served")?;
    let mut fs = PassthroughFs::new(sandboxed.root, sandboxed.proc_self_fd, limits, fs_config)
        .context("the share cannot be served")?;
    let file_handles = fs.uses_file_handles();
    // Before the first thread is started: capabilities belong to threads.
    let needs = Needs { readonly: config.readonly, xattr: config.fs.xattr, file_handles };
    sandbox::give_up_capabilities(needs, config.capabilities)?;
    fs.try_labels().context("the share cannot be served")?;
    let signals = Signals::catch()?;
    let fs: Arc<dyn FileSystem> = match (config.store, config.readonly) {
        (Store::Host, false) => Arc::new(fs),
        (Store::Host, true) => Arc::new(ReadOnly::new(fs)),
        (Store::Null { latency }, false) => Arc::new(NullStore::new(fs, latency)),
        (Store::Null { latency }, true) => Arc::new(ReadOnly::new(NullStore::new(fs, latency))),
    };
    let service = Arc::new(Service::new(fs));
    sandbox::install_seccomp(config.seccomp, file_handles)?;
    remarks::print(&config.remarks);
    frontend::serve(socket.listener(), &signals, &config.device, config.keep_listening, &service)?;
    Ok(())
}
