//! `top` on a terminal: keys, and the state of the terminal after the end.

use std::fs::File;
use std::io::{Read as _, Write as _};
use std::os::unix::process::ExitStatusExt as _;
use std::process::{Child, Command, ExitStatus};
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, Signal, kill_process};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{Winsize, tcsetwinsize};

use crate::fake::Fake;

/// The sequences of the alternate screen.
const ENTER: &str = "\x1b[?1049h";
const LEAVE: &str = "\x1b[?1049l";

/// A pseudo terminal in which `top` runs.
struct Terminal {
    main: File,
    /// What was printed so far.
    screen: Vec<u8>,
    program: Child,
    _fake: Fake,
}

impl Terminal {
    fn run() -> Terminal {
        let fake = Fake::new(|_| Some(r#"{"ok":{"share":"web","time_seconds":1}}"#.to_owned()));
        let main = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC).unwrap();
        grantpt(&main).unwrap();
        unlockpt(&main).unwrap();
        let size = Winsize { ws_row: 24, ws_col: 80, ws_xpixel: 0, ws_ypixel: 0 };
        tcsetwinsize(&main, size).unwrap();
        let name = ptsname(&main, Vec::new()).unwrap().into_string().unwrap();
        let side = || File::options().read(true).write(true).open(&name).unwrap();
        let program = Command::new(env!("CARGO_BIN_EXE_lanefsctl"))
            .arg("-s")
            .arg(fake.socket())
            .args(["top", "-d", "0.2"])
            .stdin(side())
            .stdout(side())
            .stderr(side())
            .spawn()
            .unwrap();
        Terminal { main: File::from(main), screen: Vec::new(), program, _fake: fake }
    }

    /// Reads what is printed next; false at the end of the program.
    fn read(&mut self) -> bool {
        let timeout = Timespec { tv_sec: 20, tv_nsec: 0 };
        let ready = poll(&mut [PollFd::new(&self.main, PollFlags::IN)], Some(&timeout)).unwrap();
        assert!(ready > 0, "nothing is printed");
        let mut piece = [0; 4096];
        let length = self.main.read(&mut piece).unwrap_or(0);
        self.screen.extend_from_slice(piece.get(..length).unwrap());
        length > 0
    }

    fn text(&self) -> String {
        String::from_utf8_lossy(&self.screen).into_owned()
    }

    fn wait_for(&mut self, text: &str) {
        while !self.text().contains(text) {
            assert!(self.read(), "no {text:?} on the screen");
        }
    }

    fn end(&mut self) -> ExitStatus {
        while self.read() {}
        assert!(self.text().contains(LEAVE));
        self.program.wait().unwrap()
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        // It has ended, unless the test fails.
        let _ = self.program.kill();
    }
}

#[test]
fn a_key_ends_it_and_the_terminal_is_as_before() {
    let mut terminal = Terminal::run();
    terminal.wait_for("web");
    assert!(terminal.text().contains(ENTER) && !terminal.text().contains(LEAVE));
    terminal.main.write_all(b"h").unwrap();
    terminal.wait_for("any key closes it");
    terminal.main.write_all(b"xq").unwrap();
    assert!(terminal.end().success());
}

#[test]
fn after_a_signal_the_terminal_is_as_before_and_the_parent_sees_the_signal() {
    for signal in [Signal::TERM, Signal::INT, Signal::HUP] {
        let mut terminal = Terminal::run();
        terminal.wait_for("web");
        kill_process(Pid::from_child(&terminal.program), signal).unwrap();
        assert_eq!(terminal.end().signal(), Some(signal.as_raw()));
    }
}

#[test]
fn a_terminal_that_hangs_up_ends_it_without_a_signal() {
    let mut terminal = Terminal::run();
    terminal.wait_for("web");
    terminal.main = File::open("/dev/null").unwrap();
    let deadline = Instant::now() + Duration::from_secs(20);
    let status = loop {
        if let Some(status) = terminal.program.try_wait().unwrap() {
            break status;
        }
        assert!(Instant::now() < deadline, "it runs on without a terminal");
        thread::sleep(Duration::from_millis(20));
    };
    assert_eq!(status.code(), Some(1), "{status:?}");
}
