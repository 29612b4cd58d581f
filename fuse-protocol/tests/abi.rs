//! The wire structs, flags and opcodes against the kernel's own header `linux/fuse.h`.
//!
//! `LANEFSD_FUSE_HEADER` names the header to compare with; the default is the one that linux-libc-dev
//! installs. A header older than 7.45 lacks some of them, which are skipped: `tests/run` gives the newest one.

#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "a failed test panics")]

use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::PathBuf;
use std::process::Command;

use fuse_protocol::abi;
use fuse_protocol::flags::{
    AttrFlags, FsyncFlags, GetattrFlags, InitFlags, InvalEntryFlags, IoctlFlags, LockFlags, OpenReplyFlags,
    OpenRequestFlags, PollFlags, ReleaseFlags, SetattrValid, SetupMappingFlags, SetxattrFlags, WriteFlags,
};
use fuse_protocol::notification::Notification;
use fuse_protocol::opcode::Opcode;

fn header() -> (PathBuf, String) {
    let path = std::env::var_os("LANEFSD_FUSE_HEADER").unwrap_or("/usr/include/linux/fuse.h".into());
    let path = PathBuf::from(path);
    let text = std::fs::read_to_string(&path);
    let text = text.unwrap_or_else(|e| panic!("{}: {e}; install linux-libc-dev", path.display()));
    (path, text)
}

/// Prints expressions from a C program that includes the header; name to value.
fn evaluate(expressions: &[(String, String)]) -> BTreeMap<String, u64> {
    let directory = tempfile::tempdir().unwrap();
    let (source, binary) = (directory.path().join("abi.c"), directory.path().join("abi"));
    let mut code = format!(
        "#include <stddef.h>\n#include <stdio.h>\n#include \"{}\"\nint main(void) {{\n",
        header().0.display()
    );
    for (name, expression) in expressions {
        writeln!(code, "printf(\"{name} %llu\\n\", (unsigned long long)({expression}));").unwrap();
    }
    code.push_str("return 0; }\n");
    std::fs::write(&source, code).unwrap();
    let compiled = Command::new("cc").arg("-w").arg("-o").arg(&binary).arg(&source).status().unwrap();
    assert!(compiled.success());
    let output = Command::new(&binary).output().unwrap();
    let lines = String::from_utf8(output.stdout).unwrap();
    lines
        .lines()
        .map(|line| line.split_once(' ').unwrap())
        .map(|(name, value)| (name.to_string(), value.parse().unwrap()))
        .collect()
}

fn header_minor(text: &str) -> u32 {
    let line = text.lines().find(|line| line.contains("#define FUSE_KERNEL_MINOR_VERSION")).unwrap();
    line.split_whitespace().last().unwrap().parse().unwrap()
}

#[test]
fn structs_have_the_kernels_layout() {
    let (_, text) = header();
    let known = |layout: &&abi::Layout| text.contains(&format!("struct {} {{", layout.c_name));
    let mut expressions = Vec::new();
    for layout in abi::layouts().filter(known) {
        let c_name = layout.c_name;
        expressions.push((c_name.to_string(), format!("sizeof(struct {c_name})")));
        for (field, _) in checked_fields(layout, &text) {
            let c_field = if field == "typ" { "type" } else { field };
            expressions.push((format!("{c_name}.{field}"), format!("offsetof(struct {c_name}, {c_field})")));
        }
    }
    let values = evaluate(&expressions);
    for layout in abi::layouts().filter(known) {
        assert_eq!(values[layout.c_name], layout.size as u64, "size of {}", layout.c_name);
        for (field, offset) in checked_fields(layout, &text) {
            assert_eq!(
                values[&format!("{}.{field}", layout.c_name)],
                offset as u64,
                "{}.{field}",
                layout.c_name
            );
        }
    }
    let missing: Vec<_> = abi::layouts().filter(|l| !known(l)).map(|l| l.c_name).collect();
    if header_minor(&text) >= abi::KERNEL_MINOR_VERSION {
        assert!(missing.is_empty(), "the header lacks {missing:?}");
    }
}

/// Padding has other names here than there, and an old header lacks the newest fields.
fn checked_fields(layout: &abi::Layout, text: &str) -> Vec<(&'static str, usize)> {
    let body =
        text.split(&format!("struct {} {{", layout.c_name)).nth(1).unwrap().split("\n};").next().unwrap();
    let words: Vec<_> = body.split(|c: char| !c.is_ascii_alphanumeric() && c != '_').collect();
    let padding = ["reserved", "spare0", "spare2", "unused"];
    let fields = layout.fields.iter().copied().filter(|(field, _)| !padding.contains(field));
    let (known, unknown): (Vec<_>, Vec<_>) =
        fields.partition(|(field, _)| words.contains(&if *field == "typ" { "type" } else { field }));
    assert!(
        unknown.is_empty() || header_minor(text) < abi::KERNEL_MINOR_VERSION,
        "{}: {unknown:?}",
        layout.c_name
    );
    known
}

