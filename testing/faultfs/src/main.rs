//! Mounts the store on a directory, with one file that takes its time for each read and write, until its standard
//! input ends: `faultfs DIRECTORY BYTES MILLISECONDS`.
#![forbid(unsafe_code)]

use std::io::Read;
use std::path::Path;
use std::time::Duration;

use faultfs::FaultFs;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let [directory, length, delay] = &std::env::args().skip(1).collect::<Vec<_>>()[..] else {
        return Err("usage: faultfs DIRECTORY BYTES MILLISECONDS".into());
    };
    let store = FaultFs::with_length(Path::new(directory), length.parse()?)?;
    store.delay(Duration::from_millis(delay.parse()?));
    println!("mounted");
    std::io::stdin().read_to_end(&mut Vec::new())?;
    Ok(())
}
