//! User namespaces, and which ids of the host exist in them.
//!
//! Maps that take privileges are written by newuidmap(1) and newgidmap(1), as far as /etc/subuid and /etc/subgid
//! allow it.

use std::fmt::Write as _;
use std::fs::OpenOptions;
use std::io::{self, ErrorKind, Write as _};
use std::os::fd::OwnedFd;
use std::process::Command;

use rustix::io::Errno;
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{Gid, Pid, Uid, WaitOptions, getegid, geteuid, getpid, waitpid};
use rustix::thread::{UnshareFlags, set_thread_res_gid, set_thread_res_uid};

use super::config::{IdMaps, IdRange};
use super::process::{exit, fork};
use super::{SandboxError, namespace, step};

/// One of the two maps of a namespace.
struct Map<'a> {
    /// Its name in /proc/PID.
    file: &'static str,
    /// The program that may write it.
    tool: &'static str,
    ranges: &'a [IdRange],
    /// The only id that can be mapped without privileges.
    own: u32,
}

/// Moves into the new namespaces `flags` and a user namespace with the ids in `maps`.
///
/// The maps are written by a helper that stays outside, where the privilege to do so is.
pub(super) fn unshare(flags: UnshareFlags, maps: &IdMaps) -> Result<(), SandboxError> {
    let made = |pipe: Result<_, Errno>| pipe.map_err(step("pipe(2)"));
    let (started, start) = made(pipe_with(PipeFlags::CLOEXEC))?;
    let (answer, answering) = made(pipe_with(PipeFlags::CLOEXEC))?;
    let target = getpid();
    let Some(helper) = fork().map_err(step("fork(2)"))? else {
        drop(start);
        run_helper(&started, &answering, target, maps);
    };
    drop((started, answering));
    let result = namespace::unshare(flags | UnshareFlags::NEWUSER).map_err(step("making namespaces"));
    if result.is_ok() {
        rustix::io::write(&start, b"!").map_err(step("mapping ids"))?;
    }
    drop(start);
    let mut complaint = String::new();
    let read = io::Read::read_to_string(&mut std::fs::File::from(answer), &mut complaint);
    let ended = waitpid(Some(helper), WaitOptions::empty()).map_err(step("mapping ids"))?;
    result?;
    let well = matches!(ended, Some((_, status)) if status.exit_status() == Some(0));
    match (read, well, complaint.as_str()) {
        (Ok(_), true, "") => Ok(()),
        (Ok(_), true, _) => Err(SandboxError::Ids(complaint)),
        _ => Err(SandboxError::Ids("the helper process failed".into())),
    }
}

/// The helper process: waits for the namespace, writes its maps, and reports an error.
fn run_helper(started: &OwnedFd, answering: &OwnedFd, target: Pid, maps: &IdMaps) -> ! {
    let mut word = [0];
    if rustix::io::read(started, &mut word) == Ok(1)
        && let Err(complaint) = write_maps(target, maps)
        && rustix::io::write(answering, complaint.as_bytes()).is_err()
    {
        exit(1);
    }
    exit(0)
}

fn write_maps(target: Pid, maps: &IdMaps) -> Result<(), String> {
    let own = (geteuid().as_raw(), getegid().as_raw());
    // As with virtiofsd: the user has the same number inside and in the guest.
    let only = |id| [IdRange { inside: id, outside: id, count: 1 }];
    let (own_user, own_group) = (only(own.0), only(own.1));
    let or = |ranges, own| if <[_]>::is_empty(ranges) { own } else { ranges };
    let users: &[IdRange] = or(&maps.users, &own_user);
    let groups: &[IdRange] = or(&maps.groups, &own_group);
    write_map(target, &Map { file: "uid_map", tool: "newuidmap", ranges: users, own: own.0 })?;
    write_map(target, &Map { file: "gid_map", tool: "newgidmap", ranges: groups, own: own.1 })
}

