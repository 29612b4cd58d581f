//! Rate limits as an option or a command gives them: `read-bytes=100M,write-ops=500,burst=1s`.

use std::time::Duration;

use thiserror::Error;

use super::pace::{Limit, Pace};

/// Longest burst.
const MAX_BURST: Duration = Duration::from_secs(3600);

/// What is given of the rate limits; the rest stays as it is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rates {
    read_bytes: Option<u64>,
    write_bytes: Option<u64>,
    read_ops: Option<u64>,
    write_ops: Option<u64>,
    meta_ops: Option<u64>,
    burst: Option<Duration>,
}

/// Why a list of limits is none. Each message is a part of a sentence.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[allow(missing_docs, reason = "the messages say it")]
pub enum RateError {
    #[error("{0:?} is not a limit: give read-bytes, write-bytes, read-ops, write-ops, meta-ops or burst")]
    Unknown(String),
    #[error("{name} has no value: give a number per second, like {name}=100M, or none")]
    NoValue { name: String },
    #[error("{name}={value} is not a rate: give a number per second, like 100 or 100M, or none")]
    BadRate { name: &'static str, value: String },
    #[error("{name}={value} would stop the guest: give at least 1, or none for no limit")]
    Zero { name: &'static str, value: String },
    #[error("{name}={value} is too much: the largest rate is {}", u64::MAX)]
    TooLarge { name: &'static str, value: String },
    #[error("burst={0} is not a time: give one like 100ms or 2s, an hour at most")]
    BadBurst(String),
    #[error("{0} is given twice")]
    Twice(&'static str),
}

impl Rates {
    /// The limits of a list with commas.
    pub fn parse(text: &str) -> Result<Rates, RateError> {
        let mut rates = Rates::default();
        for part in text.split(',') {
            let (name, value) = match part.split_once('=') {
                Some((name, value)) => (name, Some(value)),
                None => (part, None),
            };
            let limit = Limit::ALL.into_iter().find(|limit| limit.name() == name);
            if limit.is_none() && name != "burst" {
                return Err(RateError::Unknown(name.to_owned()));
            }
            let value = value.filter(|value| !value.is_empty());
            let Some(value) = value else { return Err(RateError::NoValue { name: name.to_owned() }) };
            let before = match limit {
                Some(limit) => rates.rate_mut(limit).replace(parse_rate(limit, value)?).is_some(),
                None => rates.burst.replace(parse_burst(value)?).is_some(),
            };
            if before {
                return Err(RateError::Twice(limit.map_or("burst", Limit::name)));
            }
        }
        Ok(rates)
    }

    /// The same, and what is given `later`, which takes precedence.
    #[must_use]
    pub fn and(mut self, later: &Rates) -> Rates {
        for limit in Limit::ALL {
            let rate = self.rate_mut(limit);
            *rate = later.rate(limit).or(*rate);
        }
        self.burst = later.burst.or(self.burst);
        self
    }

    /// What is given of a limit: so much per second, or 0 for none.
    pub fn rate(&self, limit: Limit) -> Option<u64> {
        match limit {
            Limit::ReadBytes => self.read_bytes,
            Limit::WriteBytes => self.write_bytes,
            Limit::ReadOps => self.read_ops,
            Limit::WriteOps => self.write_ops,
            Limit::MetaOps => self.meta_ops,
        }
    }

    fn rate_mut(&mut self, limit: Limit) -> &mut Option<u64> {
        match limit {
            Limit::ReadBytes => &mut self.read_bytes,
            Limit::WriteBytes => &mut self.write_bytes,
            Limit::ReadOps => &mut self.read_ops,
            Limit::WriteOps => &mut self.write_ops,
            Limit::MetaOps => &mut self.meta_ops,
        }
    }
}

impl Pace {
    /// Changes what is given.
    pub fn apply(&self, rates: &Rates) {
        if let Some(burst) = rates.burst {
            self.set_burst(burst);
        }
        for limit in Limit::ALL {
            if let Some(rate) = rates.rate(limit) {
                self.set_rate(limit, rate);
            }
        }
    }
}

/// A number with a unit: K, M, G and T are powers of 1024 for bytes, as for sizes, and powers of 1000 for operations.
fn parse_rate(limit: Limit, text: &str) -> Result<u64, RateError> {
    let name = limit.name();
    if text == "none" {
        return Ok(0);
    }
    let bad = || RateError::BadRate { name, value: text.to_owned() };
    let too_large = || RateError::TooLarge { name, value: text.to_owned() };
    let digits = text.find(|other: char| !other.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at_checked(digits).ok_or_else(bad)?;
    let power = match unit {
        "" => 0,
        "k" | "K" => 1,
        "m" | "M" => 2,
        "g" | "G" => 3,
        "t" | "T" => 4,
        _ => return Err(bad()),
    };
    if number.is_empty() {
        return Err(bad());
    }
    // All digits: it is too large if it is no number.
    let number: u64 = number.parse().map_err(|_| too_large())?;
    let base: u64 = if matches!(limit, Limit::ReadBytes | Limit::WriteBytes) { 1024 } else { 1000 };
    match number.checked_mul(base.pow(power)) {
        None => Err(too_large()),
        Some(0) => Err(RateError::Zero { name, value: text.to_owned() }),
        Some(rate) => Ok(rate),
    }
}

/// A number with a unit: `us`, `ms` or `s`. 0 is no burst at all.
fn parse_burst(text: &str) -> Result<Duration, RateError> {
    let parse = || {
        let (number, unit) = text.split_at_checked(text.find(|other: char| !other.is_ascii_digit())?)?;
        let number: u64 = number.parse().ok()?;
        let time = match unit {
            "us" => Duration::from_micros(number),
            "ms" => Duration::from_millis(number),
            "s" => Duration::from_secs(number),
            _ => return None,
        };
        Some(time).filter(|time| *time <= MAX_BURST)
    };
    parse().ok_or_else(|| RateError::BadBurst(text.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rates(text: &str) -> Rates {
        Rates::parse(text).unwrap()
    }

    #[test]
    fn limits_are_understood() {
        let all = rates("read-bytes=100M,write-bytes=1k,read-ops=2K,write-ops=7,meta-ops=1G,burst=2s");
        let expected = [100 << 20, 1024, 2000, 7, 1_000_000_000];
        assert_eq!(Limit::ALL.map(|limit| all.rate(limit)), expected.map(Some));
        assert_eq!(all.burst, Some(Duration::from_secs(2)));
        assert_eq!(rates("burst=0s").burst, Some(Duration::ZERO));
        assert_eq!(rates("burst=500us").burst, Some(Duration::from_micros(500)));
        assert_eq!(rates("read-bytes=18446744073709551615").rate(Limit::ReadBytes), Some(u64::MAX));
        assert_eq!(rates("read-bytes=none").rate(Limit::ReadBytes), Some(0));
    }

    #[test]
    fn what_is_given_later_takes_precedence() {
        let both = rates("read-ops=1,write-ops=2,burst=1s").and(&rates("write-ops=3,meta-ops=4"));
        assert_eq!(both, rates("read-ops=1,write-ops=3,meta-ops=4,burst=1s"));
    }

    #[test]
    fn a_pace_changes_as_far_as_something_is_given() {
        let pace = Pace::default();
        pace.apply(&rates("read-ops=10,meta-ops=20"));
        pace.apply(&rates("meta-ops=none,burst=1s"));
        assert_eq!(Limit::ALL.map(|limit| pace.rate(limit)), [0, 0, 10, 0, 0]);
        assert_eq!(pace.burst(), Duration::from_secs(1));
        pace.apply(&rates("read-ops=none"));
        assert!(!pace.is_active());
    }

    #[test]
    fn invalid_limits_are_refused_in_one_sentence() {
        for (text, words) in [
            ("", "\"\" is not a limit"),
            ("bytes=1", "\"bytes\" is not a limit: give read-bytes"),
            ("read-ops=1,", "\"\" is not a limit"),
            ("read-ops", "read-ops has no value"),
            ("burst=", "burst has no value"),
            ("read-ops=M", "read-ops=M is not a rate"),
            ("read-ops=-1", "read-ops=-1 is not a rate"),
            ("read-ops=1.5", "read-ops=1.5 is not a rate"),
            ("read-bytes=1MB", "read-bytes=1MB is not a rate"),
            ("read-bytes=1é", "read-bytes=1é is not a rate"),
            ("read-bytes=0", "read-bytes=0 would stop the guest"),
            ("meta-ops=0K", "meta-ops=0K would stop the guest"),
            ("read-bytes=18446744073709551616", "too much"),
            ("read-bytes=18446744073709551615K", "too much"),
            ("read-ops=1,read-ops=2", "read-ops is given twice"),
            ("burst=1s,read-ops=1,burst=1s", "burst is given twice"),
            ("burst=1", "burst=1 is not a time"),
            ("burst=1h", "burst=1h is not a time"),
            ("burst=3601s", "burst=3601s is not a time"),
            ("burst=18446744073709551616us", "is not a time"),
        ] {
            let error = Rates::parse(text).unwrap_err().to_string();
            assert!(error.contains(words) && error.lines().count() == 1, "{text:?}: {error}");
        }
    }
}
