//! The vhost-user socket: one method per message, and raw messages for a malicious front end.

use std::fs::File;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::sock_ctrl_msg::ScmSocket;
use zerocopy::{FromBytes, Immutable, IntoBytes};

use crate::error::{Error, Result};
use crate::memory::Region;
use crate::message::{
    ConfigHeader, Header, Inflight, LOAD, LogArea, MemoryRegion, NEED_REPLY, NO_FD, REPLY, SAVE,
    TransferState, VERSION, VringAddress, VringState, code, name, protocol,
};
use crate::ring::Ring;

/// How long the back end may take to answer a message.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(20);

/// A connected vhost-user socket.
#[derive(Debug)]
pub struct Connection {
    socket: UnixStream,
    /// Set once REPLY_ACK is negotiated: every message then asks for an acknowledgement.
    acknowledged: bool,
}

impl Connection {
    /// Connects to `path`; waits up to five seconds for the back end to listen there.
    pub fn connect(path: &Path) -> Result<Connection> {
        let deadline = Instant::now() + Duration::from_secs(5);
        loop {
            match UnixStream::connect(path) {
                Ok(socket) => return Connection::new(socket),
                Err(source) if Instant::now() > deadline => {
                    return Err(Error::System { what: format!("connect to {}", path.display()), source });
                }
                Err(_) => std::thread::sleep(Duration::from_millis(2)),
            }
        }
    }

    /// Uses a socket that is connected already, e.g. one end of a pair.
    pub fn new(socket: UnixStream) -> Result<Connection> {
        socket
            .set_read_timeout(Some(ANSWER_TIMEOUT))
            .map_err(Error::system("set a timeout on the socket"))?;
        Ok(Connection { socket, acknowledged: false })
    }

