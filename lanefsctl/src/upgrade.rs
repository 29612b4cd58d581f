//! `lanefsctl upgrade`: runs `lanefsd upgrade` for the process of a share.

use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus};

use crate::client::Client;
use crate::error::{Error, Result};
use crate::protocol::{Request, Status};

/// The daemon's program: beside this one, else the first in PATH.
fn program() -> PathBuf {
    let beside = std::env::current_exe().ok().map(|own| own.with_file_name("lanefsd"));
    beside.filter(|path| path.is_file()).unwrap_or_else(|| PathBuf::from("lanefsd"))
}

/// Refuses the id of another program's process.
///
/// The id comes from a process that a guest may have taken over, and `lanefsd upgrade` sends a signal to it. A process
/// that does not exist, or belongs to others, is an error of `lanefsd upgrade`.
fn check_program(socket: &Path, pid: u32) -> Result<()> {
    let Ok(program) = std::fs::read_link(format!("/proc/{pid}/exe")) else { return Ok(()) };
    let name = program.file_name().unwrap_or_default().to_string_lossy();
    if name.starts_with("lanefsd") {
        return Ok(());
    }
    Err(Error::OtherProgram { socket: socket.to_owned(), pid, program })
}

/// Upgrades the daemon of a control socket; its words go to the same output.
pub(crate) fn upgrade(socket: &Path) -> Result<ExitStatus> {
    let status: Status = Client::connect(socket)?.get(&Request::Status)?;
    let pid = status.pid.filter(|pid| *pid > 0);
    let pid = pid.ok_or_else(|| Error::NoPid { socket: socket.to_owned() })?;
    check_program(socket, pid)?;
    let program = program();
    let mut command = Command::new(&program);
    command.args(["upgrade", "--pid", &pid.to_string()]);
    command.status().map_err(|source| Error::Program { program, source })
}
