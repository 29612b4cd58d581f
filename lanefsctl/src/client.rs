//! A connection to a control socket.
//!
//! The time for an answer, and for the connection, is limited as a whole: a daemon that is stopped, or that sends one
//! byte now and then, ends in a sentence. The size of an answer is limited as well.

use std::io::{self, Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::error::{Error, Result};
use crate::protocol::{MAX_REQUEST, Request};
use crate::units::printable;

/// Time for an answer.
pub(crate) const TIMEOUT: Duration = Duration::from_secs(5);
/// Bytes that an answer may have.
const MAX_ANSWER: usize = 16 << 20;

/// A connection.
#[derive(Debug)]
pub(crate) struct Client {
    socket: PathBuf,
    stream: UnixStream,
    /// What came after the last answer.
    unread: Vec<u8>,
}

/// An answer.
#[derive(Debug)]
pub(crate) struct Answer {
    socket: PathBuf,
    /// As it came, without the newline.
    line: String,
    content: std::result::Result<Value, String>,
}

impl Client {
    /// Connects to the control socket of a daemon.
    pub(crate) fn connect(path: &Path) -> Result<Client> {
        let open = || -> io::Result<UnixStream> {
            let address = SocketAddrUnix::new(path)?;
            let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
            // A daemon that is stopped accepts nothing; connect(2) waits once its backlog is full.
            set_socket_timeout(&socket, Timeout::Send, Some(TIMEOUT))?;
            connect(&socket, &address)?;
            Ok(UnixStream::from(socket))
        };
        match open() {
            Ok(stream) => Ok(Client { socket: path.to_owned(), stream, unread: Vec::new() }),
            Err(error) if is_timeout(&error) => {
                Err(Error::Timeout { socket: path.to_owned(), timeout: TIMEOUT })
            }
            Err(error) => Err(Error::connect(path, error)),
        }
    }

    /// Sends a request and waits for its answer. After an error, the connection is of no more use.
    pub(crate) fn ask(&mut self, request: &Request) -> Result<Answer> {
        let mut line = serde_json::to_vec(request).map_err(|error| self.talk(error.into()))?;
        line.push(b'\n');
        if line.len() > MAX_REQUEST {
            return Err(self.talk(io::Error::new(io::ErrorKind::InvalidInput, "the request is too long")));
        }
        match self.stream.write_all(&line) {
            // The answer, if there is one, says why.
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => {}
            other => other.map_err(|error| self.talk(error))?,
        }
        let line = self.line(TIMEOUT)?;
        Answer::parse(&self.socket, line)
    }

    /// Its path.
    pub(crate) fn path(&self) -> &Path {
        &self.socket
    }

    /// Asks and takes the content of the answer.
    pub(crate) fn get<T: DeserializeOwned>(&mut self, request: &Request) -> Result<T> {
        self.ask(request)?.get()
    }

    /// Reads up to a newline.
    fn line(&mut self, timeout: Duration) -> Result<Vec<u8>> {
        let deadline = Instant::now() + timeout;
        let late = || Error::Timeout { socket: self.socket.clone(), timeout };
        let mut piece = vec![0; 64 << 10];
        let mut line = std::mem::take(&mut self.unread);
        let mut searched = 0;
        loop {
            let fresh = line.get(searched..).unwrap_or_default();
            if let Some(end) = fresh.iter().position(|byte| *byte == b'\n') {
                self.unread = line.split_off(searched + end + 1);
                line.pop();
                return Ok(line);
            }
            searched = line.len();
            if searched > MAX_ANSWER {
                let reason = format!("it is longer than {} MiB", MAX_ANSWER >> 20);
                return Err(Error::Garbage { socket: self.socket.clone(), reason });
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(late());
            }
            self.stream.set_read_timeout(Some(left)).map_err(|error| self.talk(error))?;
            match self.stream.read(&mut piece) {
                Ok(0) => return Err(Error::Closed { socket: self.socket.clone() }),
                Ok(length) => line.extend_from_slice(piece.get(..length).unwrap_or_default()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if is_timeout(&error) => return Err(late()),
                Err(error) if error.kind() == io::ErrorKind::ConnectionReset => {
                    return Err(Error::Closed { socket: self.socket.clone() });
                }
                Err(error) => return Err(self.talk(error)),
            }
        }
    }

    fn talk(&self, source: io::Error) -> Error {
        if is_timeout(&source) {
            return Error::Timeout { socket: self.socket.clone(), timeout: TIMEOUT };
        }
        Error::Talk { socket: self.socket.clone(), source }
    }
}

fn is_timeout(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut)
}

impl Answer {
    fn parse(socket: &Path, line: Vec<u8>) -> Result<Answer> {
        let garbage = |reason: String| Error::Garbage { socket: socket.to_owned(), reason };
        let line = String::from_utf8(line).map_err(|_| garbage("it is not UTF-8".to_owned()))?;
        let value: Value = serde_json::from_str(&line).map_err(|error| garbage(error.to_string()))?;
        let content = match value {
            Value::Object(mut fields) => match (fields.remove("ok"), fields.remove("error")) {
                (Some(content), None) => Ok(content),
                (None, Some(Value::String(message))) => Err(printable(&message)),
                (None, Some(message)) => Err(printable(&message.to_string())),
                _ => return Err(garbage("it has neither \"ok\" nor \"error\"".to_owned())),
            },
            _ => return Err(garbage("it is not a JSON object".to_owned())),
        };
        Ok(Answer { socket: socket.to_owned(), line, content })
    }

    /// The answer as it came.
    pub(crate) fn line(&self) -> &str {
        &self.line
    }

    /// True if the daemon refused.
    pub(crate) fn is_error(&self) -> bool {
        self.content.is_err()
    }

    /// Its content, or the daemon's error.
    pub(crate) fn get<T: DeserializeOwned>(&self) -> Result<T> {
        let content = self
            .content
            .clone()
            .map_err(|message| Error::Refused { socket: self.socket.clone(), message })?;
        serde_json::from_value(content)
            .map_err(|error| Error::Garbage { socket: self.socket.clone(), reason: error.to_string() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Answer> {
        Answer::parse(Path::new("/s"), line.as_bytes().to_vec())
    }

    #[test]
    fn an_answer_has_ok_or_error() {
        let answer = parse(r#"{"ok":{"draining":true}}"#).unwrap();
        assert!(answer.get::<crate::protocol::Draining>().unwrap().draining);
        assert_eq!(answer.line(), r#"{"ok":{"draining":true}}"#);
        let error = parse("{\"error\":\"no\\u001b[2Jway\"}").unwrap().get::<Value>().unwrap_err();
        assert_eq!(error.to_string(), "/s: no\u{fffd}[2Jway");
    }

    #[test]
    fn anything_else_is_garbage() {
        for line in ["", "hello", "[]", "{}", r#"{"ok":{},"error":"x"}"#, "HTTP/1.1 400 Bad Request"] {
            let error = parse(line).unwrap_err().to_string();
            assert!(error.starts_with("the answer from /s is not one of a control socket"), "{error}");
        }
        let answer = parse(r#"{"ok":{"draining":3}}"#).unwrap();
        assert!(answer.get::<crate::protocol::Draining>().is_err());
    }
}
