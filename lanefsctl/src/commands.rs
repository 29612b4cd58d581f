//! The commands, from the command line to the exit status.

use std::ffi::OsString;
use std::io::{self, Write as _};
use std::os::unix::fs::FileTypeExt as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::Parser as _;
use clap::error::ErrorKind;

use crate::cli::{self, Command, DIRECTORY, Options};
use crate::client::{Answer, Client};
use crate::error::{Error, Result};
use crate::protocol::{Draining, Limited, LogLevel, Ops, Request, Slow, Status};
use crate::{limit, show, top, upgrade};

/// Between two requests while a share is drained.
const DRAIN_INTERVAL: Duration = Duration::from_millis(100);

/// Runs `lanefsctl` with the words of its command line, the program's name first.
pub fn run(words: impl IntoIterator<Item = OsString>) -> ExitCode {
    let options = match Options::try_parse_from(words).and_then(check) {
        Ok(options) => options,
        Err(error) => {
            // Without an output, there is no way to report that.
            let _ = error.print();
            return if error.use_stderr() { ExitCode::from(2) } else { ExitCode::SUCCESS };
        }
    };
    match execute(&options) {
        Ok(code) => code,
        Err(error) if error.is_broken_pipe() => ExitCode::SUCCESS,
        Err(error) => {
            report(&error);
            ExitCode::FAILURE
        }
    }
}

/// Refuses combinations that the parser cannot.
fn check(options: Options) -> std::result::Result<Options, clap::Error> {
    if options.json && matches!(options.command, Command::Top(_) | Command::Upgrade) {
        let message = "--json cannot be used with top and upgrade";
        return Err(cli::command().error(ErrorKind::ArgumentConflict, message));
    }
    Ok(options)
}

fn report(error: &Error) {
    // Without standard error, there is no way to report that.
    let _ = writeln!(io::stderr(), "lanefsctl: {error}");
}

fn execute(options: &Options) -> Result<ExitCode> {
    if let Command::Top(top) = &options.command {
        let directory = options.sockets.is_empty().then(|| PathBuf::from(DIRECTORY));
        let sockets = named_or_found(&options.sockets, Path::new(DIRECTORY))?;
        return top::run(top, sockets, directory);
    }
    let sockets = sockets(options, Path::new(DIRECTORY))?;
    let mut code = ExitCode::SUCCESS;
    for (index, socket) in sockets.iter().enumerate() {
        if index > 0 && !options.json && is_paragraph(&options.command) {
            print("\n")?;
        }
        // One share that fails is no reason to leave out the others.
        match of_share(options, socket) {
            Ok(ExitCode::SUCCESS) => {}
            Ok(other) => code = other,
            Err(error) if error.is_broken_pipe() => return Err(error),
            Err(error) => {
                report(&error);
                code = ExitCode::FAILURE;
            }
        }
    }
    Ok(code)
}

/// Writes to the standard output.
pub(crate) fn print(text: &str) -> Result<()> {
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes()).and_then(|()| out.flush()).map_err(|source| Error::Output { source })
}

/// True for a command whose output has several lines for a share.
fn is_paragraph(command: &Command) -> bool {
    matches!(command, Command::Status | Command::Ops | Command::Slow | Command::Limit { .. })
}

/// True for a command that changes the share.
fn is_change(command: &Command) -> bool {
    match command {
        Command::Limit { settings } => !settings.is_empty(),
        Command::LogLevel { .. } | Command::Drain { .. } | Command::Resume | Command::Upgrade => true,
        Command::Status | Command::Ops | Command::Slow | Command::Top(_) => false,
    }
}

/// The sockets of the shares that a command is for.
fn sockets(options: &Options, directory: &Path) -> Result<Vec<PathBuf>> {
    let found = named_or_found(&options.sockets, directory)?;
    if options.sockets.is_empty() && found.len() > 1 && is_change(&options.command) {
        let names: Vec<_> = found.iter().map(|path| path.display().to_string()).collect();
        return Err(Error::Ambiguous { count: found.len(), names: names.join(", ") });
    }
    Ok(found)
}

fn named_or_found(named: &[PathBuf], directory: &Path) -> Result<Vec<PathBuf>> {
    if !named.is_empty() {
        return Ok(named.to_vec());
    }
    let found = discover(directory)?;
    if found.is_empty() {
        return Err(Error::NoSocket { directory: directory.to_owned() });
    }
    Ok(found)
}

/// The control sockets in a directory, by name.
pub(crate) fn discover(directory: &Path) -> Result<Vec<PathBuf>> {
    let entries = match std::fs::read_dir(directory) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(source) => return Err(Error::Directory { directory: directory.to_owned(), source }),
    };
    let is_control = |path: &PathBuf| {
        path.extension().is_some_and(|extension| extension == "ctl")
            && path.metadata().is_ok_and(|metadata| metadata.file_type().is_socket())
    };
    let mut found: Vec<_> = entries.flatten().map(|entry| entry.path()).filter(is_control).collect();
    found.sort();
    Ok(found)
}