#[test]
fn constants_have_the_kernels_values() {
    let (_, text) = header();
    let mut ours: Vec<(String, u64)> = Vec::new();
    macro_rules! flags {
        ($($flags:ty, $prefix:literal;)*) => {$(
            ours.extend(<$flags>::all().iter_names().map(|(name, bit)| (format!("{}{}", $prefix, name.trim_start_matches('_')), u64::from(bit.bits()))));
        )*};
    }
    flags! {
        InitFlags, "FUSE_";
        SetattrValid, "FATTR_";
        OpenReplyFlags, "FOPEN_";
        OpenRequestFlags, "FUSE_OPEN_";
        WriteFlags, "FUSE_WRITE_";
        ReleaseFlags, "FUSE_RELEASE_";
        GetattrFlags, "FUSE_GETATTR_";
        LockFlags, "FUSE_LK_";
        FsyncFlags, "FUSE_FSYNC_";
        PollFlags, "FUSE_POLL_";
        SetupMappingFlags, "FUSE_SETUPMAPPING_FLAG_";
        InvalEntryFlags, "FUSE_";
        IoctlFlags, "FUSE_IOCTL_";
        AttrFlags, "FUSE_ATTR_";
        SetxattrFlags, "FUSE_SETXATTR_";
    }
    ours.extend(Opcode::ALL.iter().map(|(opcode, name)| (name.to_string(), u64::from(*opcode as u32))));
    ours.extend(
        Notification::CODES.iter().map(|(name, code)| (name.to_string(), u64::try_from(*code).unwrap())),
    );
    ours.push(("FUSE_KERNEL_VERSION".into(), u64::from(abi::KERNEL_VERSION)));
    ours.push(("FUSE_ROOT_ID".into(), abi::ROOT_ID));
    ours.push(("FUSE_EXT_GROUPS".into(), u64::from(abi::EXT_GROUPS)));

    let words: std::collections::BTreeSet<_> =
        text.split(|c: char| !c.is_ascii_alphanumeric() && c != '_').collect();
    let (known, unknown): (Vec<_>, Vec<_>) =
        ours.into_iter().partition(|(name, _)| words.contains(name.as_str()));
    assert!(known.len() > 90, "only {} constants were found in the header", known.len());
    let expressions: Vec<_> = known.iter().map(|(name, _)| (name.clone(), name.clone())).collect();
    let values = evaluate(&expressions);
    for (name, value) in &known {
        assert_eq!(values[name], *value, "{name}");
    }
    if header_minor(&text) >= abi::KERNEL_MINOR_VERSION {
        assert!(unknown.is_empty(), "the header lacks {unknown:?}");
    }
}

#[test]
fn no_opcode_of_the_header_is_missing() {
    let (_, text) = header();
    let body = text.split("enum fuse_opcode {").nth(1).unwrap().split("};").next().unwrap();
    for line in body.lines().filter(|line| line.trim().starts_with("FUSE_")) {
        let (name, rest) = line.trim().split_once('=').unwrap();
        let number = rest.trim().split(|c: char| !c.is_ascii_digit()).next().unwrap().parse().unwrap();
        if name.trim().contains("RESERVED") {
            continue;
        }
        let ours = Opcode::from_number(number).unwrap_or_else(|| panic!("{} is unknown here", name.trim()));
        assert!(Opcode::ALL.contains(&(ours, name.trim())), "{}", name.trim());
    }
}

/// Structs of the header that are of other transports, or that have another name here.
const LEFT_OUT: &[&str] = &[
    // The device that a user program implements, and ioctls that may read any memory of their caller.
    "cuse_init_in",
    "cuse_init_out",
    "fuse_ioctl_iovec",
    // /dev/fuse and io_uring.
    "fuse_backing_map",
    "fuse_uring_ent_in_out",
    "fuse_uring_req_header",
    "fuse_uring_cmd_req",
    // The first name of fuse_ext_header.
    "fuse_secctx_header",
];

#[test]
fn no_struct_of_the_header_is_missing() {
    let (_, text) = header();
    let structs = text.lines().filter_map(|line| line.strip_prefix("struct ")?.strip_suffix(" {"));
    let missing: Vec<_> = structs
        .filter(|name| !LEFT_OUT.contains(name) && !abi::layouts().any(|layout| layout.c_name == *name))
        .collect();
    assert!(missing.is_empty(), "{missing:?}");
}

#[test]
fn no_notification_of_the_header_is_missing() {
    let (_, text) = header();
    let body = text.split("enum fuse_notify_code {").nth(1).unwrap().split("};").next().unwrap();
    let names = body.lines().filter_map(|line| line.trim().split([' ', '=', ',']).next());
    for name in names.filter(|name| name.starts_with("FUSE_") && *name != "FUSE_NOTIFY_CODE_MAX") {
        assert!(Notification::CODES.iter().any(|(ours, _)| *ours == name), "{name}");
    }
}