    /// Sends any message, right or wrong, with any descriptors. Nothing is awaited.
    pub fn send_raw(
        &self,
        request: u32,
        flags: u32,
        size: u32,
        body: &[u8],
        fds: &[BorrowedFd<'_>],
    ) -> Result<()> {
        let header = Header { request, flags, size };
        let mut message = header.as_bytes().to_vec();
        message.extend_from_slice(body);
        self.send_bytes(&message, fds)
    }

    /// Sends any bytes, e.g. half a header.
    pub fn send_bytes(&self, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> Result<()> {
        let fds: Vec<_> = fds.iter().map(AsRawFd::as_raw_fd).collect();
        let sent = self
            .socket
            .send_with_fds(&[bytes], &fds)
            .map_err(|e| Error::System { what: "send a vhost-user message".into(), source: e.into() })?;
        // The descriptors went with the first byte.
        (&self.socket).write_all(&bytes[sent..]).map_err(Error::system("send a vhost-user message"))
    }

    /// Receives one answer, whatever it is.
    pub fn receive_raw(&self, to: &'static str) -> Result<(Header, Vec<u8>)> {
        let mut header = [0; size_of::<Header>()];
        self.receive_exact(&mut header, to)?;
        let header: Header = zerocopy::transmute!(header);
        if header.size > 4096 {
            return Err(Error::Protocol {
                message: to,
                problem: format!("a payload of {} bytes", header.size),
            });
        }
        let mut body = vec![0; header.size as usize];
        self.receive_exact(&mut body, to)?;
        Ok((header, body))
    }

    fn receive_exact(&self, bytes: &mut [u8], to: &'static str) -> Result<()> {
        (&self.socket).read_exact(bytes).map_err(|source| match source.kind() {
            io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset => Error::Closed(to),
            _ => Error::System { what: format!("read the answer to {to}"), source },
        })
    }

    /// Sends a message that needs no answer, and waits for the acknowledgement if that was negotiated.
    pub fn send<T: IntoBytes + Immutable + ?Sized>(
        &self,
        request: u32,
        body: &T,
        fds: &[BorrowedFd<'_>],
    ) -> Result<()> {
        let body = body.as_bytes();
        let flags = if self.acknowledged { VERSION | NEED_REPLY } else { VERSION };
        self.send_raw(request, flags, body.len() as u32, body, fds)?;
        if !self.acknowledged {
            return Ok(());
        }
        match self.receive::<u64>(request)? {
            0 => Ok(()),
            code => Err(Error::Rejected { message: name(request), code }),
        }
    }

    /// Sends a message that has an answer, and returns it.
    pub fn ask<T: IntoBytes + Immutable + ?Sized, A: FromBytes>(&self, request: u32, body: &T) -> Result<A> {
        let body = body.as_bytes();
        self.send_raw(request, VERSION, body.len() as u32, body, &[])?;
        self.receive(request)
    }

    fn receive<A: FromBytes>(&self, request: u32) -> Result<A> {
        let body = self.receive_bytes(request)?;
        A::read_from_bytes(&body).map_err(|_| Error::Protocol {
            message: name(request),
            problem: format!("{} bytes instead of {}", body.len(), size_of::<A>()),
        })
    }

    fn receive_bytes(&self, request: u32) -> Result<Vec<u8>> {
        let (header, body) = self.receive_raw(name(request))?;
        let problem = if header.request != request {
            format!("it is an answer to {}", name(header.request))
        } else if header.flags & (REPLY | 3) != REPLY | VERSION {
            format!("flags {:#x}", header.flags)
        } else {
            return Ok(body);
        };
        Err(Error::Protocol { message: name(request), problem })
    }

    /// GET_FEATURES.
    pub fn features(&self) -> Result<u64> {
        self.ask(code::GET_FEATURES, &[0u8; 0])
    }

    /// SET_FEATURES.
    pub fn set_features(&self, features: u64) -> Result<()> {
        self.send(code::SET_FEATURES, &features, &[])
    }

    /// GET_PROTOCOL_FEATURES.
    pub fn protocol_features(&self) -> Result<u64> {
        self.ask(code::GET_PROTOCOL_FEATURES, &[0u8; 0])
    }

    /// SET_PROTOCOL_FEATURES; with REPLY_ACK every later message is acknowledged.
    pub fn set_protocol_features(&mut self, features: u64) -> Result<()> {
        self.send(code::SET_PROTOCOL_FEATURES, &features, &[])?;
        self.acknowledged = features & protocol::REPLY_ACK != 0;
        Ok(())
    }

    /// GET_QUEUE_NUM: queues that the back end supports, the high-priority queue among them.
    pub fn queue_count(&self) -> Result<u64> {
        self.ask(code::GET_QUEUE_NUM, &[0u8; 0])
    }

    /// SET_OWNER.
    pub fn set_owner(&self) -> Result<()> {
        self.send(code::SET_OWNER, &[0u8; 0], &[])
    }

    /// GET_MAX_MEM_SLOTS.
    pub fn memory_slots(&self) -> Result<u64> {
        self.ask(code::GET_MAX_MEM_SLOTS, &[0u8; 0])
    }

    /// SET_MEM_TABLE.
    pub fn set_memory(&self, regions: &[Arc<Region>]) -> Result<()> {
        let mut body = (regions.len() as u64).to_ne_bytes().to_vec();
        for region in regions {
            body.extend_from_slice(describe(region).as_bytes());
        }
        let fds: Vec<_> = regions.iter().map(|region| region.fd()).collect();
        self.send(code::SET_MEM_TABLE, body.as_slice(), &fds)
    }

    /// ADD_MEM_REG.
    pub fn add_memory(&self, region: &Region) -> Result<()> {
        self.send(code::ADD_MEM_REG, single_region(region).as_slice(), &[region.fd()])
    }

    /// POSTCOPY_ADVISE: the device's userfaultfd.
    pub fn postcopy_advise(&self) -> Result<File> {
        let request = code::POSTCOPY_ADVISE;
        self.send_raw(request, VERSION, 0, &[], &[])?;
        let mut bytes = [0; size_of::<Header>()];
        match self.socket.recv_with_fd(&mut bytes) {
            Ok((count, Some(file))) if count == bytes.len() => Ok(file),
            Ok((0, _)) => Err(Error::Closed(name(request))),
            other => Err(Error::Protocol { message: name(request), problem: format!("{other:?}") }),
        }
    }

    /// POSTCOPY_LISTEN.
    pub fn postcopy_listen(&self) -> Result<()> {
        self.send(code::POSTCOPY_LISTEN, &[0u8; 0], &[])
    }

    /// POSTCOPY_END.
    pub fn postcopy_end(&self) -> Result<()> {
        self.send(code::POSTCOPY_END, &[0u8; 0], &[])
    }

    /// SET_MEM_TABLE in post-copy: where the device has mapped the regions. [`Connection::acknowledge_memory`] is to follow.
    pub fn set_missing_memory(&self, regions: &[Arc<Region>]) -> Result<Vec<u64>> {
        let mut body = (regions.len() as u64).to_ne_bytes().to_vec();
        for region in regions {
            body.extend_from_slice(describe(region).as_bytes());
        }
        let fds: Vec<_> = regions.iter().map(|region| region.fd()).collect();
        self.send_raw(code::SET_MEM_TABLE, VERSION, body.len() as u32, &body, &fds)?;
        let answer = self.receive_bytes(code::SET_MEM_TABLE)?;
        let bases = answer.get(8..).unwrap_or_default().chunks(size_of::<MemoryRegion>());
        bases.zip(regions).map(|(bytes, region)| base_of(bytes, region)).collect()
    }

    /// ADD_MEM_REG in post-copy: where the device has mapped the region. [`Connection::acknowledge_memory`] is to follow.
    pub fn add_missing_memory(&self, region: &Region) -> Result<u64> {
        let body = single_region(region);
        self.send_raw(code::ADD_MEM_REG, VERSION, body.len() as u32, &body, &[region.fd()])?;
        base_of(self.receive_bytes(code::ADD_MEM_REG)?.get(8..).unwrap_or_default(), region)
    }

    /// Page faults of the device are answered from now on in the memory of the message `request`, which was the last one.
    pub fn acknowledge_memory(&self, request: u32) -> Result<()> {
        self.send_raw(request, VERSION, 8, &0u64.to_ne_bytes(), &[])
    }

    /// REM_MEM_REG.
    pub fn remove_memory(&self, region: &Region) -> Result<()> {
        self.send(code::REM_MEM_REG, single_region(region).as_slice(), &[])
    }

    /// Sets up one queue up to, but without, SET_VRING_ENABLE. It goes on after the last used chain, so
    /// chains that the device had not taken when it was stopped are served.
    pub fn set_up_ring<T>(&self, index: usize, ring: &Ring<T>, kick: &EventFd, call: &EventFd) -> Result<()> {
        self.set_up_ring_at(index, ring, ring.used_index(), kick, call)
    }

    /// The same from another chain on.
    pub fn set_up_ring_at<T>(
        &self,
        index: usize,
        ring: &Ring<T>,
        base: u16,
        kick: &EventFd,
        call: &EventFd,
    ) -> Result<()> {
        self.begin_ring(index, ring, (base, None), kick, call)
    }

    /// The same; writes to the used ring are recorded at the guest-physical address `log`, if there is one.
    pub fn set_up_logged_ring<T>(
        &self,
        index: usize,
        ring: &Ring<T>,
        kick: &EventFd,
        call: &EventFd,
        log: Option<u64>,
    ) -> Result<()> {
        self.begin_ring(index, ring, (ring.used_index(), log), kick, call)
    }

    fn begin_ring<T>(
        &self,
        index: usize,
        ring: &Ring<T>,
        (base, log): (u16, Option<u64>),
        kick: &EventFd,
        call: &EventFd,
    ) -> Result<()> {
        let queue = index as u32;
        self.send(code::SET_VRING_NUM, &VringState { index: queue, value: ring.size() as u32 }, &[])?;
        self.send(code::SET_VRING_BASE, &VringState { index: queue, value: u32::from(base) }, &[])?;
        self.set_ring_addresses(index, ring, log)?;
        // The call descriptor goes first: the kick descriptor starts the queue.
        self.set_vring_call(index, Some(call))?;
        self.set_vring_kick(index, Some(kick))
    }

    /// SET_VRING_ADDR, also of a ring in use: writes to the used ring are recorded at the guest-physical address `log`.
    pub fn set_ring_addresses<T>(&self, index: usize, ring: &Ring<T>, log: Option<u64>) -> Result<()> {
        let (descriptors, available, used) = ring.user_addresses();
        let (index, flags) = (index as u32, u32::from(log.is_some()));
        let log = log.unwrap_or(0);
        let addresses = VringAddress { index, flags, descriptors, used, available, log };
        self.send(code::SET_VRING_ADDR, &addresses, &[])
    }

    /// SET_LOG_BASE, which is always answered.
    pub fn set_log_base(&self, file: BorrowedFd<'_>, size: u64, offset: u64) -> Result<()> {
        let body = LogArea { size, offset };
        let body = body.as_bytes();
        self.send_raw(code::SET_LOG_BASE, VERSION, body.len() as u32, body, &[file])?;
        match self.receive_bytes(code::SET_LOG_BASE)? {
            answer if answer == body => Ok(()),
            answer => Err(Error::Protocol {
                message: name(code::SET_LOG_BASE),
                problem: format!("it has {} other bytes", answer.len()),
            }),
        }
    }

    /// SET_VRING_KICK; without an eventfd the message says so.
    pub fn set_vring_kick(&self, index: usize, kick: Option<&EventFd>) -> Result<()> {
        self.set_vring_fd(code::SET_VRING_KICK, index, kick)
    }

    /// SET_VRING_CALL; without an eventfd the message says so.
    pub fn set_vring_call(&self, index: usize, call: Option<&EventFd>) -> Result<()> {
        self.set_vring_fd(code::SET_VRING_CALL, index, call)
    }

    fn set_vring_fd(&self, request: u32, index: usize, event: Option<&EventFd>) -> Result<()> {
        match event {
            Some(event) => {
                // SAFETY: the eventfd is borrowed for longer than the call lasts.
                let fd = unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) };
                self.send(request, &(index as u64), &[fd])
            }
            None => self.send(request, &(index as u64 | NO_FD), &[]),
        }
    }

    /// SET_VRING_ENABLE.
    pub fn enable_ring(&self, index: usize, enable: bool) -> Result<()> {
        self.send(code::SET_VRING_ENABLE, &VringState { index: index as u32, value: u32::from(enable) }, &[])
    }

    /// GET_VRING_BASE: stops the queue and returns the next available index it would serve.
    pub fn stop_ring(&self, index: usize) -> Result<u16> {
        let answer: VringState =
            self.ask(code::GET_VRING_BASE, &VringState { index: index as u32, value: 0 })?;
        if answer.index as usize != index {
            return Err(Error::Protocol {
                message: name(code::GET_VRING_BASE),
                problem: format!("it speaks of queue {} instead of {index}", answer.index),
            });
        }
        u16::try_from(answer.value).map_err(|_| Error::Protocol {
            message: name(code::GET_VRING_BASE),
            problem: format!("the base {:#x} is no split ring's", answer.value),
        })
    }

    /// RESET_DEVICE.
    pub fn reset_device(&self) -> Result<()> {
        self.send(code::RESET_DEVICE, &[0u8; 0], &[])
    }

    /// GET_CONFIG: `size` bytes of the config space at `offset`.
    pub fn config(&self, offset: u32, size: u32) -> Result<Vec<u8>> {
        let mut body = ConfigHeader { offset, size, flags: 0 }.as_bytes().to_vec();
        body.resize(body.len() + size as usize, 0);
        self.send_raw(code::GET_CONFIG, VERSION, body.len() as u32, &body, &[])?;
        let answer = self.receive_bytes(code::GET_CONFIG)?;
        match answer.get(size_of::<ConfigHeader>()..) {
            Some(bytes) if bytes.len() == size as usize => Ok(bytes.to_vec()),
            _ => Err(Error::Protocol {
                message: name(code::GET_CONFIG),
                problem: format!("{} bytes for {size} of config space", answer.len()),
            }),
        }
    }

    /// SET_DEVICE_STATE_FD: the device writes its state to this end of a pipe ([`SAVE`]) or reads it
    /// from there ([`LOAD`]).
    pub fn set_device_state_fd(&self, direction: u32, pipe: BorrowedFd<'_>) -> Result<()> {
        let body = TransferState { direction, phase: 0 };
        let body = body.as_bytes();
        self.send_raw(code::SET_DEVICE_STATE_FD, VERSION, body.len() as u32, body, &[pipe])?;
        match self.receive::<u64>(code::SET_DEVICE_STATE_FD)? {
            // No descriptor of the device's comes along.
            NO_FD => Ok(()),
            code => Err(Error::Rejected { message: name(code::SET_DEVICE_STATE_FD), code }),
        }
    }

    /// CHECK_DEVICE_STATE: whether the transfer worked.
    pub fn check_device_state(&self) -> Result<()> {
        match self.ask(code::CHECK_DEVICE_STATE, &[0u8; 0])? {
            0u64 => Ok(()),
            code => Err(Error::Rejected { message: name(code::CHECK_DEVICE_STATE), code }),
        }
    }

    /// Reads the device's state as QEMU does: up to the end of the stream, then the outcome. All queues are stopped.
    pub fn save_device_state(&self) -> Result<Vec<u8>> {
        let (mut reader, writer) = io::pipe().map_err(Error::system("make a pipe"))?;
        self.set_device_state_fd(SAVE, writer.as_fd())?;
        // The device's copy is the only one, so that its end is that of the stream.
        drop(writer);
        let mut state = Vec::new();
        reader.read_to_end(&mut state).map_err(Error::system("read the device's state"))?;
        self.check_device_state()?;
        Ok(state)
    }

    /// Gives the device a state as QEMU does: before features, memory and queues.
    pub fn load_device_state(&self, state: &[u8]) -> Result<()> {
        let (reader, mut writer) = io::pipe().map_err(Error::system("make a pipe"))?;
        self.set_device_state_fd(LOAD, reader.as_fd())?;
        drop(reader);
        match writer.write_all(state) {
            // A device that has seen enough says so when it is asked.
            Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
                return Err(Error::system("write the device's state")(error));
            }
            _ => drop(writer),
        }
        self.check_device_state()
    }

