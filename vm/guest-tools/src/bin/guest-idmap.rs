//! An idmapped mount: users of the file system appear as others below it, and what those make belongs to
//! the users of the file system.
//!
//! Mounts SOURCE once more at TARGET, with ids from 0 on shown as those from 10000 on, and checks from
//! inside the guest that owners are right on both sides.

use std::ffi::CString;
use std::fs;
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, chown, lchown, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};
use clap::Parser;

/// First id that the mount shows, and how many.
const SHIFT: u32 = 10_000;
const COUNT: u32 = 1_000;
/// Who works below the mount: user and group there.
const USER: (u32, u32) = (SHIFT + 5, SHIFT + 6);

#[derive(Parser)]
#[command(about)]
struct Options {
    /// A mounted directory
    source: PathBuf,
    /// An empty directory for the idmapped mount
    target: PathBuf,
    /// Be the process that holds the user namespace
    #[arg(long, hide = true)]
    hold: bool,
    /// Be the user who makes things
    #[arg(long, hide = true)]
    work: bool,
}

fn main() -> Result<()> {
    let options = Options::parse();
    if options.hold {
        return hold();
    }
    if options.work {
        return work(&options.target);
    }
    mount(&options)?;
    check(&options)?;
    println!("owners are right");
    Ok(())
}

fn myself(options: &Options, part: &str) -> Result<Command> {
    let mut command = Command::new(std::env::current_exe()?);
    command.arg(part).args([&options.source, &options.target]);
    Ok(command)
}

/// Makes a user namespace, says so, and stays until standard input ends.
fn hold() -> Result<()> {
    // SAFETY: this process has one thread.
    let result = unsafe { libc::unshare(libc::CLONE_NEWUSER) };
    ensure!(result == 0, "no user namespace: {}", std::io::Error::last_os_error());
    let mut stdout = std::io::stdout();
    stdout.write_all(b"r")?;
    stdout.flush()?;
    std::io::stdin().read_to_end(&mut Vec::new())?;
    Ok(())
}

fn mount(options: &Options) -> Result<()> {
    let mut holder = myself(options, "--hold")?
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .context("no holder")?;
    holder.stdout.as_mut().context("no output")?.read_exact(&mut [0]).context("the holder failed")?;
    for map in ["uid_map", "gid_map"] {
        // Ids of the file system, what they appear as, and how many.
        fs::write(format!("/proc/{}/{map}", holder.id()), format!("0 {SHIFT} {COUNT}"))?;
    }
    let namespace = fs::File::open(format!("/proc/{}/ns/user", holder.id()))?;
    let result = attach(options, &namespace);
    drop(holder.stdin.take());
    holder.wait()?;
    result
}

fn attach(options: &Options, namespace: &fs::File) -> Result<()> {
    let source = CString::new(options.source.as_os_str().as_bytes())?;
    let target = CString::new(options.target.as_os_str().as_bytes())?;
    let empty = c"";
    // SAFETY: a path that ends with NUL; the kernel gives a descriptor or an error.
    let tree =
        unsafe { libc::syscall(libc::SYS_open_tree, libc::AT_FDCWD, source.as_ptr(), libc::OPEN_TREE_CLONE) };
    let tree = i32::try_from(tree).context("no descriptor")?;
    ensure!(tree >= 0, "open_tree: {}", std::io::Error::last_os_error());
    // SAFETY: the kernel has just given it to us.
    let tree = unsafe { OwnedFd::from_raw_fd(tree) };
    let userns_fd = u64::try_from(namespace.as_raw_fd())?;
    let attributes =
        libc::mount_attr { attr_set: libc::MOUNT_ATTR_IDMAP, attr_clr: 0, propagation: 0, userns_fd };
    // SAFETY: the struct has the size that is told, and lives long enough.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            tree.as_raw_fd(),
            empty.as_ptr(),
            libc::AT_EMPTY_PATH,
            &raw const attributes,
            size_of::<libc::mount_attr>(),
        )
    };
    ensure!(result == 0, "mount_setattr: {}", std::io::Error::last_os_error());
    // SAFETY: paths that end with NUL.
    let result = unsafe {
        libc::syscall(
            libc::SYS_move_mount,
            tree.as_raw_fd(),
            empty.as_ptr(),
            libc::AT_FDCWD,
            target.as_ptr(),
            libc::MOVE_MOUNT_F_EMPTY_PATH,
        )
    };
    ensure!(result == 0, "move_mount: {}", std::io::Error::last_os_error());
    Ok(())
}

/// As the user: one of each kind, and what may be done to it.
fn work(target: &Path) -> Result<()> {
    fs::create_dir(target.join("dir"))?;
    fs::write(target.join("dir/file"), "text")?;
    symlink("file", target.join("dir/link"))?;
    fs::write(target.join("file"), "text")?;
    ensure!(fs::read(target.join("file"))? == b"text", "the file says something else");
    fs::rename(target.join("file"), target.join("renamed"))?;
    fs::hard_link(target.join("renamed"), target.join("hard"))?;
    fs::File::options().write(true).open(target.join("renamed"))?.set_len(2)?;
    fs::remove_file(target.join("hard"))?;
    ensure!(fs::read_dir(target)?.count() >= 2, "not all is listed");
    Ok(())
}

fn owners(path: &Path) -> Result<(u32, u32)> {
    let seen = fs::symlink_metadata(path).with_context(|| format!("{} is missing", path.display()))?;
    Ok((seen.uid(), seen.gid()))
}

/// Works as the user, and as one whom the mount does not know, and looks from both sides.
fn check(options: &Options) -> Result<()> {
    use std::os::unix::process::CommandExt;
    let (source, target) = (&options.source, &options.target);
    let as_user = |(uid, gid)| -> Result<bool> {
        Ok(myself(options, "--work")?.uid(uid).gid(gid).stderr(Stdio::inherit()).status()?.success())
    };
    ensure!(as_user(USER)?, "the user could not work");
    for name in ["dir", "dir/file", "dir/link", "renamed"] {
        let (below, inside) = (owners(&target.join(name))?, owners(&source.join(name))?);
        ensure!(below == USER, "{name} belongs to {below:?} below the mount");
        ensure!(
            inside == (USER.0 - SHIFT, USER.1 - SHIFT),
            "{name} belongs to {inside:?} in the file system"
        );
    }
    // A new owner through the mount, and who the mount does not know.
    chown(target.join("renamed"), Some(SHIFT + 7), Some(SHIFT + 8))?;
    ensure!(
        owners(&source.join("renamed"))? == (7, 8),
        "chown(2) gave it to {:?}",
        owners(&source.join("renamed"))?
    );
    lchown(target.join("dir/link"), Some(SHIFT + 9), None)?;
    ensure!(owners(&source.join("dir/link"))?.0 == 9, "lchown(2) gave it to somebody else");
    if chown(target.join("renamed"), Some(3), None).is_ok() {
        bail!("a user whom the mount does not know became an owner");
    }
    if fs::write(target.join("roots"), "").is_ok() {
        bail!("a user whom the mount does not know has made a file");
    }
    Ok(())
}
