//! Limits: reading `write-bytes=100M`, and showing those in force.

use std::fmt::Write as _;

use crate::protocol::{Limited, Limits};
use crate::table::{Align, Table};
use crate::units::{count, printable, seconds, short, size};

/// Names of limits, with their meaning.
pub(crate) const NAMES: [(&str, &str); 6] = [
    ("read-bytes", "bytes a second that the guest reads"),
    ("write-bytes", "bytes a second that the guest writes"),
    ("read-ops", "READ requests a second"),
    ("write-ops", "WRITE requests a second"),
    ("meta-ops", "other requests a second"),
    ("burst", "time whose share of the limits may pass at once after a pause"),
];

/// Checks the name of `NAME=VALUE`. The daemon reads the value, as for `--limit`.
pub(crate) fn parse(text: &str) -> Result<String, String> {
    let names = || NAMES.map(|(name, _)| name).join(", ");
    let (name, value) =
        text.split_once('=').ok_or_else(|| format!("write NAME=VALUE, where NAME is one of {}", names()))?;
    if !NAMES.iter().any(|(known, _)| *known == name) {
        return Err(format!("there is no limit '{name}'; limits are {}", names()));
    }
    Ok(if value == "off" { format!("{name}=none") } else { text.to_owned() })
}

/// A limit's value for people.
#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "`as` ends at the limits of u64")]
fn value(name: &str, value: f64) -> String {
    match name {
        "burst" => seconds(value),
        _ if value <= 0.0 => "off".to_owned(),
        _ if name.ends_with("-bytes") => format!("{}/s", size(value as u64)),
        _ if name.ends_with("-ops") => format!("{}/s", count(value as u64)),
        _ => short(value),
    }
}

/// All limits, in their usual order, and then those that this version does not know.
fn ordered(limits: &Limits) -> Vec<(&str, f64)> {
    let known = NAMES.iter().map(|(name, _)| *name);
    let known = known.filter_map(|name| limits.get(name).map(|value| (name, *value)));
    let is_unknown = |name: &str| NAMES.iter().all(|(known, _)| *known != name);
    let unknown = limits.iter().map(|(name, value)| (name.as_str(), *value));
    known.chain(unknown.filter(|(name, _)| is_unknown(name))).collect()
}

/// The limits in force in one line.
pub(crate) fn summary(limits: &Limits) -> String {
    let mut text = String::new();
    for (name, limit) in ordered(limits).into_iter().filter(|(name, value)| *value > 0.0 && *name != "burst")
    {
        let comma = if text.is_empty() { "" } else { ", " };
        // Writing to a string does not fail.
        let _ = write!(text, "{comma}{} {}", printable(name), value(name, limit));
    }
    if text.is_empty() { "none".to_owned() } else { text }
}

/// The limits of a share, and those of its group.
pub(crate) fn text(limited: &Limited) -> String {
    let own = table(&limited.limits).to_string();
    match &limited.group_limits {
        None => own,
        Some(group) => format!("{own}\n  limits of the group, in addition\n{}", table(group)),
    }
}

/// All limits as a table.
fn table(limits: &Limits) -> Table {
    let mut table =
        Table::new(&[("LIMIT", Align::Left), ("VALUE", Align::Right), ("MEANING", Align::Left)]).indented(2);
    for (name, limit) in ordered(limits) {
        let meaning = NAMES.iter().find(|(known, _)| *known == name).map_or("", |(_, meaning)| meaning);
        table.row([printable(name), value(name, limit), meaning.to_owned()]);
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_checked_and_values_are_the_daemons() {
        assert_eq!(parse("write-bytes=100M").unwrap(), "write-bytes=100M");
        assert_eq!(parse("read-ops=off").unwrap(), "read-ops=none");
        for (wrong, part) in [
            ("write-bytes", "write NAME=VALUE"),
            ("writes=3", "there is no limit 'writes'; limits are read-bytes, "),
        ] {
            let error = parse(wrong).unwrap_err();
            assert!(error.contains(part), "{wrong}: {error}");
        }
    }

    #[test]
    fn limits_are_shown_in_order_with_units() {
        let limits = [
            ("meta-ops", 12_000.0),
            ("write-bytes", 104_857_600.0),
            ("burst", 0.1),
            ("read-bytes", 0.0),
            ("new\u{7}", 7.0),
        ];
        let limits: Limits = limits.map(|(name, value)| (name.to_owned(), value)).into();
        assert_eq!(summary(&limits), "write-bytes 100 MiB/s, meta-ops 12,000/s, new\u{fffd} 7");
        assert_eq!(summary(&Limits::new()), "none");
        let text = table(&limits).to_string();
        assert!(text.contains("\n  read-bytes         off  bytes a second that the guest reads\n"), "{text}");
        let own = Limited { limits: limits.clone(), group_limits: None };
        assert_eq!(super::text(&own), text);
        let both = Limited { group_limits: Some(limits), ..own };
        assert_eq!(super::text(&both), format!("{text}\n  limits of the group, in addition\n{text}"));
    }
}
