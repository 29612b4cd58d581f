//! The layout of `src/`: which room may use which, and how long files and functions are.
//!
//! A room is a folder of `src/`, or a file where there is no folder; a folder in a folder can be one too. [`ROOMS`]
//! has them from the ground up, each with the rooms that it may use. All of these stand above it in the table, so no
//! arrow leads upwards, and no files of different rooms use each other in a circle. `docs/architecture.md` says what
//! the rooms are for.
//!
//! Arrows are read from the sources: `use` declarations with all their branches, and paths elsewhere that begin with
//! `crate`, `super` or a crate that is a room. Unit tests may use what they like.

mod source;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use source::{code_of, functions, paths, production};

/// Rooms from the ground up, and which rooms each may use.
type Rooms = &'static [(&'static str, &'static [&'static str])];

/// The rooms of `src/`.
const ROOMS: Rooms = &[
    ("fuse_protocol", &[]),
    ("sync", &[]),
    ("sys", &["sync"]),
    ("logging", &["sync", "sys"]),
    ("metrics", &["fuse_protocol", "sync", "sys", "logging"]),
    ("limits", &["sync", "sys", "logging", "metrics"]),
    ("process", &["sync", "sys", "logging", "limits"]),
    ("mapping", &["fuse_protocol", "sync", "sys", "logging"]),
    ("state_file", &["sync", "sys", "logging"]),
    ("migration", &["sync", "sys", "logging"]),
    (
        "fs",
        &[
            "fuse_protocol",
            "sync",
            "sys",
            "logging",
            "metrics",
            "limits",
            "mapping",
            "state_file",
            "migration",
        ],
    ),
    (
        "server",
        &["fuse_protocol", "sync", "sys", "logging", "metrics", "limits", "state_file", "migration", "fs"],
    ),
    (
        "device",
        &[
            "fuse_protocol",
            "sync",
            "sys",
            "logging",
            "metrics",
            "limits",
            "process",
            "state_file",
            "migration",
            "fs",
            "server",
        ],
    ),
    ("sandbox", &["sync", "sys", "logging", "limits", "process"]),
    (
        "config",
        &["logging", "metrics", "limits", "mapping", "migration", "fs", "device", "process", "sandbox"],
    ),
    ("cli", &["logging", "limits", "mapping", "migration", "fs", "device", "process", "sandbox", "config"]),
    (
        "daemon",
        &[
            "fuse_protocol",
            "sync",
            "sys",
            "logging",
            "metrics",
            "limits",
            "mapping",
            "state_file",
            "migration",
            "fs",
            "server",
            "device",
            "process",
            "sandbox",
            "config",
        ],
    ),
    ("main", &["sys", "logging", "process", "config", "cli", "daemon"]),
];

/// The folders of the passthrough file system, among each other. The files beside them join all of it.
const FOLDERS: Rooms = &[
    ("fs/passthrough/host", &[]),
    ("fs/passthrough/inode", &["fs/passthrough/host"]),
    ("fs/passthrough/handle_table", &["fs/passthrough/host", "fs/passthrough/inode"]),
    ("fs/passthrough/caller", &["fs/passthrough/host", "fs/passthrough/inode"]),
    (
        "fs/passthrough/ops",
        &[
            "fs/passthrough/host",
            "fs/passthrough/inode",
            "fs/passthrough/handle_table",
            "fs/passthrough/caller",
        ],
    ),
    (
        "fs/passthrough/migrate",
        &["fs/passthrough/host", "fs/passthrough/inode", "fs/passthrough/handle_table", "fs/passthrough/ops"],
    ),
];

/// Lines that a file may have.
const LONGEST_FILE: usize = 500;
/// Lines that a function may have, outside of tests.
const LONGEST_FUNCTION: usize = 60;

/// Files of `src/` by their path in it.
type Sources = BTreeMap<String, String>;

/// What one file uses of one room.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Arrow {
    file: String,
    from: String,
    to: String,
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// All Rust files below a folder of the project, by their path in it.
fn read(folder: &str) -> Sources {
    let mut found = Sources::new();
    let mut folders = vec![root().join(folder)];
    while let Some(next) = folders.pop() {
        for entry in fs::read_dir(&next).unwrap().map(Result::unwrap) {
            let path = entry.path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let name = path.strip_prefix(root().join(folder)).unwrap().to_str().unwrap().to_owned();
                found.insert(name, fs::read_to_string(&path).unwrap());
            }
        }
    }
    found
}

/// The path of the module that a file is.
fn module_of(file: &str) -> Vec<String> {
    let path = file.trim_end_matches(".rs").trim_end_matches("/mod");
    path.split('/').filter(|part| !["main", "lib"].contains(part)).map(str::to_owned).collect()
}

