//! Durations as people write and read them: "1m30s", "200ms".

use std::time::Duration;

/// Why a text is no duration.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DurationError {
    #[error("{0:?} is not a unit; expected: ms, s, m or h")]
    Unit(String),
    #[error("{0:?} is not a number")]
    Number(String),
    #[error("longer than can be counted")]
    TooLong,
}

/// A sum of numbers, each with its unit (ms, s, m or h), such as "1h30m" or "0.5s"; a number alone is in seconds.
pub fn parse(text: &str) -> Result<Duration, DurationError> {
    if text.bytes().all(|byte| byte.is_ascii_digit() || byte == b'.') {
        return part(text, "s");
    }
    let (mut sum, mut rest) = (Duration::ZERO, text);
    while !rest.is_empty() {
        let number = rest.find(char::is_alphabetic).unwrap_or(rest.len());
        let (number, units) = rest.split_at(number);
        let unit = units.find(|c: char| !c.is_alphabetic()).unwrap_or(units.len());
        let (unit, after) = units.split_at(unit);
        sum = sum.checked_add(part(number, unit)?).ok_or(DurationError::TooLong)?;
        rest = after;
    }
    Ok(sum)
}

fn part(number: &str, unit: &str) -> Result<Duration, DurationError> {
    let count: f64 = number.parse().map_err(|_| DurationError::Number(number.into()))?;
    let seconds = match unit {
        "ms" => count / 1e3,
        "s" => count,
        "m" => count * 60.0,
        "h" => count * 3600.0,
        other => return Err(DurationError::Unit(other.into())),
    };
    if seconds < 0.0 {
        return Err(DurationError::Number(number.into()));
    }
    Duration::try_from_secs_f64(seconds).map_err(|_| DurationError::TooLong)
}

/// A duration in a few characters, to two digits or to the second: "420ms", "1.2s", "90s".
pub fn short(time: Duration) -> String {
    match time.as_secs_f64() {
        time if time < 0.9995 => format!("{:.0}ms", time * 1e3),
        time if time < 9.95 => format!("{}s", (time * 10.0).round() / 10.0),
        time => format!("{time:.0}s"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<u128, String> {
        parse(text).map(|time| time.as_millis()).map_err(|error| error.to_string())
    }

    #[test]
    fn durations_are_read_with_and_without_units_and_as_sums() {
        assert_eq!(["30", "30s", "1.5m", "200ms"].map(read), [Ok(30_000), Ok(30_000), Ok(90_000), Ok(200)]);
        assert_eq!(
            ["1h30m", "1m0s500ms", "0", "168h"].map(read),
            [Ok(5_400_000), Ok(60_500), Ok(0), Ok(604_800_000)]
        );
    }

    #[test]
    fn what_is_no_duration_is_told_by_the_part_that_is_wrong() {
        assert_eq!(read("3d"), Err("\"d\" is not a unit; expected: ms, s, m or h".into()));
        assert_eq!(read("1m30"), Err("\"\" is not a unit; expected: ms, s, m or h".into()));
        assert_eq!(read("soon"), Err("\"\" is not a number".into()));
        assert_eq!(read("-1s"), Err("\"-1\" is not a number".into()));
        assert_eq!(read(""), Err("\"\" is not a number".into()));
        assert_eq!(read("1e30h"), Err("\"e\" is not a unit; expected: ms, s, m or h".into()));
        assert_eq!(read("99999999999999999999s"), Err("longer than can be counted".into()));
    }

    #[test]
    fn a_short_text_has_as_many_digits_as_matter() {
        let short = |milliseconds| short(Duration::from_millis(milliseconds));
        assert_eq!([420, 1234, 9960, 90_400].map(short), ["420ms", "1.2s", "10s", "90s"]);
    }
}
