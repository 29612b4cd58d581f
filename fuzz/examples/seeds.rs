//! Writes seeds for the corpora: typical requests and conversations. `fuzz/run --seeds` calls it and
//! keeps of its output what adds coverage.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    clippy::cast_possible_wrap,
    clippy::cast_sign_loss,
    clippy::cast_lossless,
    reason = "a panic is a finding"
)]

use std::fs;
use std::path::{Path, PathBuf};

use fuse_protocol::abi;
use fuse_protocol::opcode::Opcode;
use lanefsd_fuzz::input::Input;
use lanefsd_fuzz::requests::{Known, draft};
use lanefsd_fuzz::{chain, control, migration, server};
use zerocopy::{Immutable, IntoBytes};

/// Random requests of each kind.
const VARIANTS: u64 = 12;

fn main() {
    let Some(directory) = std::env::args_os().nth(1).map(PathBuf::from) else {
        eprintln!("usage: seeds DIRECTORY");
        std::process::exit(1);
    };
    let seeds = [
        ("decode", decode()),
        ("server", servers(&[0, 2, 3])),
        ("share", servers(&[0, 1, 3, 0x3e, 0x7f, 0xc0])),
        ("chain", chains()),
        ("control", controls()),
        ("migration", migration::seeds()),
    ];
    for (target, seeds) in seeds {
        write(&directory.join(target), &seeds);
    }
}

fn write(directory: &Path, seeds: &[Vec<u8>]) {
    fs::create_dir_all(directory).expect("the directory can be made");
    for (number, seed) in seeds.iter().enumerate() {
        fs::write(directory.join(format!("seed-{number:04}")), seed).expect("seeds can be written");
    }
}

/// Numbers that are the same each time (splitmix64).
fn noise(seed: u64) -> Vec<u8> {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (state ^ state >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed ^ mixed >> 31
    };
    (0..16).flat_map(|_| next().to_le_bytes()).collect()
}

fn message(opcode: Opcode, node: u64, arguments: &[u8], extensions: u16) -> Vec<u8> {
    let header = abi::InHeader {
        len: u32::try_from(size_of::<abi::InHeader>() + arguments.len()).unwrap_or(0),
        opcode: opcode as u32,
        unique: 2,
        nodeid: node,
        pid: 1,
        total_extlen: extensions,
        ..Default::default()
    };
    [header.as_bytes(), arguments].concat()
}

/// Requests of every kind, in each layout.
fn decode() -> Vec<Vec<u8>> {
    let mut seeds = Vec::new();
    for (opcode, _) in Opcode::ALL {
        for variant in 0..VARIANTS {
            let bytes = if variant == 0 { Vec::new() } else { noise(variant) };
            let draft = draft(*opcode, &mut Input::new(&bytes), &Known::default());
            let message = message(*opcode, draft.node, &draft.arguments, draft.extensions);
            seeds.push([&[u8::try_from(variant & 3).unwrap_or(0)], message.as_slice()].concat());
        }
    }
    seeds
}

/// A request of a script: its kind, its inode, its arguments.
type Line = (Opcode, u64, Vec<u8>);

fn line<T: IntoBytes + Immutable>(opcode: Opcode, node: u64, arguments: T, tail: &[u8]) -> Line {
    (opcode, node, [arguments.as_bytes(), tail].concat())
}

fn init() -> Line {
    let (flags, flags2) = (0x73ff_fffb, u32::MAX);
    let init =
        abi::InitIn { major: 7, minor: 45, max_readahead: 1 << 17, flags, flags2, ..Default::default() };
    line(Opcode::Init, 0, init, b"")
}