/// The innermost room that a module path leads to.
fn room_of(module: &[String], rooms: Rooms) -> Option<String> {
    let mut names = (1..=module.len()).rev().map(|length| module[..length].join("/"));
    names.find(|name| rooms.iter().any(|(room, _)| room == name))
}

/// The room of a file, if it has one.
fn room_of_file(file: &str, rooms: Rooms) -> Option<String> {
    let main = (file == "main.rs").then(|| vec!["main".to_owned()]);
    room_of(&main.unwrap_or_else(|| module_of(file)), rooms)
}

/// Where a path leads that is written in this module, as parts from the root of the crate.
fn resolve(
    parts: &[String],
    is_use: bool,
    module: &[String],
    modules: &BTreeSet<Vec<String>>,
) -> Vec<String> {
    let (first, rest) = parts.split_first().unwrap();
    match first.as_str() {
        "crate" | "lanefsd" => rest.to_vec(),
        "self" => [module, rest].concat(),
        "super" => {
            let outer = &module[..module.len().saturating_sub(1)];
            if rest.first().is_some_and(|next| next == "super") {
                return resolve(rest, is_use, outer, modules);
            }
            [outer, rest].concat()
        }
        _ => {
            let child = [module, std::slice::from_ref(first)].concat();
            if is_use && modules.contains(&child) { [module, parts].concat() } else { parts.to_vec() }
        }
    }
}

/// All arrows between rooms.
fn arrows(sources: &Sources, rooms: Rooms) -> BTreeSet<Arrow> {
    let modules: BTreeSet<Vec<String>> = sources.keys().map(|file| module_of(file)).collect();
    let is_test = |file: &str| file.ends_with("/tests.rs") || file.contains("/tests/");
    let mut found = BTreeSet::new();
    for (file, text) in sources.iter().filter(|(file, _)| !is_test(file)) {
        let Some(from) = room_of_file(file, rooms) else { continue };
        let module = module_of(file);
        for path in
            paths(&production(&code_of(text)), &["crate", "super", "self", "lanefsd", "fuse_protocol"])
        {
            let target = resolve(&path.parts, path.is_use, &module, &modules);
            if let Some(to) = room_of(&target, rooms).filter(|to| *to != from) {
                found.insert(Arrow { file: file.clone(), from: from.clone(), to });
            }
        }
    }
    found
}

/// Arrows that the table does not allow.
fn forbidden(rooms: Rooms, arrows: &BTreeSet<Arrow>) -> Vec<&Arrow> {
    let allowed = |arrow: &&Arrow| {
        rooms.iter().any(|(room, uses)| *room == arrow.from && uses.contains(&arrow.to.as_str()))
    };
    arrows.iter().filter(|arrow| !allowed(arrow)).collect()
}

/// Functions outside of tests that are too long, as `file:line name`.
fn long_functions(sources: &Sources) -> Vec<String> {
    let of = |(file, text): (&String, &String)| {
        let all = functions(&production(&code_of(text))).into_iter();
        let long = all.filter(|function| function.length > LONGEST_FUNCTION);
        let name =
            |found: source::Function| format!("{file}:{} {}: {} lines", found.line, found.name, found.length);
        long.map(name).collect::<Vec<_>>()
    };
    sources.iter().flat_map(of).collect()
}

/// An arrow as a sentence.
fn sentence(Arrow { file, from, to }: &Arrow) -> String {
    format!("src/{file} ({from}) uses {to}")
}

#[test]
fn a_room_uses_only_rooms_above_it_in_the_table() {
    for (rooms, index) in
        [ROOMS, FOLDERS].iter().flat_map(|rooms| (0..rooms.len()).map(move |index| (rooms, index)))
    {
        let (room, uses) = rooms[index];
        for used in uses {
            assert!(
                rooms[..index].iter().any(|(above, _)| above == used),
                "{room} uses {used}, which is not above it"
            );
        }
    }
}

#[test]
fn every_file_is_in_a_room() {
    let homeless: Vec<_> =
        read("src").into_keys().filter(|file| room_of_file(file, ROOMS).is_none()).collect();
    // The root of the library only names modules.
    assert_eq!(homeless, ["lib.rs"], "these files of src/ are in no room of the table");
}

#[test]
fn no_arrow_leads_where_the_table_does_not_allow_it() {
    let arrows = arrows(&read("src"), ROOMS);
    assert!(arrows.len() > 50, "only {} arrows were found", arrows.len());
    let forbidden = forbidden(ROOMS, &arrows);
    let wrong: Vec<String> = forbidden.into_iter().map(sentence).collect();
    assert!(wrong.is_empty(), "arrows that the layout does not allow:\n{}", wrong.join("\n"));
}