fn write_map(target: Pid, map: &Map<'_>) -> Result<(), String> {
    let mut text = String::new();
    for IdRange { inside, outside, count } in map.ranges {
        // Nothing can fail that writes to a string.
        let _ = writeln!(text, "{inside} {outside} {count}");
    }
    match write(target, map.file, &text) {
        Err(error) if error.kind() == ErrorKind::PermissionDenied => {}
        result => return result.map_err(|error| format!("writing {} failed: {error}", map.file)),
    }
    let own_alone = matches!(map.ranges, [range] if range.count == 1 && range.outside == map.own);
    if !own_alone {
        return run_tool(target, map);
    }
    // The kernel lets a user map the own group only without setgroups(2): dropping a group may grant access that
    // its members do not have.
    let result = write(target, "setgroups", "deny").and_then(|()| write(target, map.file, &text));
    result.map_err(|error| format!("writing {} failed: {error}", map.file))
}

fn write(target: Pid, file: &str, text: &str) -> io::Result<()> {
    let path = format!("/proc/{}/{file}", target.as_raw_nonzero());
    // The kernel wants all of it in one piece.
    OpenOptions::new().write(true).open(path)?.write_all(text.as_bytes())
}

fn run_tool(target: Pid, map: &Map<'_>) -> Result<(), String> {
    let tool = map.tool;
    let mut command = Command::new(tool);
    command.arg(target.as_raw_nonzero().to_string());
    for IdRange { inside, outside, count } in map.ranges {
        command.args([inside, outside, count].map(ToString::to_string));
    }
    match command.output() {
        Ok(output) if output.status.success() => Ok(()),
        Ok(output) => Err(format!(
            "{tool} refuses them; check /etc/subuid and /etc/subgid ({})",
            String::from_utf8_lossy(&output.stderr).trim().replace('\n', "; ")
        )),
        Err(error) if error.kind() == ErrorKind::NotFound => {
            Err(format!("{tool} is not installed; install the package uidmap or shadow-utils"))
        }
        Err(error) => Err(format!("cannot run {tool}: {error}")),
    }
}

/// Takes the ids that the server runs as: root of the user namespace if that has one, else the
/// user who started the process, else any user there is. The process has all capabilities in the
/// namespace, whoever it is.
///
/// `own` are the ids outside, from before the namespace was made.
pub(super) fn become_server(own: (Uid, Gid), maps: &IdMaps) -> Result<(), SandboxError> {
    let uid = Uid::from_raw(serving_id(&maps.users, own.0.as_raw()));
    let gid = Gid::from_raw(serving_id(&maps.groups, own.1.as_raw()));
    set_thread_res_gid(gid, gid, gid).map_err(step("taking a group of the namespace"))?;
    set_thread_res_uid(uid, uid, uid).map_err(step("taking a user of the namespace"))
}

fn serving_id(ranges: &[IdRange], own: u32) -> u32 {
    let Some(first) = ranges.first() else { return own };
    if ranges.iter().any(|range| range.inside == 0) {
        return 0;
    }
    let own_inside = |range: &IdRange| {
        let place = own.checked_sub(range.outside).filter(|place| *place < range.count)?;
        range.inside.checked_add(place)
    };
    ranges.iter().find_map(own_inside).unwrap_or(first.inside)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_daemon_serves_as_root_or_its_own_user_or_any_other() {
        let range = |inside, outside, count| IdRange { inside, outside, count };
        for (ranges, id) in [
            (&[][..], 7),
            (&[range(0, 7, 1)], 0),
            (&[range(7, 7, 1)], 7),
            (&[range(5, 7, 1)], 5),
            (&[range(100, 700, 10), range(20, 3, 10)], 24),
            (&[range(7, 7, 1), range(0, 700, 10)], 0),
            (&[range(100, 700, 10), range(5, 8, 10)], 100),
            (&[range(100, 700, 10), range(u32::MAX, 6, 10)], 100),
        ] {
            assert_eq!(serving_id(ranges, 7), id, "{ranges:?}");
        }
    }
}