/// What a guest does with files: node 2 is a directory, node 3 a file with handles 1 and 2.
fn files() -> Vec<Line> {
    let write = |offset, data: &'static [u8]| {
        let size = u32::try_from(data.len()).unwrap_or(0);
        line(Opcode::Write, 3, abi::WriteIn { fh: 1, offset, size, ..Default::default() }, data)
    };
    let lock = |owner, typ| {
        let lk = abi::FileLock { start: 0, end: 9, typ, pid: 1 };
        abi::LkIn { fh: 1, owner, lk, lk_flags: 0, padding: 0 }
    };
    let copy = abi::CopyFileRangeIn {
        fh_in: 1,
        nodeid_out: 3,
        fh_out: 2,
        off_out: 100,
        len: 5,
        ..Default::default()
    };
    let read = abi::ReadIn { fh: 1, size: 64, ..Default::default() };
    vec![
        init(),
        line(Opcode::Mkdir, 1, abi::MkdirIn { mode: 0o755, umask: 0 }, b"dir\0"),
        line(Opcode::Create, 1, abi::CreateIn { flags: 2, mode: 0o100_644, ..Default::default() }, b"file\0"),
        line(Opcode::Open, 3, abi::OpenIn { flags: 2, open_flags: 0 }, b""),
        write(0, b"hello, world"),
        write(4096, b"behind a hole"),
        line(Opcode::Read, 3, read, b""),
        line(Opcode::Getattr, 3, abi::GetattrIn::default(), b""),
        line(Opcode::Statx, 3, abi::StatxIn { getattr_flags: 1, fh: 1, ..Default::default() }, b""),
        line(Opcode::Setattr, 3, abi::SetattrIn { valid: 0x7f, fh: 1, size: 100, ..Default::default() }, b""),
        line(Opcode::Fallocate, 3, abi::FallocateIn { fh: 1, length: 200, ..Default::default() }, b""),
        line(Opcode::Lseek, 3, abi::LseekIn { fh: 1, offset: 1, whence: 4, padding: 0 }, b""),
        line(Opcode::CopyFileRange, 3, copy, b""),
        line(Opcode::CopyFileRange64, 3, copy, b""),
        line(Opcode::Setlk, 3, lock(1, 1), b""),
        line(Opcode::Getlk, 3, lock(2, 0), b""),
        line(Opcode::Setlkw, 3, lock(1, 2), b""),
        line(Opcode::Flush, 3, abi::FlushIn { fh: 1, lock_owner: 1, ..Default::default() }, b""),
        line(Opcode::Fsync, 3, abi::FsyncIn { fh: 1, ..Default::default() }, b""),
        line(Opcode::Release, 3, abi::ReleaseIn { fh: 1, ..Default::default() }, b""),
        line(Opcode::Release, 3, abi::ReleaseIn { fh: 2, ..Default::default() }, b""),
        line(Opcode::Tmpfile, 1, abi::CreateIn { flags: 2, mode: 0o100_600, ..Default::default() }, b"#1\0"),
        line(Opcode::Forget, 4, abi::ForgetIn { nlookup: 1 }, b""),
        line(Opcode::Destroy, 0, [0u8; 0], b""),
    ]
}

