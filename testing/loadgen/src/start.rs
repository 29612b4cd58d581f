//! `loadgen start`: how long a back end takes from its start until a front end can connect.

use std::os::unix::net::UnixStream;
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use serde::Serialize;

use crate::error::{LoadError, Result};
use crate::options::StartOptions;

/// Between two attempts to connect.
const PAUSE: Duration = Duration::from_micros(50);
/// How long a start may take.
const PATIENCE: Duration = Duration::from_secs(10);

/// How long a back end whose front end has left may take to end.
const GOODBYE: Duration = Duration::from_secs(2);

/// One start.
#[derive(Debug, Serialize)]
pub struct StartReport {
    /// Milliseconds from fork(2) until connect(2) succeeded.
    milliseconds: f64,
}

/// Ends the back end, whatever comes.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        // It ends by itself when its front end has left, and takes along what it has started.
        let deadline = Instant::now() + GOODBYE;
        while matches!(self.0.try_wait(), Ok(None)) && Instant::now() < deadline {
            sleep(Duration::from_millis(1));
        }
        // Both fail only if it has ended already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Starts the back end once, and ends it.
pub fn start(options: &StartOptions) -> Result<StartReport> {
    let directory = tempfile::tempdir().map_err(LoadError::system("make a temporary directory"))?;
    let socket = directory.path().join("socket");
    let mut command = Command::new(&options.backend);
    command.arg("--shared-dir").arg(&options.share).arg("--socket-path").arg(&socket);
    command.args(&options.backend_arg).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    let begin = Instant::now();
    let child = command.spawn().map_err(LoadError::system("start the back end"))?;
    let mut running = Running(child);
    while UnixStream::connect(&socket).is_err() {
        let ended = running.0.try_wait().map_err(LoadError::system("wait for the back end"))?;
        if ended.is_some() || begin.elapsed() > PATIENCE {
            return Err(LoadError::Options(format!("{} does not listen", options.backend.display())));
        }
        sleep(PAUSE);
    }
    let milliseconds = begin.elapsed().as_secs_f64() * 1e3;
    Ok(StartReport { milliseconds })
}
