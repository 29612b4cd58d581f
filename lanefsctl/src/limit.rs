//! Limits: reading `write-bytes=100M`, and showing those in force.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use crate::protocol::Limits;
use crate::table::{Align, Table};
use crate::units::{bytes, count, parse_amount, printable, short};

/// Names of limits, with their meaning.
pub(crate) const NAMES: [(&str, &str); 6] = [
    ("read-bytes", "bytes a second that the guest reads"),
    ("write-bytes", "bytes a second that the guest writes"),
    ("read-ops", "READ requests a second"),
    ("write-ops", "WRITE requests a second"),
    ("meta-ops", "other requests a second"),
    ("burst", "allowance above the limits after a pause"),
];

/// A limit to set; 0 removes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Setting {
    name: &'static str,
    value: u64,
}

/// Reads `NAME=VALUE`.
pub(crate) fn parse(text: &str) -> Result<Setting, String> {
    let names = || NAMES.map(|(name, _)| name).join(", ");
    let (name, value) =
        text.split_once('=').ok_or_else(|| format!("write NAME=VALUE, where NAME is one of {}", names()))?;
    let known = NAMES.iter().find(|(known, _)| *known == name);
    let (name, _) = known.ok_or_else(|| format!("there is no limit '{name}'; limits are {}", names()))?;
    if value == "off" {
        return Ok(Setting { name, value: 0 });
    }
    match parse_amount(value)? {
        0 => Err(format!("a limit of 0 would stop the share; {name}=off removes the limit")),
        value => Ok(Setting { name, value }),
    }
}

/// The settings of a request; the last one counts where a limit is named twice.
pub(crate) fn request(settings: &[Setting]) -> BTreeMap<String, u64> {
    settings.iter().map(|setting| (setting.name.to_owned(), setting.value)).collect()
}

/// A limit's value for people.
#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "`as` ends at the limits of u64")]
fn value(name: &str, value: f64) -> String {
    match name {
        _ if value <= 0.0 => "off".to_owned(),
        _ if name.ends_with("-bytes") => format!("{}/s", bytes(value)),
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
    for (name, limit) in ordered(limits).into_iter().filter(|(_, value)| *value > 0.0) {
        let comma = if text.is_empty() { "" } else { ", " };
        // Writing to a string does not fail.
        let _ = write!(text, "{comma}{} {}", printable(name), value(name, limit));
    }
    if text.is_empty() { "none".to_owned() } else { text }
}

/// All limits as a table.
pub(crate) fn table(limits: &Limits) -> Table {
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
    fn settings_are_read() {
        let words = ["write-bytes=100M", "read-ops=5000", "burst=off", "read-ops=off"];
        let settings: Vec<_> = words.iter().map(|word| parse(word).unwrap()).collect();
        let expected = [("write-bytes", 100_000_000), ("read-ops", 0), ("burst", 0)];
        let expected: BTreeMap<_, _> = expected.map(|(name, value)| (name.to_owned(), value)).into();
        assert_eq!(request(&settings), expected);
        for (wrong, part) in [
            ("write-bytes", "write NAME=VALUE"),
            ("writes=3", "there is no limit 'writes'; limits are read-bytes, "),
            ("read-ops=0", "read-ops=off removes the limit"),
            ("read-ops=", "is not an amount"),
            ("read-ops=99999999999T", "is too large"),
        ] {
            let error = parse(wrong).unwrap_err();
            assert!(error.contains(part), "{wrong}: {error}");
        }
    }

    #[test]
    fn limits_are_shown_in_order_with_units() {
        let limits = [("meta-ops", 12_000.0), ("write-bytes", 1e8), ("read-bytes", 0.0), ("new\u{7}", 7.0)];
        let limits: Limits = limits.map(|(name, value)| (name.to_owned(), value)).into();
        assert_eq!(summary(&limits), "write-bytes 100 MB/s, meta-ops 12,000/s, new\u{fffd} 7");
        assert_eq!(summary(&Limits::new()), "none");
        let text = table(&limits).to_string();
        assert!(text.contains("\n  read-bytes        off  bytes a second that the guest reads\n"), "{text}");
    }
}