    /// GET_INFLIGHT_FD.
    pub fn inflight_region(&self, queues: u16, queue_size: u16) -> Result<(Inflight, File)> {
        let asked = Inflight { size: 0, offset: 0, queues, queue_size, padding: 0 };
        let request = code::GET_INFLIGHT_FD;
        self.send_raw(request, VERSION, size_of::<Inflight>() as u32, asked.as_bytes(), &[])?;
        let mut bytes = [0; size_of::<Header>() + size_of::<Inflight>()];
        let received = self.socket.recv_with_fd(&mut bytes);
        let problem = match received {
            Ok((count, Some(file))) if count == bytes.len() => {
                let (_, body) = bytes.split_at(size_of::<Header>());
                let given = Inflight::read_from_bytes(body).expect("the size is that of the struct");
                return Ok((given, file));
            }
            Ok((0, _)) => return Err(Error::Closed(name(request))),
            Ok((count, file)) => format!("{count} bytes and {file:?}"),
            Err(errno) => errno.to_string(),
        };
        Err(Error::Protocol { message: name(request), problem })
    }

    /// SET_INFLIGHT_FD.
    pub fn set_inflight_region(&self, region: &Inflight, file: &File) -> Result<()> {
        self.send(code::SET_INFLIGHT_FD, region, &[file.as_fd()])
    }

