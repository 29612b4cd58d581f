//! Readiness for systemd (sd_notify(3), units with `Type=notify`).

use std::env;
use std::os::fd::{AsRawFd as _, RawFd};
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::net::{SocketAddr, UnixDatagram};

use log::warn;

/// A service manager that waits until front ends may connect. Its socket is out of reach in the sandbox, so the connection
/// is made before; a crate that connects when it sends is of no use.
#[derive(Debug)]
pub struct Readiness(Option<UnixDatagram>);

impl Readiness {
    /// Connects to the service manager, if there is one that waits for this process: `NOTIFY_SOCKET` names its socket.
    pub fn announce_later() -> Readiness {
        let Some(name) = env::var_os("NOTIFY_SOCKET").filter(|name| !name.is_empty()) else {
            return Readiness(None);
        };
        let address = match name.as_bytes() {
            [b'@', name @ ..] => SocketAddr::from_abstract_name(name),
            _ => SocketAddr::from_pathname(&name),
        };
        let connect = |address| {
            let socket = UnixDatagram::unbound()?;
            socket.connect_addr(&address)?;
            socket.set_nonblocking(true)?;
            Ok(socket)
        };
        match address.and_then(connect) {
            Ok(socket) => Readiness(Some(socket)),
            Err(error) => {
                warn!("the service manager cannot be told that lanefsd is ready: NOTIFY_SOCKET: {error}");
                Readiness(None)
            }
        }
    }

    /// The descriptor that is open until [`Readiness::announce`].
    pub fn descriptor(&self) -> Option<RawFd> {
        self.0.as_ref().map(|socket| socket.as_raw_fd())
    }

    /// Tells the service manager, and closes the connection with it.
    pub fn announce(self) {
        if let Readiness(Some(socket)) = self
            && let Err(error) = socket.send(b"READY=1")
        {
            warn!("the service manager was not told that lanefsd is ready: {error}");
        }
    }
}