/// What a guest does with names and attributes.
fn names() -> Vec<Line> {
    let list = abi::ReadIn { fh: 1, size: 4096, ..Default::default() };
    let forget = [2u64, 1, 3, 2].map(u64::to_le_bytes).concat();
    vec![
        init(),
        line(Opcode::Mkdir, 1, abi::MkdirIn { mode: 0o755, umask: 0 }, b"dir\0"),
        line(Opcode::Mknod, 2, abi::MknodIn { mode: 0o100_644, ..Default::default() }, b"file\0"),
        line(Opcode::Symlink, 1, [0u8; 0], b"link\0dir/file\0"),
        line(Opcode::Readlink, 4, [0u8; 0], b""),
        line(Opcode::Link, 1, abi::LinkIn { oldnodeid: 3 }, b"other\0"),
        line(Opcode::Lookup, 2, [0u8; 0], b"..\0"),
        line(Opcode::Lookup, 1, [0u8; 0], b"missing\0"),
        line(Opcode::Rename, 2, abi::RenameIn { newdir: 1 }, b"file\0moved\0"),
        line(Opcode::Rename2, 1, abi::Rename2In { newdir: 1, flags: 2, padding: 0 }, b"moved\0link\0"),
        line(Opcode::Setxattr, 3, abi::SetxattrIn { size: 5, ..Default::default() }, b"user.a\0value"),
        line(Opcode::Getxattr, 3, abi::GetxattrIn { size: 64, padding: 0 }, b"user.a\0"),
        line(Opcode::Listxattr, 3, abi::GetxattrIn { size: 0, padding: 0 }, b""),
        line(Opcode::Removexattr, 3, [0u8; 0], b"user.a\0"),
        line(Opcode::Access, 3, abi::AccessIn { mask: 4, padding: 0 }, b""),
        line(Opcode::Statfs, 1, [0u8; 0], b""),
        line(Opcode::Opendir, 1, abi::OpenIn::default(), b""),
        line(Opcode::Readdirplus, 1, list, b""),
        line(Opcode::Readdir, 1, list, b""),
        line(Opcode::Fsyncdir, 1, abi::FsyncIn { fh: 1, ..Default::default() }, b""),
        line(Opcode::Releasedir, 1, abi::ReleaseIn { fh: 1, ..Default::default() }, b""),
        line(Opcode::Syncfs, 1, 0u64, b""),
        line(Opcode::Interrupt, 0, abi::InterruptIn { unique: 2 }, b""),
        line(Opcode::Unlink, 1, [0u8; 0], b"moved\0"),
        line(Opcode::Rmdir, 1, [0u8; 0], b"dir\0"),
        line(Opcode::BatchForget, 0, abi::BatchForgetIn { count: 2, dummy: 0 }, &forget),
        init(),
    ]
}

/// Scripts with each of `settings`, and one request of every kind in a session with the first.
fn servers(settings: &[u8]) -> Vec<Vec<u8>> {
    let raw = |(opcode, node, arguments): &Line, cuts: u8| {
        let message = message(*opcode, *node, arguments, 0);
        let len = u16::try_from(message.len()).unwrap_or(0).to_le_bytes();
        [&[server::RAW], &len[..], &message, &[0, cuts, cuts]].concat()
    };
    let script = |lines: &[Line], cuts| lines.iter().flat_map(|line| raw(line, cuts)).collect::<Vec<u8>>();
    let mut seeds = Vec::new();
    let whole = settings.iter().map(|setting| (*setting, 0));
    for (setting, cuts) in whole.chain([(settings[0], 3), (settings[0], 0x75)]) {
        seeds.push([vec![setting], script(&files(), cuts)].concat());
        seeds.push([vec![setting], script(&names(), cuts)].concat());
    }
    for kind in 1..=u8::try_from(Opcode::ALL.len()).unwrap_or(u8::MAX) {
        for variant in 0..3 {
            let setting = script(&files()[..5], 0);
            seeds.push([vec![settings[0]], setting, vec![kind], noise(variant)].concat());
        }
    }
    seeds
}

/// A number as [`Input::edge`] reads it.
fn edge(value: u64) -> Vec<u8> {
    match u16::try_from(value) {
        Ok(small) if small % 8 == 0 && small < 1024 => vec![u8::try_from(small / 8).unwrap_or(0)],
        Ok(short) => [&[128][..], &short.to_le_bytes()].concat(),
        Err(_) => [&[160][..], &value.to_le_bytes()].concat(),
    }
}

