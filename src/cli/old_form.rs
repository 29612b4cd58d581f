//! The old form of options, `-o source=/srv/share,cache=none,no_xattr`: that of libfuse and the C virtiofsd, which
//! libvirt before version 10 uses.

use clap::ValueEnum;
use log::LevelFilter;

use super::attributes::Mode;
use super::choices::{Cache, SandboxMode};
use super::{OptionError, Options};

impl Options {
    /// Applies `-o` to the other options. It takes precedence over them, and a later item over an earlier one.
    pub(super) fn take_old_form(&mut self) -> Result<(), OptionError> {
        for list in std::mem::take(&mut self.old_form) {
            for item in split(&list) {
                let known = match item.split_once('=') {
                    Some((name, value)) => self.assign(name, value),
                    None => self.switch(&item),
                };
                known.ok_or(OptionError::OldForm(item))?;
            }
        }
        Ok(())
    }

    /// `name=value`; `None` if there is no such option, or no such value of it.
    fn assign(&mut self, name: &str, value: &str) -> Option<()> {
        match name {
            "source" => self.shared_dir = Some(value.into()),
            "cache" => self.cache = Cache::from_str(value, true).ok()?,
            "sandbox" => self.sandbox = Some(SandboxMode::from_str(value, true).ok()?),
            "modcaps" => self.modcaps = Some(value.to_owned()),
            "xattrmap" => self.attributes.xattrmap = Some(value.to_owned()),
            // The C program called it log_level.
            "loglevel" | "log_level" if value == "err" => self.log_level = Some(LevelFilter::Error),
            "loglevel" | "log_level" => self.log_level = Some(value.parse().ok()?),
            _ => return None,
        }
        Some(())
    }

    /// `name` or `no_name`; `None` if there is no such option.
    fn switch(&mut self, item: &str) -> Option<()> {
        let (name, on) = item.strip_prefix("no_").map_or((item, true), |name| (name, false));
        match name {
            "xattr" => self.xattr = on,
            "flock" => self.flock = on,
            "posix_lock" => self.posix_lock = on,
            "writeback" => self.writeback = on,
            "allow_direct_io" => self.allow_direct_io = on,
            "readdirplus" => self.no_readdirplus = !on,
            "posix_acl" => self.attributes.posix_acl = always_or_never(on),
            "security_label" => self.attributes.security_label = always_or_never(on),
            "killpriv_v2" => self.attributes.no_killpriv_v2 = !on,
            "announce_submounts" => self.no_announce_submounts = !on,
            _ => return None,
        }
        Some(())
    }
}

fn always_or_never(on: bool) -> Mode {
    if on { Mode::Always } else { Mode::Never }
}

/// The items between commas. A comma in a value is doubled by QEMU and libvirt, and has a backslash
/// before it where libfuse is used.
fn split(list: &str) -> Vec<String> {
    let mut items = vec![];
    let mut item = String::new();
    let mut rest = list.chars().peekable();
    while let Some(letter) = rest.next() {
        let escaped = match letter {
            '\\' => rest.next_if(|next| matches!(next, ',' | '\\')),
            ',' => rest.next_if_eq(&','),
            _ => None,
        };
        match (letter, escaped) {
            (_, Some(escaped)) => item.push(escaped),
            (',', None) => items.push(std::mem::take(&mut item)),
            (letter, None) => item.push(letter),
        }
    }
    items.push(item);
    items
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;
    use rustix::thread::CapabilitySet;

    use super::*;
    use crate::cli::tests::config;

    #[test]
    fn the_old_form_is_understood() {
        let old =
            config("--fd 3 -o source=/d,cache=none,sandbox=chroot,xattr,flock,posix_lock -d -f").unwrap();
        let new =
            config("--fd 3 --shared-dir /d --cache never --sandbox chroot --xattr --flock --posix-lock")
                .unwrap();
        assert_eq!((&old.shared_dir, &old.fs, old.sandbox), (&new.shared_dir, &new.fs, new.sandbox));
        assert_eq!((old.log_level, new.log_level), (Some(LevelFilter::Debug), None));
        let base = "--fd 3 --shared-dir /d";
        let with = |more: &str| config(&format!("{base} {more}"));
        let fs = |more: &str| with(more).unwrap().fs;
        for name in ["xattr", "flock", "posix_lock", "readdirplus", "writeback", "announce_submounts"]
            .into_iter()
            .chain(["allow_direct_io", "posix_acl", "security_label", "killpriv_v2"])
        {
            let (on, off) = (fs(&format!("-o {name}")), fs(&format!("-ono_{name}")));
            assert_ne!(on, off, "{name}");
            assert_eq!(fs(&format!("-o {name},no_{name}")), off, "{name}");
            assert_eq!(fs(&format!("-o no_{name} -o {name}")), on, "{name}");
            assert!(on == fs("") || off == fs(""), "{name}");
        }
        assert!(!fs("--xattr -o no_xattr").xattr, "the old form counts");
        assert_eq!(fs("-o xattrmap=:map::user.x.:"), fs("--xattrmap=:map::user.x.:"));
        assert_eq!(with("-o modcaps=+sys_admin").unwrap().capabilities.add, CapabilitySet::SYS_ADMIN);
        assert_eq!(with("-o log_level=warn").unwrap().log_level, Some(LevelFilter::Warn));
        assert_eq!(with("-d --log-level trace").unwrap().log_level, Some(LevelFilter::Trace));
        for (text, level) in [("err", LevelFilter::Error), ("debug", LevelFilter::Debug)] {
            assert_eq!(with(&format!("-o loglevel={text}")).unwrap().log_level, Some(level));
        }
        for bad in ["nil", "cache=nil", "cache", "source", "no_source=/d", "xattr=1", ",", "timeout=3"] {
            assert!(matches!(with(&format!("-o {bad}")), Err(OptionError::OldForm(_))), "{bad}");
        }
    }

    #[test]
    fn the_help_names_all_that_can_stand_there() {
        let help = Options::command().render_long_help().to_string();
        let (_, help) = help.split_once("in the old form").unwrap();
        let (help, _) = help.split_once("  -f").unwrap();
        let help: String = help.split_whitespace().collect::<Vec<_>>().join(" ");
        for name in ["source=", "cache=", "sandbox=", "modcaps=", "xattrmap=", "loglevel="]
            .into_iter()
            .chain(["xattr,", "flock", "posix_lock", "readdirplus", "writeback", "announce_submounts"])
            .chain(["allow_direct_io", "posix_acl", "security_label", "killpriv_v2"])
        {
            assert!(help.contains(name), "{name} is not in: {help}");
        }
    }

    #[test]
    fn commas_can_be_part_of_a_value() {
        for (list, items) in [
            ("xattr", &["xattr"][..]),
            ("source=/a,no_xattr", &["source=/a", "no_xattr"]),
            ("source=/a,,b,flock", &["source=/a,b", "flock"]),
            (r"source=/a\,b\\c\d,flock", &[r"source=/a,b\c\d", "flock"]),
            ("a,,,b", &["a,", "b"]),
            ("a,", &["a", ""]),
            (r"a\", &[r"a\"]),
            ("", &[""]),
        ] {
            assert_eq!(split(list), items, "{list}");
        }
    }
}
