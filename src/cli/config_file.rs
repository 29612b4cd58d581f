//! Options from a file: `--config FILE`, in TOML, with the long names of the options as keys.
//!
//! What the file says becomes part of the command line, in front of what was typed, which takes precedence.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, absolute};

use clap::{ArgAction, Command};
use thiserror::Error;
use toml::{Table, Value};

/// Options that a file cannot give.
const NOT_IN_FILES: [&str; 5] = ["config", "check-state", "help", "print-capabilities", "version"];

/// Why the options of a file cannot be had. Each message is one sentence.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[allow(missing_docs, reason = "the messages say it")]
pub enum FileError {
    #[error("--config needs the path of a file")]
    NoPath,
    #[error("the configuration file {path} cannot be read: {problem}")]
    Unreadable { path: String, problem: String },
    #[error("the configuration file {path} is no valid TOML: line {line}: {problem}")]
    NoToml { path: String, line: usize, problem: String },
    #[error(
        "the configuration file {path} has the unknown key {key}; keys are the long options without --, which lanefsd --help lists"
    )]
    UnknownKey { path: String, key: String },
    #[error("the configuration file {path} has no valid value for {key}: give {wanted}")]
    BadValue { path: String, key: String, wanted: &'static str },
}

/// An argument after the program's name.
enum Argument<'a> {
    /// `--config`, with the path that follows, if there is one.
    Config(Option<&'a Path>),
    Other(&'a OsString),
}

fn each(arguments: &[OsString]) -> impl Iterator<Item = Argument<'_>> {
    let mut arguments = arguments.iter().skip(1);
    std::iter::from_fn(move || {
        let argument = arguments.next()?;
        Some(match argument.as_bytes().strip_prefix(b"--config") {
            Some(b"") => Argument::Config(arguments.next().map(Path::new)),
            Some([b'=', path @ ..]) => Argument::Config(Some(Path::new(OsStr::from_bytes(path)))),
            _ => Argument::Other(argument),
        })
    })
}

/// The command line with the options of each `--config` in it, in front of all others. `command` knows the options.
pub(super) fn expand(arguments: Vec<OsString>, command: &Command) -> Result<Vec<OsString>, FileError> {
    let (mut from_files, mut typed) = (Vec::new(), Vec::new());
    for argument in each(&arguments) {
        match argument {
            Argument::Config(path) => from_files.extend(read(path.ok_or(FileError::NoPath)?, command)?),
            Argument::Other(argument) => typed.push(argument.clone()),
        }
    }
    Ok(arguments.first().cloned().into_iter().chain(from_files).chain(typed).collect())
}

/// The command line for a process with another working directory: with absolute paths of files.
pub(super) fn with_absolute_paths(arguments: &[OsString]) -> Vec<OsString> {
    let moved = each(arguments).map(|argument| match argument {
        Argument::Other(argument) => argument.clone(),
        Argument::Config(path) => {
            let path = path.unwrap_or(Path::new(""));
            let mut option = OsString::from("--config=");
            option.push(absolute(path).unwrap_or_else(|_| path.to_owned()));
            option
        }
    });
    arguments.first().cloned().into_iter().chain(moved).collect()
}

fn read(path: &Path, command: &Command) -> Result<Vec<OsString>, FileError> {
    let name = path.display().to_string();
    let text = std::fs::read_to_string(path)
        .map_err(|error| FileError::Unreadable { path: name.clone(), problem: error.to_string() })?;
    let table: Table = text.parse().map_err(|error: toml::de::Error| FileError::NoToml {
        path: name.clone(),
        line: 1 + error
            .span()
            .map_or(0, |span| text.bytes().take(span.start).filter(|b| *b == b'\n').count()),
        problem: error.message().lines().collect::<Vec<_>>().join(", "),
    })?;
    let mut options = Vec::new();
    for (key, value) in &table {
        let key = key.as_str();
        let known = command.get_arguments().find(|known| {
            known.get_long() == Some(key) || known.get_all_aliases().is_some_and(|all| all.contains(&key))
        });
        let Some(known) = known.filter(|_| !NOT_IN_FILES.contains(&key)) else {
            return Err(FileError::UnknownKey { path: name, key: key.to_owned() });
        };
        let is_flag = matches!(known.get_action(), ArgAction::SetTrue);
        let given = if is_flag { flag(key, value) } else { values(key, value) };
        let wanted = if is_flag { "true or false" } else { "a text, a number, or a list of these" };
        options.extend(given.ok_or_else(|| FileError::BadValue {
            path: name.clone(),
            key: key.to_owned(),
            wanted,
        })?);
    }
    Ok(options)
}

/// An option without a value.
fn flag(key: &str, value: &Value) -> Option<Vec<OsString>> {
    value.as_bool().map(|given| given.then(|| OsString::from(format!("--{key}"))).into_iter().collect())
}

