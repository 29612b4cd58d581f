//! The capabilities that the serving process has in each sandbox.

use std::fs;

use lanefsd_frontend::SessionOptions;
use lanefsd_frontend::client::ROOT;

use crate::common;
use crate::sandbox::{as_root, has_an_empty_root};

/// A bit set out of a line of /proc/PID/status.
fn capabilities(status: &str, set: &str) -> u64 {
    let line = status.lines().find_map(|line| line.strip_prefix(set)).unwrap();
    u64::from_str_radix(line.trim_start_matches(':').trim(), 16).unwrap()
}

/// The sets of all threads of a daemon in this sandbox, which have to be alike.
fn capabilities_in(sandbox: &str, more: &[&str]) -> u64 {
    let mut args = vec![format!("--sandbox={sandbox}")];
    args.extend(more.iter().map(ToString::to_string));
    let backend = common::starter().args(args).start().unwrap();
    let session = backend.connect(SessionOptions::default()).unwrap();
    session.client().getattr(ROOT).unwrap();
    let tasks = fs::read_dir(format!("/proc/{}/task", common::serving_process(backend.pid()))).unwrap();
    let status =
        |task: std::io::Result<fs::DirEntry>| fs::read_to_string(task.unwrap().path().join("status"));
    let all: Vec<_> = tasks.flat_map(status).collect();
    assert!(all.len() > 1, "the main thread and a worker at least");
    for status in &all {
        let kept = capabilities(status, "CapEff");
        for set in ["CapPrm", "CapBnd"] {
            assert_eq!(capabilities(status, set), kept, "{sandbox}, {set}");
        }
        for set in ["CapInh", "CapAmb"] {
            assert_eq!(capabilities(status, set), 0, "{sandbox}, {set}");
        }
        assert_eq!(kept, capabilities(&all[0], "CapEff"));
        assert!(status.contains("NoNewPrivs:\t1"), "{status}");
    }
    capabilities(&all[0], "CapEff")
}

fn bits(numbers: &[u32]) -> u64 {
    numbers.iter().map(|number| 1 << number).sum()
}

// The numbers are those of linux/capability.h.
const CHOWN: u32 = 0;
const DAC_OVERRIDE: u32 = 1;
const DAC_READ_SEARCH: u32 = 2;
const FOWNER: u32 = 3;
const FSETID: u32 = 4;
const SETGID: u32 = 6;
const SETUID: u32 = 7;
const SYS_ADMIN: u32 = 21;
const MKNOD: u32 = 27;
const SETFCAP: u32 = 31;

#[test]
fn capabilities_that_are_not_needed_are_gone() {
    as_root();
    let usual = [CHOWN, DAC_OVERRIDE, FOWNER, FSETID, SETGID, SETUID, MKNOD];
    for sandbox in ["namespace", "chroot", "none"] {
        assert_eq!(capabilities_in(sandbox, &[]), bits(&usual) | bits(&[DAC_READ_SEARCH]), "{sandbox}");
    }
    let with = |sandbox: &str, more: &[&str]| {
        capabilities_in(sandbox, &[&["--inode-file-handles=never"], more].concat())
    };
    assert_eq!(with("none", &["--xattr"]), bits(&usual) | bits(&[SETFCAP]));
    assert_eq!(with("none", &["--xattr", "--readonly"]), bits(&[DAC_READ_SEARCH, FOWNER]));
    let changed = bits(&usual[..6]) | bits(&[SYS_ADMIN]);
    assert_eq!(with("chroot", &["--modcaps=+sys_admin:-cap_mknod"]), changed);
}

#[test]
fn a_capability_that_is_not_there_cannot_be_kept() {
    as_root();
    let directory = tempfile::tempdir().unwrap();
    // Without it in the bounding set, nobody below has it.
    let output = std::process::Command::new("setpriv")
        .args(["--bounding-set=-sys_admin,-lease", "--inh-caps=-sys_admin,-lease"])
        .arg(common::program())
        .args(["--sandbox=none", "--modcaps=+lease", "--socket-path"])
        .arg(directory.path().join("socket"))
        .arg("--shared-dir")
        .arg(directory.path())
        .output()
        .unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    assert!(stderr.contains("--modcaps") && stderr.contains("lease"), "{stderr}");
}

/// As root of a container may be: without the right to make namespaces and mounts.
#[test]
fn root_without_sys_admin_has_an_empty_root() {
    as_root();
    for (args, warned) in [(&["--sandbox=chroot"][..], false), (&[], true)] {
        let starter = lanefsd_frontend::Backend::of("setpriv");
        let starter = starter.args(["--bounding-set=-sys_admin", "--inh-caps=-sys_admin"]);
        let mut backend = starter.args([common::program()]).args(args).start().unwrap();
        let session = backend.connect(SessionOptions::default()).unwrap();
        session.client().mkdir(ROOT, "dir", 0o700, 0).unwrap();
        let pid = common::serving_process(backend.pid());
        has_an_empty_root(pid, &backend.path(""));
        drop(session);
        backend.expect_success().unwrap();
        assert_eq!(backend.stderr().contains("--sandbox=chroot"), warned, "{}", backend.stderr());
    }
}
