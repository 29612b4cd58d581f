//! Figures with their units, and text that is safe on a terminal.

/// Decimal steps of counts and rates.
const DECIMAL: [&str; 6] = ["", "k", "M", "G", "T", "P"];
/// Binary steps of sizes.
const BINARY: [&str; 6] = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];

/// The value in the first unit in which it has up to three digits before the point.
fn scale<'a>(value: f64, step: f64, units: &[&'a str]) -> (f64, &'a str) {
    let mut value = if value.is_finite() { value.max(0.0) } else { 0.0 };
    let mut found = "";
    for (index, unit) in units.iter().enumerate() {
        found = unit;
        // Rounded, it must not become the next step.
        if value < step - 0.5 || index + 1 == units.len() {
            break;
        }
        value /= step;
    }
    (value, found)
}

/// Three significant digits.
fn digits(value: f64) -> String {
    match value {
        v if v < 9.995 => format!("{v:.2}"),
        v if v < 99.95 => format!("{v:.1}"),
        v => format!("{v:.0}"),
    }
}

/// Without zeros at the end of a fraction.
fn trimmed(text: &str) -> &str {
    if text.contains('.') { text.trim_end_matches('0').trim_end_matches('.') } else { text }
}

/// A count, with commas: 12,345.
pub(crate) fn count(value: u64) -> String {
    let plain = value.to_string();
    let mut text = String::with_capacity(plain.len() * 4 / 3);
    for (index, digit) in plain.chars().enumerate() {
        if index > 0 && (plain.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// A count and its noun: 1 request, 2 requests.
pub(crate) fn noun(value: u64, noun: &str) -> String {
    format!("{} {noun}{}", count(value), if value == 1 { "" } else { "s" })
}

/// A count or a rate in few characters: 12.3k.
pub(crate) fn short(value: f64) -> String {
    let (scaled, unit) = scale(value, 1000.0, &DECIMAL);
    match unit {
        "" if scaled < 0.005 => "0".to_owned(),
        "" if scaled.fract() == 0.0 => format!("{scaled:.0}"),
        _ => format!("{}{unit}", digits(scaled)),
    }
}

/// Bytes in decimal units, as of a rate: 118 MB.
pub(crate) fn bytes(value: f64) -> String {
    let (scaled, unit) = scale(value, 1000.0, &DECIMAL);
    match unit {
        "" => format!("{scaled:.0} B"),
        _ => format!("{} {unit}B", digits(scaled)),
    }
}

/// A size in binary units: 4 KiB, 1.5 MiB.
#[expect(clippy::cast_precision_loss, reason = "three digits are shown")]
pub(crate) fn size(value: u64) -> String {
    let (scaled, unit) = scale(value as f64, 1024.0, &BINARY);
    format!("{} {unit}", trimmed(&digits(scaled)))
}

/// A duration in one unit: 12.3 µs.
pub(crate) fn seconds(value: f64) -> String {
    if !value.is_finite() || value < 0.5e-9 {
        return "0 s".to_owned();
    }
    let steps = ["ns", "µs", "ms", "s"];
    let (scaled, unit) = scale(value * 1e9, 1000.0, &steps);
    if unit == "s" && scaled >= 100.0 { duration(value) } else { format!("{} {unit}", digits(scaled)) }
}

/// A time of seconds to years in its two largest units: 3 d 4 h.
pub(crate) fn duration(value: f64) -> String {
    let value = if value.is_finite() { value.max(0.0) } else { 0.0 };
    if value < 60.0 {
        return format!("{} s", trimmed(&format!("{value:.1}")));
    }
    let units = [(86_400.0, "d", 3600.0, "h"), (3600.0, "h", 60.0, "min"), (60.0, "min", 1.0, "s")];
    let found = units.iter().find(|(large, ..)| value >= *large);
    let (large, name, small, of_small) = found.copied().unwrap_or((60.0, "min", 1.0, "s"));
    let (whole, rest) = ((value / large).floor(), ((value % large) / small).floor());
    if rest == 0.0 { format!("{whole:.0} {name}") } else { format!("{whole:.0} {name} {rest:.0} {of_small}") }
}

/// A share of a whole, as a percentage.
pub(crate) fn percent(value: f64) -> String {
    let value = if value.is_finite() { value.max(0.0) * 100.0 } else { 0.0 };
    if value >= 9.95 { format!("{value:.0} %") } else { format!("{value:.1} %") }
}

/// Text of a daemon, with control characters and those that change the direction of text replaced.
pub(crate) fn printable(text: &str) -> String {
    let is_safe = |char: char| {
        !char.is_control()
            && !matches!(char, '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
    };
    text.chars().map(|char| if is_safe(char) { char } else { char::REPLACEMENT_CHARACTER }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_have_three_digits_and_a_unit() {
        let cases =
            [(0.0, "0"), (3.0, "3"), (3.456, "3.46"), (999.4, "999"), (999.6, "1.00k"), (12_345.0, "12.3k")];
        for (value, text) in cases {
            assert_eq!(short(value), text);
        }
        assert_eq!(short(f64::NAN), "0");
        assert_eq!(short(2.5e15), "2.50P");
        for (value, text) in [(0.0, "0 B"), (512.0, "512 B"), (118_000_000.0, "118 MB"), (1.5e9, "1.50 GB")] {
            assert_eq!(bytes(value), text);
        }
        for (value, text) in
            [(0, "0 B"), (4096, "4 KiB"), (1536, "1.5 KiB"), (1 << 20, "1 MiB"), (1000, "1000 B")]
        {
            assert_eq!(size(value), text);
        }
        assert_eq!(count(0), "0");
        assert_eq!(count(999), "999");
        assert_eq!(count(1_234_567), "1,234,567");
        assert_eq!(noun(1, "request") + ", " + &noun(2000, "request"), "1 request, 2,000 requests");
    }

    #[test]
    fn times_are_in_the_unit_that_fits() {
        let cases = [
            (0.0, "0 s"),
            (850e-9, "850 ns"),
            (12.34e-6, "12.3 µs"),
            (0.001, "1.00 ms"),
            (0.9999, "1.00 s"),
            (150.0, "2 min 30 s"),
        ];
        for (value, text) in cases {
            assert_eq!(seconds(value), text);
        }
        for (value, text) in
            [(1.5, "1.5 s"), (3.0, "3 s"), (60.0, "1 min"), (3725.0, "1 h 2 min"), (273_600.0, "3 d 4 h")]
        {
            assert_eq!(duration(value), text);
        }
        assert_eq!(percent(0.1234), "12 %");
        assert_eq!(percent(0.0123), "1.2 %");
    }

    #[test]
    fn text_of_a_daemon_cannot_steer_the_terminal() {
        assert_eq!(printable("a\u{1b}[31mb\u{202e}c\u{9b}d\n"), "a\u{fffd}[31mb\u{fffd}c\u{fffd}d\u{fffd}");
        assert_eq!(printable("µ – web"), "µ – web");
    }
}