/// An option with a value, once for each value of a list.
fn values(key: &str, value: &Value) -> Option<Vec<OsString>> {
    let all = value.as_array().map_or(std::slice::from_ref(value), Vec::as_slice);
    let text = |value: &Value| match value {
        Value::String(text) => Some(text.clone()),
        Value::Integer(number) => Some(number.to_string()),
        _ => None,
    };
    all.iter().map(|value| Some(format!("--{key}={}", text(value)?).into())).collect()
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use clap::CommandFactory as _;

    use super::*;
    use crate::cli::Options;

    fn file(text: &str) -> tempfile::NamedTempFile {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(text.as_bytes()).unwrap();
        file
    }

    fn expanded(text: &str, typed: &[&str]) -> Result<Vec<String>, FileError> {
        let file = file(text);
        let path = file.path().to_str().unwrap();
        let both = [format!("--config={path}"), "--config".into()];
        let words = |given: &[&str]| {
            let words = std::iter::once("lanefsd").chain(given.iter().copied()).map(OsString::from);
            expand(words.collect(), &Options::command())
        };
        let once = words(&[&[both[0].as_str()], typed].concat());
        assert_eq!(
            once,
            words(&[typed, &[both[1].as_str(), path]].concat()),
            "the place makes no difference"
        );
        once.map(|all| all.into_iter().map(|word| word.into_string().unwrap()).collect())
    }

    #[test]
    fn keys_become_options_in_front_of_those_that_were_typed() {
        let text = "# A comment\nshared-dir = \"/srv/my data\"\nxattr = true\nflock = false\nthread-pool-size = 8\n\
                    uid-map = [\":0:1000:1:\", \":1:2000:5:\"]\n";
        let all = expanded(text, &["--cache=never", "--thread-pool-size=4"]).unwrap();
        assert_eq!(
            all,
            [
                "lanefsd",
                "--shared-dir=/srv/my data",
                "--thread-pool-size=8",
                "--uid-map=:0:1000:1:",
                "--uid-map=:1:2000:5:",
                "--xattr",
                "--cache=never",
                "--thread-pool-size=4"
            ]
            .map(String::from)
        );
    }

    #[test]
    fn limits_of_a_file_are_replaced_one_by_one() {
        let file = file("limit = [\"read-ops=5,write-ops=6\", \"burst=1s\"]\nshared-dir = \"/d\"\nfd = 3\n");
        let config = format!("--config={}", file.path().display());
        let parsed =
            crate::cli::parse(["lanefsd", &config, "--limit=read-ops=7"].map(OsString::from)).unwrap();
        let crate::cli::Command::Serve(config) = parsed else { panic!("{parsed:?}") };
        let expected = crate::limits::Rates::parse("read-ops=7,write-ops=6,burst=1s").unwrap();
        assert_eq!(config.device.rates, expected);
    }

    #[test]
    fn a_process_elsewhere_gets_absolute_paths() {
        let here = std::env::current_dir().unwrap();
        let moved =
            |given: &[&str]| with_absolute_paths(&given.iter().map(OsString::from).collect::<Vec<_>>());
        for given in [&["lanefsd", "--config=a/b", "--xattr"][..], &["lanefsd", "--config", "a/b", "--xattr"]]
        {
            let mut config = OsString::from("--config=");
            config.push(here.join("a/b"));
            assert_eq!(moved(given), ["lanefsd".into(), config, "--xattr".into()]);
        }
        assert_eq!(
            moved(&["lanefsd", "--config=/a", "--tag=--config"]),
            ["lanefsd", "--config=/a", "--tag=--config"]
        );
    }

    #[test]
    fn what_was_typed_takes_precedence() {
        let file = file("cache = \"auto\"\nshared-dir = \"/d\"\nsocket-path = \"/s\"\n");
        let config = format!("--config={}", file.path().display());
        let parsed = crate::cli::parse(["lanefsd", &config, "--cache=never"].map(OsString::from)).unwrap();
        let crate::cli::Command::Serve(config) = parsed else { panic!("{parsed:?}") };
        assert_eq!(config.fs.cache, crate::config::CachePolicy::Never);
        assert_eq!(config.shared_dir, Path::new("/d"));
    }

    #[test]
    fn what_makes_no_sense_is_refused_in_one_sentence() {
        for (text, words) in [
            ("shared-dir = /d\n", "is no valid TOML: line 1: "),
            ("xattr = true\n\ncache\n", "is no valid TOML: line 3: "),
            ("xattr = true\nxattr = true\n", "is no valid TOML: line 2: "),
            ("shared_dir = \"/d\"\n", "has the unknown key shared_dir"),
            ("[section]\nxattr = true\n", "has the unknown key section"),
            ("config = \"/other\"\n", "has the unknown key config"),
            ("print-capabilities = true\n", "has the unknown key print-capabilities"),
            ("check-state = 3\n", "has the unknown key check-state"),
            ("o = \"xattr\"\n", "has the unknown key o"),
            ("xattr = \"yes\"\n", "no valid value for xattr: give true or false"),
            ("cache = true\n", "no valid value for cache: give a text"),
            ("thread-pool-size = 1.5\n", "no valid value for thread-pool-size"),
            ("uid-map = [[1]]\n", "no valid value for uid-map"),
        ] {
            let error = expanded(text, &[]).unwrap_err().to_string();
            assert!(error.contains(words) && error.lines().count() == 1, "{text:?}: {error}");
        }
        let missing =
            expand(["lanefsd", "--config", "/no/such/file"].map(OsString::from).into(), &Options::command());
        assert!(missing.unwrap_err().to_string().contains("/no/such/file cannot be read: No such file"));
        let nothing = expand(["lanefsd", "--config"].map(OsString::from).into(), &Options::command());
        assert_eq!(nothing, Err(FileError::NoPath));
    }
}
