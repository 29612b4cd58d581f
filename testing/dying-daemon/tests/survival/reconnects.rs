//! A worker that dies with a request while its front end is gone, or as it comes back.

use std::fs;
use std::time::Duration;

use fuse_protocol::abi::{EntryOut, MkdirIn};
use fuse_protocol::opcode::Opcode;
use lanefsd_frontend::client::ROOT;
use lanefsd_frontend::connection::Connection;
use lanefsd_frontend::message::protocol;
use lanefsd_frontend::request::Request;
use lanefsd_frontend::{Backend, SessionOptions};

use crate::trial::errno;

#[test]
fn a_request_is_answered_once_by_the_session_that_goes_on() {
    for phase in ["before", "after"] {
        for call in 1..=3 {
            let starter = Backend::of(env!("CARGO_BIN_EXE_lanefsd-dying"));
            let backend = starter.args(["--keep-listening", "--max-deaths=100"]).start().unwrap();
            let mut options =
                SessionOptions { timeout: Duration::from_secs(10), ..SessionOptions::default() };
            options.protocol_features |= protocol::INFLIGHT_SHMFD;
            let session = backend.connect(options).unwrap();
            let client = session.client();
            let arm = client.lookup(ROOT, format!("!die:{phase}:MKDIR:{call}"));
            assert_eq!(errno(arm), libc::ENOENT);
            let mkdir = |number: u32| {
                let arg = MkdirIn { mode: 0o755, umask: 0 };
                let name = format!("directory-{number}");
                let request = Request::new(Opcode::Mkdir, ROOT).arg(&arg).name(&name).reply::<EntryOut>();
                client.send(request).unwrap()
            };
            let sent: Vec<_> = (0..3).map(mkdir).collect();
            session.disconnect();
            session.reconnect(Connection::connect(backend.socket()).unwrap()).unwrap();
            for sent in sent {
                assert_eq!(session.finish(sent).unwrap().len(), size_of::<EntryOut>());
            }
            assert_eq!(fs::read_dir(backend.share()).unwrap().count(), 3);
            let log = backend.stderr();
            assert_eq!(log.matches("the worker process was ended by").count(), 1, "{phase} {call}: {log}");
        }
    }
}
