//! lsattr(1) and chattr(1), which busybox has not: prints the flags of files, and changes them.

use std::fs::File;
use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::Parser;
use rustix::fs::{IFlags, ioctl_getflags, ioctl_setflags};

#[derive(Parser)]
#[command(about)]
struct Options {
    /// Flags to change (FS_*_FL of linux/fs.h, added up)
    #[arg(long, default_value_t = 0)]
    toggle: u32,
    /// Files and directories
    files: Vec<PathBuf>,
}

fn main() -> Result<()> {
    let options = Options::parse();
    for path in &options.files {
        let file = File::open(path).with_context(|| format!("{} cannot be opened", path.display()))?;
        let before = ioctl_getflags(&file).with_context(|| format!("{} tells no flags", path.display()))?;
        if options.toggle != 0 {
            let after = before ^ IFlags::from_bits_retain(options.toggle);
            ioctl_setflags(&file, after).with_context(|| format!("{} keeps its flags", path.display()))?;
        }
        println!("{:x} {}", ioctl_getflags(&file)?.bits(), path.display());
    }
    Ok(())
}
