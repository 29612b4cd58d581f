//! Options whose values have a syntax of their own.

use std::time::Duration;

use rustix::thread::CapabilitySet;

use super::OptionError;
use crate::config::{CapabilityChanges, IdRange, Store};
use crate::limits::{RateError, Rates};

/// `host`, `null` or `null:LATENCY`.
pub(super) fn parse_store(text: &str) -> Result<Store, OptionError> {
    let bad = || OptionError::BadStore(text.to_owned());
    match text.split_once(':') {
        None if text == "host" => Ok(Store::Host),
        None if text == "null" => Ok(Store::Null { latency: Duration::ZERO }),
        Some(("null", latency)) => {
            parse_latency(latency).map(|latency| Store::Null { latency }).ok_or_else(bad)
        }
        _ => Err(bad()),
    }
}

/// A number with a unit: `us`, `ms` or `s`.
fn parse_latency(text: &str) -> Option<Duration> {
    let unit_at = text.find(|c: char| !c.is_ascii_digit())?;
    let (number, unit) = text.split_at_checked(unit_at)?;
    let number: u32 = number.parse().ok()?;
    match unit {
        "us" => Some(Duration::from_micros(number.into())),
        "ms" => Some(Duration::from_millis(number.into())),
        "s" => Some(Duration::from_secs(number.into())),
        _ => None,
    }
}

/// Lists of rate limits, of which a later one takes precedence.
pub(super) fn parse_rates(lists: &[String]) -> Result<Rates, RateError> {
    lists.iter().try_fold(Rates::default(), |rates, list| Ok(rates.and(&Rates::parse(list)?)))
}

/// Numbers and ranges, as taskset(1) takes them.
pub(super) fn parse_cpus(text: &str) -> Result<Vec<usize>, OptionError> {
    let bad = || OptionError::BadCpus(text.to_owned());
    let mut cpus = Vec::new();
    for part in text.split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let first: usize = first.parse().map_err(|_| bad())?;
        let last: usize = last.parse().map_err(|_| bad())?;
        if first > last || last >= 1024 {
            return Err(bad());
        }
        cpus.extend(first..=last);
    }
    Ok(cpus)
}

/// Names with a `+` or `-` each, and colons or commas between them. A later one counts.
pub(super) fn parse_modcaps(text: &str) -> Result<CapabilityChanges, OptionError> {
    let mut changes = CapabilityChanges::NONE;
    for part in text.split([':', ',']) {
        let named = |name: &str| {
            let name = name.to_ascii_uppercase();
            CapabilitySet::from_name(name.strip_prefix("CAP_").unwrap_or(&name))
        };
        let (to, from, name) = match part.split_at_checked(1) {
            Some(("+", name)) => (&mut changes.add, &mut changes.drop, name),
            Some(("-", name)) => (&mut changes.drop, &mut changes.add, name),
            _ => return Err(OptionError::BadCapabilities(text.to_owned())),
        };
        let capability = named(name).ok_or_else(|| OptionError::BadCapabilities(text.to_owned()))?;
        to.insert(capability);
        from.remove(capability);
    }
    Ok(changes)
}

/// A range of ids as `:inside:outside:count:`, with any character in place of the colons.
pub(super) fn parse_id_range(option: &'static str, text: &str) -> Result<IdRange, OptionError> {
    let bad = || OptionError::BadIdRange { option, text: text.to_owned() };
    let separator = text.chars().next().filter(|first| !first.is_ascii_digit()).ok_or_else(bad)?;
    let fields: Vec<&str> = text.split(separator).collect();
    let &["", inside, outside, count, ""] = fields.as_slice() else { return Err(bad()) };
    let number = |field: &str| field.parse::<u32>().map_err(|_| bad());
    let range = IdRange { inside: number(inside)?, outside: number(outside)?, count: number(count)? };
    // The last id of all means "none".
    let fits = |first: u32| first.checked_add(range.count).is_some();
    if range.count == 0 || !fits(range.inside) || !fits(range.outside) { Err(bad()) } else { Ok(range) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::tests::config;

    #[test]
    fn invalid_ranges_of_ids_are_refused() {
        for text in ["", ":", "0:1:1", ":0:1:1", ":0:1:1:1:", ":0:1:0:", ":0:x:1:", ":0:-1:1:", "00100010"]
            .into_iter()
            .chain([":1:4294967295:1:", ":2:1:4294967294:", ":0:4294967296:1:"])
        {
            let error = OptionError::BadIdRange { option: "--gid-map", text: text.to_owned() };
            assert_eq!(config(&format!("--shared-dir /d --fd 3 --gid-map={text}")).unwrap_err(), error);
        }
    }

    #[test]
    fn ids_and_capabilities_are_understood() {
        let config = |more: &str| config(&format!("--shared-dir /d --fd 3 {more}")).unwrap();
        let maps = config("--uid-map=:0:1000:1: --uid-map :1:100000:65535: --gid-map=/0/7/1/").id_maps;
        let range = |inside, outside, count| IdRange { inside, outside, count };
        assert_eq!(maps.users, [range(0, 1000, 1), range(1, 100_000, 65_535)]);
        assert_eq!(maps.groups, [range(0, 7, 1)]);
        assert!(config("--sandbox=none").id_maps.is_empty());
        let kept = |add, drop| CapabilityChanges { add, drop };
        let (admin, mknod) = (CapabilitySet::SYS_ADMIN, CapabilitySet::MKNOD);
        assert_eq!(config("").capabilities, CapabilityChanges::NONE);
        for text in ["+sys_admin:-mknod", "-CAP_MKNOD,+cap_sys_admin", "-sys_admin:+SYS_ADMIN:-mknod"] {
            assert_eq!(config(&format!("--modcaps={text}")).capabilities, kept(admin, mknod), "{text}");
        }
        assert_eq!(config("--modcaps -mknod").capabilities, kept(CapabilitySet::empty(), mknod));
    }
}