    /// Ends the connection.
    pub fn shut_down(&self) {
        // It fails only if the back end has closed it.
        let _ = self.socket.shutdown(Shutdown::Both);
    }

    /// The socket itself.
    pub fn socket(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// Waits until the back end closes the socket; false if it does not in `timeout`.
    pub fn wait_closed(&self, timeout: Duration) -> Result<bool> {
        self.socket.set_read_timeout(Some(timeout)).map_err(Error::system("set a timeout on the socket"))?;
        let mut bytes = [0; 256];
        let closed = loop {
            match (&self.socket).read(&mut bytes) {
                Ok(0) => break true,
                Ok(_) => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => break false,
                Err(e) if e.kind() == io::ErrorKind::ConnectionReset => break true,
                Err(source) => return Err(Error::System { what: "read from the socket".into(), source }),
            }
        };
        self.socket
            .set_read_timeout(Some(ANSWER_TIMEOUT))
            .map_err(Error::system("set a timeout on the socket"))?;
        Ok(closed)
    }
}

/// A region as the messages carry it.
pub fn describe(region: &Region) -> MemoryRegion {
    MemoryRegion {
        guest: region.guest_address(),
        size: region.size() as u64,
        user: region.user_address(),
        offset: 0,
    }
}

fn single_region(region: &Region) -> Vec<u8> {
    // Eight bytes of padding come first.
    let mut body = vec![0; 8];
    body.extend_from_slice(describe(region).as_bytes());
    body
}

/// Where a device has mapped a region, as it says.
fn base_of(bytes: &[u8], region: &Region) -> Result<u64> {
    match MemoryRegion::read_from_bytes(bytes) {
        Ok(said) if said.guest == region.guest_address() && said.size == region.size() as u64 => {
            Ok(said.user)
        }
        other => {
            let problem = format!("it speaks of another region: {other:?}");
            Err(Error::Protocol { message: "memory that may be missing", problem })
        }
    }
}