/// Runs a command for one share.
fn of_share(options: &Options, socket: &Path) -> Result<ExitCode> {
    let request = match &options.command {
        Command::Status => Request::Status,
        Command::Ops => Request::Ops,
        Command::Slow => Request::Slow,
        Command::Limit { settings } => {
            Request::Limit { set: (!settings.is_empty()).then(|| settings.join(",")) }
        }
        Command::LogLevel { level } => Request::LogLevel { level: level.clone() },
        Command::Drain { timeout } => return drain(socket, *timeout, options.json),
        Command::Resume => Request::Resume,
        Command::Upgrade => return upgraded(socket),
        // It is run before.
        Command::Top(_) => return Ok(ExitCode::SUCCESS),
    };
    let mut client = Client::connect(socket)?;
    let answer = client.ask(&request)?;
    if options.json {
        return raw(&answer);
    }
    let text = text(&options.command, &mut client, &answer)?;
    print(&text)?;
    Ok(ExitCode::SUCCESS)
}

/// Prints an answer as it came; the exit status is that of its content.
fn raw(answer: &Answer) -> Result<ExitCode> {
    print(&format!("{}\n", answer.line()))?;
    Ok(if answer.is_error() { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

/// An answer for people.
fn text(command: &Command, client: &mut Client, answer: &Answer) -> Result<String> {
    Ok(match command {
        Command::Ops => {
            let text = show::ops(&answer.get::<Ops>()?);
            show::heading(&name(client)) + &text
        }
        Command::Slow => {
            let text = show::slow(&answer.get::<Slow>()?);
            show::heading(&name(client)) + &text
        }
        Command::Limit { .. } => {
            let limited: Limited = answer.get()?;
            show::heading(&name(client)) + &limit::text(&limited)
        }
        Command::LogLevel { .. } => {
            let level: LogLevel = answer.get()?;
            let level = crate::units::printable(&level.log_level);
            format!("share {}: log level {level}\n", show::name(&name(client)))
        }
        Command::Resume => {
            answer.get::<Draining>()?;
            format!("share {}: requests are taken again\n", show::name(&name(client)))
        }
        _ => show::status(&answer.get::<Status>()?),
    })
}

/// The share's name, for a heading; a daemon that has just answered, and now does not, has none.
fn name(client: &mut Client) -> String {
    client
        .get::<Status>(&Request::Status)
        .map_or_else(|_| client.path().display().to_string(), |status| status.share)
}

/// Takes no more requests, and waits for those in flight.
fn drain(socket: &Path, timeout: Duration, json: bool) -> Result<ExitCode> {
    let deadline = Instant::now() + timeout;
    let mut client = Client::connect(socket)?;
    loop {
        let answer = client.ask(&Request::Drain)?;
        if json && answer.is_error() {
            return raw(&answer);
        }
        let state: Draining = answer.get()?;
        let is_late = Instant::now() >= deadline;
        if json && (state.in_flight == 0 || is_late) {
            raw(&answer)?;
        }
        if state.in_flight == 0 {
            if !json {
                let share = show::name(&name(&mut client));
                print(&format!("share {share}: no requests in flight, and no new ones are taken\n"))?;
            }
            return Ok(ExitCode::SUCCESS);
        }
        if is_late {
            let share = show::name(&name(&mut client));
            let seconds = timeout.as_secs_f64();
            return Err(Error::NotDrained { share, in_flight: state.in_flight, seconds });
        }
        std::thread::sleep(DRAIN_INTERVAL.min(deadline.saturating_duration_since(Instant::now())));
    }
}

/// Upgrades, with the exit status of the daemon's program.
fn upgraded(socket: &Path) -> Result<ExitCode> {
    let status = upgrade::upgrade(socket)?;
    let code = status.code().and_then(|code| u8::try_from(code).ok());
    Ok(code.map_or(ExitCode::FAILURE, ExitCode::from))
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;

    fn options(words: &[&str]) -> Options {
        Options::try_parse_from(["lanefsctl"].iter().chain(words)).unwrap()
    }

    #[test]
    fn sockets_are_found_by_their_name() {
        let directory = tempfile::tempdir().unwrap();
        let status = options(&["status"]);
        let error = sockets(&status, directory.path()).unwrap_err().to_string();
        assert!(error.starts_with("no control socket (*.ctl) in "), "{error}");
        assert!(sockets(&status, &directory.path().join("missing")).is_err());
        let _listeners = ["b.ctl", "a.ctl", "share.sock"]
            .map(|name| UnixListener::bind(directory.path().join(name)).unwrap());
        std::fs::write(directory.path().join("file.ctl"), "").unwrap();
        let expected = ["a.ctl", "b.ctl"].map(|name| directory.path().join(name));
        assert_eq!(sockets(&status, directory.path()).unwrap(), expected);
    }

    #[test]
    fn a_change_of_several_shares_wants_their_names() {
        let directory = tempfile::tempdir().unwrap();
        let _a = UnixListener::bind(directory.path().join("a.ctl")).unwrap();
        let changes =
            [&["drain"][..], &["limit", "burst=1M"], &["loglevel", "debug"], &["upgrade"], &["resume"]];
        for words in changes {
            assert_eq!(sockets(&options(words), directory.path()).unwrap().len(), 1);
        }
        let _b = UnixListener::bind(directory.path().join("b.ctl")).unwrap();
        for words in changes {
            let error = sockets(&options(words), directory.path()).unwrap_err().to_string();
            assert!(error.starts_with("this would change 2 shares; name one"), "{error}");
        }
        assert_eq!(sockets(&options(&["limit"]), directory.path()).unwrap().len(), 2);
        assert_eq!(sockets(&options(&["drain", "-s/x", "-s/y"]), directory.path()).unwrap().len(), 2);
    }
}
