//! The rooms of the source tree and the order in which they stand: code names only its own room and those below it.
#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "a failed step fails the test"
)]

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

/// The rooms from the lowest up, as module paths. A room is a file, or a folder with all that no other room of this list
/// has taken. Rooms that are not in the list are above all of these.
const ROOMS: [&str; 17] = [
    "sys",
    "blocking",
    "sync",
    "mapping",
    "fs::passthrough::config",
    "limits",
    "fs",
    "fs::passthrough::host",
    "fs::passthrough::inode",
    "fs::passthrough::session",
    "fs::passthrough::caller",
    "fs::passthrough::lock_waiters",
    "fs::passthrough::handle_table",
    "fs::passthrough::start_error",
    "fs::passthrough::state",
    "fs::passthrough::ops",
    "fs::passthrough::start",
];

/// Rooms whose own arrows are not held yet.
const UNCHECKED: [&str; 1] = ["fs"];

/// The place of a module in the list; all others are above it. `fs` is its `mod.rs` alone.
fn place(module: &[String]) -> usize {
    let path = module.join("::");
    let is_in = |room: &str| path == room || path.starts_with(&format!("{room}::"));
    let place = ROOMS.iter().rposition(|room| is_in(room)).unwrap_or(ROOMS.len());
    let folders = ["passthrough", "null", "read_only"];
    let apart = place == 6 && module.get(1).is_some_and(|name| folders.contains(&name.as_str()));
    if apart { ROOMS.len() } else { place }
}

fn sources(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            sources(&path, found);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(path);
        }
    }
}

/// The module path of a source file.
fn module_of(file: &Path, src: &Path) -> Vec<String> {
    let relative = file.strip_prefix(src).unwrap().with_extension("");
    let mut path: Vec<String> = relative.iter().map(|part| part.to_str().unwrap().to_owned()).collect();
    if path.last().is_some_and(|name| name == "mod" || name == "lib") {
        path.pop();
    }
    path
}

/// The code of a file without its tests and comments.
fn code(file: &Path) -> String {
    let text = fs::read_to_string(file).unwrap();
    let end = text.find("#[cfg(test)]\nmod tests").unwrap_or(text.len());
    text[..end].lines().map(|line| line.split("//").next().unwrap()).collect::<Vec<_>>().join("\n")
}

/// The modules that `text`, the code of `module`, names by `crate::` and `super::`.
fn named(text: &str, module: &[String]) -> BTreeSet<Vec<String>> {
    let mut found = BTreeSet::new();
    for (start, _) in text.match_indices("crate::").chain(text.match_indices("super::")) {
        let before = text[..start].chars().next_back();
        let is_visibility = text[..start].ends_with("pub(in ");
        if is_visibility || before.is_some_and(|c| c.is_alphanumeric() || c == '_' || c == ':') {
            continue;
        }
        expand(&text[start..], Vec::new(), module, &mut found);
    }
    found
}

/// Adds all paths of a `use` tree that begins at `text`; returns the rest of the text.
fn expand<'a>(
    mut text: &'a str,
    mut path: Vec<String>,
    module: &[String],
    found: &mut BTreeSet<Vec<String>>,
) -> &'a str {
    loop {
        text = text.trim_start();
        if let Some(mut rest) = text.strip_prefix('{') {
            loop {
                rest = expand(rest, path.clone(), module, found).trim_start();
                match rest.chars().next() {
                    Some(',') => rest = rest[1..].trim_start(),
                    Some('}') => return &rest[1..],
                    _ => return rest,
                }
            }
        }
        let end = text.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(text.len());
        let (word, rest) = text.split_at(end);
        path.push(word.to_owned());
        match rest.strip_prefix("::") {
            Some(next) => text = next,
            None => {
                found.extend(absolute(path, module));
                return rest;
            }
        }
    }
}

/// A path from the crate's root; `None` for one that is no module of this crate (`self::`, generic arguments).
fn absolute(path: Vec<String>, module: &[String]) -> Option<Vec<String>> {
    let supers = path.iter().take_while(|part| *part == "super").count();
    match path.first().map(String::as_str) {
        Some("crate") => Some(path[1..].to_vec()),
        Some("super") => {
            let base = &module[..module.len().checked_sub(supers)?];
            Some(base.iter().chain(&path[supers..]).cloned().collect())
        }
        _ => None,
    }
}

#[test]
fn no_room_names_one_above_it() {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut files = Vec::new();
    sources(&src, &mut files);
    let (mut checked, mut wrong) = (BTreeSet::new(), Vec::new());
    for file in files {
        let module = module_of(&file, &src);
        let own = place(&module);
        let Some(room) = ROOMS.get(own).filter(|room| !UNCHECKED.contains(room)) else { continue };
        checked.insert(room);
        for target in named(&code(&file), &module) {
            if place(&target) > own {
                wrong.push(format!("{} names {}", module.join("::"), target.join("::")));
            }
        }
    }
    assert!(wrong.is_empty(), "arrows upwards:\n{}", wrong.join("\n"));
    assert!(
        checked.len() + UNCHECKED.len() == ROOMS.len(),
        "rooms without files: only {checked:?} are there"
    );
}

#[test]
fn the_test_sees_arrows() {
    let module = ["fs", "passthrough", "inode", "table"].map(str::to_owned);
    let text = "use super::key::{InodeKey, Seen};\nuse crate::fs::{Result, passthrough::{ops::lookup, host}};\n\
                fn f(x: &crate::limits::FdQuota) { supersuper::x() }";
    let found: Vec<String> = named(text, &module).iter().map(|path| path.join("::")).collect();
    let expected = [
        "fs::Result",
        "fs::passthrough::host",
        "fs::passthrough::inode::key::InodeKey",
        "fs::passthrough::inode::key::Seen",
        "fs::passthrough::ops::lookup",
        "limits::FdQuota",
    ];
    assert_eq!(found, expected);
    let places = |path: &str| place(&path.split("::").map(str::to_owned).collect::<Vec<_>>());
    assert!(places("fs::passthrough::ops::lookup") > places("fs::passthrough::inode::table"));
    assert!(places("fs::passthrough::PassthroughFs") > places("fs::passthrough::start"));
    assert!(places("fs::Result") < places("fs::passthrough::host"));
    assert!(places("device::queue") == ROOMS.len());
}