/// Chains in the ring and in an indirect table.
fn chains() -> Vec<Vec<u8>> {
    use chain::step;
    let describe = |place: u8, index: u8, address, len, flags: u8, next: u8| {
        [vec![step::DESCRIBE, place, index], edge(address), edge(len), vec![flags, next]].concat()
    };
    let poke = [&[step::POKE, 0, 0x20, 16][..], b"sixteen bytes of"].concat();
    let serve =
        |head| vec![step::OFFER, head, 1, step::SERVE, 16, 0, 0, 0, step::ASK, step::SPARE, step::REFUSE];
    let direct =
        [describe(0, 0, 0x2000, 16, 1, 1), describe(0, 1, 0x3f00, 0x300, 3, 2), describe(0, 2, 0, 0, 2, 0)];
    // Place 129 is a table at 0x2040.
    let inside = [describe(129, 0, 0x2000, 40, 1, 1), describe(129, 1, 0x3000, 100, 2, 0)];
    let indirect = [describe(0, 0, 0x2000, 8, 1, 1), describe(0, 1, 129 * 64, 32, 4, 0)];
    let looped = [describe(0, 0, 0x2000, 8, 1, 0)];
    let mut seeds = Vec::new();
    for flags in [0x30, 0x31, 0x39] {
        for chain in [&direct.concat(), &[inside.concat(), indirect.concat()].concat(), &looped.concat()] {
            let start = if flags & 8 == 0 { Vec::new() } else { vec![0xff, 0xff] };
            seeds.push([vec![flags], start, poke.clone(), chain.clone(), serve(0), serve(0)].concat());
            seeds.push([vec![flags & !8], chain.clone(), vec![step::WALK, 0, 0]].concat());
        }
    }
    seeds
}

/// Conversations: a queue that serves a guest, and what front ends do to it.
fn controls() -> Vec<Vec<u8>> {
    use control::step;
    let request = |line: &Line| {
        let message = message(line.0, line.1, &line.2, 0);
        [&[step::REQUEST, 1, u8::try_from(message.len()).unwrap_or(0)], message.as_slice()].concat()
    };
    let frame = |code: u8, body: &[u8]| {
        let len = u8::try_from(body.len()).unwrap_or(0);
        [&[step::FRAME, code, 9, len], body, &[0]].concat()
    };
    let state = |value: u32| [1, value].map(u32::to_le_bytes).concat();
    let set_up = vec![step::SET_UP, 1];
    let stop = frame(11, &state(0));
    let mut seeds = Vec::new();
    for (choice, lines) in [(0, files()), (2, files()), (3, names())] {
        let requests = lines.iter().flat_map(request).collect();
        seeds.push([vec![choice], set_up.clone(), requests, stop.clone()].concat());
    }
    let serving = [vec![3], set_up.clone(), request(&init())].concat();
    let region = [0u64, 0, 1 << 16, 0x7000_0000, 0].map(u64::to_le_bytes).concat();
    let config = [0u32, 40, 0].map(u32::to_le_bytes).concat();
    let features = 0x1_7000_0000u64.to_le_bytes();
    for then in [
        stop.clone(),
        frame(34, b""),
        frame(4, b""),
        frame(18, &state(0)),
        frame(38, &region),
        frame(37, &region),
        frame(24, &[config, vec![0; 40]].concat()),
        frame(1, b""),
        frame(15, b""),
        frame(17, b""),
        frame(36, b""),
        frame(2, &features),
        frame(8, &state(16)),
        vec![step::KICK, 1, step::SET_UP, 129, step::SET_UP, 2],
        [vec![step::POKE, 2, 0x18, 2], vec![0xff, 0xff], vec![step::KICK, 1]].concat(),
        [&[step::RAW, 20][..], &stop[4..]].concat(),
    ] {
        seeds.push([serving.clone(), then, set_up.clone(), request(&init())].concat());
    }
    // Descriptors of every kind as a call.
    for fd in 0..16 {
        let call = [&[step::FRAME, 13, 1, 8], &1u64.to_le_bytes()[..], &[1, fd]].concat();
        seeds
            .push([vec![0], set_up.clone(), call, request(&init()), request(&init()), stop.clone()].concat());
    }
    for code in 0..29 {
        for variant in 0..2 {
            seeds.push([serving.clone(), vec![step::MESSAGE, code], noise(variant)].concat());
        }
    }
    seeds
}