#[test]
fn the_folders_of_the_passthrough_file_system_use_each_other_one_way() {
    let arrows = arrows(&read("src"), FOLDERS);
    let wrong: Vec<String> = forbidden(FOLDERS, &arrows).into_iter().map(sentence).collect();
    assert!(wrong.is_empty(), "arrows that the layout does not allow:\n{}", wrong.join("\n"));
}

#[test]
fn no_file_and_no_function_is_too_long() {
    for folder in ["src", "fuse-protocol/src", "lanefsctl/src"] {
        let sources = read(folder);
        let long: Vec<_> = sources.iter().filter(|(_, text)| text.lines().count() > LONGEST_FILE).collect();
        let names: Vec<_> = long.iter().map(|(file, _)| file).collect();
        assert!(names.is_empty(), "files of {folder} with more than {LONGEST_FILE} lines: {names:?}");
        let long = long_functions(&sources);
        assert!(long.is_empty(), "functions of {folder} with more than {LONGEST_FUNCTION} lines: {long:#?}");
    }
}

/// The forbidden arrows of one file with this text, as the rooms that they lead to.
fn wrong_arrows_of(file: &str, text: &str) -> Vec<String> {
    let mut sources = Sources::from([(file.to_owned(), text.to_owned())]);
    for other in ["fs/mod.rs", "fs/null.rs", "daemon/mod.rs", "sync.rs"] {
        sources.entry(other.to_owned()).or_default();
    }
    let arrows = arrows(&sources, ROOMS);
    forbidden(ROOMS, &arrows).iter().map(|arrow| arrow.to.clone()).collect()
}

#[test]
fn a_wrong_arrow_is_found_however_it_is_written() {
    let wrong = [
        "use crate::fs::FileSystem;\n",
        "use crate::{\n    fs::{self, FileSystem as F},\n    sync::Mutex,\n};\n",
        "pub(crate) use super::super::fs::*;\n",
        "fn f() -> crate::fs::null::NullStore {}\n",
        "const X: &str = \"\\\"\"; // \"\nstatic F: crate::fs::F = 'a';\n",
        "#[cfg(test)]\nmod tests {\n    fn f() {}\n}\nfn g() { crate::fs::f(); }\n",
        "const X: &str = r#\"\"#; use crate::fs;\n",
    ];
    for text in wrong {
        assert_eq!(wrong_arrows_of("sys/locks.rs", text), ["fs"], "{text}");
    }
    assert_eq!(wrong_arrows_of("fs/mod.rs", "use null::NullStore;\nuse crate::daemon::run;\n"), ["daemon"]);
    assert_eq!(wrong_arrows_of("fs/null.rs", "use super::super::daemon::Share;\n"), ["daemon"]);
    assert_eq!(wrong_arrows_of("sys/mod.rs", "use fuse_protocol::abi;\n"), ["fuse_protocol"]);
}

#[test]
fn a_wrong_arrow_between_folders_is_found() {
    let file = |text: &str| ("fs/passthrough/inode/mod.rs".to_owned(), text.to_owned());
    for (text, wrong) in [
        ("use crate::fs::passthrough::ops::open::open;\n", 1),
        ("use super::ops::open::open;\n", 1),
        ("use super::host::HostFile;\n", 0),
    ] {
        let arrows = arrows(&Sources::from([file(text)]), FOLDERS);
        assert_eq!(forbidden(FOLDERS, &arrows).len(), wrong, "{text}");
    }
}

#[test]
fn what_is_no_arrow_is_not_taken_for_one() {
    let right = [
        "use crate::sync::Mutex;\n",
        "//! See [`crate::fs`].\n/* use crate::fs; /* crate::fs::x */ */\nuse super::umask;\n",
        "const X: &str = \"crate::fs::F\"; const Y: &str = r#\"crate::fs::F \"#;\n",
        "#[cfg(test)]\nmod tests {\n    use crate::fs::F;\n}\n",
        "#[cfg(test)]\nuse crate::fs::F;\n",
        "use std::fs::File;\nfn f() { std::fs::read(x); rustix::fs::open(y); }\n",
    ];
    for text in right {
        assert_eq!(wrong_arrows_of("sys/locks.rs", text), [""; 0], "{text}");
    }
}

#[test]
fn a_long_function_is_found() {
    let body = "    x();\n".repeat(LONGEST_FUNCTION);
    let text = format!("fn short() {{}}\nimpl X {{\n    fn long(a: [u8; 4]) -> [u8; 2] {{\n{body}}}\n}}\n");
    let sources = Sources::from([("sys/x.rs".to_owned(), text)]);
    assert_eq!(long_functions(&sources), [format!("sys/x.rs:3 long: {} lines", LONGEST_FUNCTION + 2)]);
}
