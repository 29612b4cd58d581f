//! What strace(1) has seen of a daemon: the calls that its serving process made inside the sandbox.
#![allow(dead_code, reason = "the programs beside this folder use a part of it")]

use std::collections::HashMap;
use std::path::{Path, PathBuf};

/// One system call as strace prints it, without the thread's id.
#[derive(Debug)]
pub struct Call(pub String);

/// Calls whose strings are data and no paths.
const DATA: [&str; 10] =
    ["read", "write", "writev", "readv", "preadv2", "pwritev2", "recvmsg", "getcwd", "prctl", "execve"];

impl Call {
    pub fn name(&self) -> &str {
        self.0.split('(').next().unwrap_or_default()
    }

    /// The strings among its arguments.
    fn strings(&self) -> Vec<&str> {
        // Odd pieces are between quotes: strace escapes quotes inside with a backslash.
        let mut strings: Vec<&str> = Vec::new();
        let mut rest = self.0.as_str();
        while let Some(begin) = rest.find('"') {
            rest = &rest[begin + 1..];
            let mut end = 0;
            while end < rest.len() && !rest[end..].starts_with('"') {
                end += if rest[end..].starts_with('\\') { 2 } else { 1 };
            }
            strings.push(&rest[..end.min(rest.len())]);
            rest = rest.get(end + 1..).unwrap_or_default();
        }
        strings
    }

    /// The absolute paths among its arguments.
    pub fn absolute_paths(&self) -> Vec<&str> {
        let strings = self.strings();
        let paths = match self.name() {
            name if DATA.contains(&name) => &[][..],
            // The target is the guest's, and is no path here.
            "symlinkat" => strings.get(1..).unwrap_or_default(),
            // What follows the path is what was read or is to be written.
            "readlinkat" | "readlink" | "getxattr" | "setxattr" | "listxattr" => {
                strings.get(..1).unwrap_or_default()
            }
            _ => &strings,
        };
        paths.iter().copied().filter(|path| path.starts_with('/')).collect()
    }

    /// The name of the file that the call has opened for more than to point at it, as the host sees it.
    pub fn opened(&self) -> Option<&str> {
        if !["openat", "open", "openat2", "open_by_handle_at", "creat"].contains(&self.name()) {
            return None;
        }
        let (arguments, result) = self.0.rsplit_once(") = ")?;
        let path = result.split_once('<')?.1;
        (!arguments.contains("O_PATH")).then_some(path)
    }
}

/// Options of strace for a trace in this file.
pub fn options(trace: &Path) -> Vec<String> {
    assert!(Path::new("/usr/bin/strace").exists(), "strace is missing: apt-get install strace");
    let trace = trace.to_str().expect("a path of plain letters");
    ["-f", "-qq", "-y", "-s", "200", "-o", trace].map(str::to_owned).to_vec()
}

/// All calls that the serving process made after its root directory changed.
pub fn inside(trace: &PathBuf) -> Vec<Call> {
    let text =
        String::from_utf8_lossy(&std::fs::read(trace).expect("strace has written a trace")).into_owned();
    let outer = text.split_whitespace().next().expect("a trace that is not empty").to_owned();
    let mut unfinished: HashMap<String, String> = HashMap::new();
    let mut calls = Vec::new();
    let mut entered = false;
    for line in text.lines() {
        let Some((thread, call)) = line.split_once(' ') else { continue };
        let mut call = call.trim_start().to_owned();
        if thread == outer || call.starts_with("+++") || call.starts_with("---") {
            continue;
        }
        if let Some((begin, _)) = call.split_once(" <unfinished ...>") {
            unfinished.insert(thread.to_owned(), begin.to_owned());
            continue;
        }
        if call.starts_with("<... ")
            && let Some((_, end)) = call.split_once(" resumed>")
        {
            call = unfinished.remove(thread).unwrap_or_default() + end;
        }
        if entered {
            calls.push(Call(call));
        } else {
            entered = call.starts_with("pivot_root(") || call.starts_with("chroot(\".\")");
        }
    }
    assert!(entered, "the sandbox was not entered");
    // What was under way at the end, too.
    calls.extend(unfinished.into_values().map(Call));
    calls
}
