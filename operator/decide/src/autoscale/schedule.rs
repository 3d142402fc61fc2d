//! Minimums by the clock: from one crontab expression's times to another's, in a time zone.

use cronexpr::{Crontab, MakeTimestamp};
use jiff::{SignedDuration, Timestamp};
use serde::{Deserialize, Serialize};

/// At least so many workers from each start to the next end.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(try_from = "Written", into = "Written")]
pub struct Schedule {
    time_zone: String,
    start: String,
    end: String,
    pub min_workers: u32,
    crontabs: Box<(Crontab, Crontab)>,
}

/// A schedule's fields as a user writes them.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct Written {
    time_zone: String,
    start: String,
    end: String,
    min_workers: u32,
}

impl TryFrom<Written> for Schedule {
    type Error = String;

    fn try_from(Written { time_zone, start, end, min_workers }: Written) -> Result<Self, String> {
        Self::new(&time_zone, &start, &end, min_workers)
    }
}

impl From<Schedule> for Written {
    fn from(Schedule { time_zone, start, end, min_workers, .. }: Schedule) -> Self {
        Self { time_zone, start, end, min_workers }
    }
}

impl Schedule {
    /// `start` and `end` have five fields. The error says what is wrong with which.
    pub fn new(time_zone: &str, start: &str, end: &str, min_workers: u32) -> Result<Self, String> {
        let read = |field: &str, expression: &str| {
            if expression.split_whitespace().count() != 5 {
                return Err(format!("{field} ({expression}) must have five fields, such as 0 8 * * 1-5"));
            }
            let parsed = cronexpr::parse_crontab(&format!("{expression} {time_zone}"));
            let parsed = parsed.map_err(|error| {
                format!("{field} ({expression}) in timeZone {time_zone}: {}", one_line(&error))
            })?;
            // Any time will do to ask what never comes.
            let first = parsed.find_next(MakeTimestamp(Timestamp::UNIX_EPOCH));
            first.map_err(|_| format!("{field} ({expression}) never comes"))?;
            Ok(parsed)
        };
        let crontabs = Box::new((read("start", start)?, read("end", end)?));
        let (time_zone, start, end) = (time_zone.into(), start.into(), end.into());
        Ok(Self { time_zone, start, end, min_workers, crontabs })
    }

    /// Whether it is on: its last start was after its last end.
    pub fn is_on(&self, now: Timestamp) -> bool {
        let (start, end) = (last(&self.crontabs.0, now), last(&self.crontabs.1, now));
        start.is_some_and(|start| end.is_none_or(|end| start > end))
    }

    pub fn text(&self) -> String {
        format!("from {} to {} ({})", self.start, self.end, self.time_zone)
    }

    fn written(&self) -> (&str, &str, &str, u32) {
        (&self.time_zone, &self.start, &self.end, self.min_workers)
    }
}

impl PartialEq for Schedule {
    fn eq(&self, other: &Self) -> bool {
        self.written() == other.written()
    }
}

/// The last of a crontab's times that is not after `now`, within a leap year.
fn last(crontab: &Crontab, now: Timestamp) -> Option<Timestamp> {
    // Ever further back: what comes every minute is found within the first hour, not counted from last year on.
    [1, 24, 8 * 24, 32 * 24, 367 * 24].into_iter().find_map(|hours| {
        let mut found = None;
        let mut from = now - SignedDuration::from_hours(hours);
        while let Ok(next) = crontab.find_next(MakeTimestamp(from)) {
            from = next.timestamp();
            if from > now {
                break;
            }
            found = Some(from);
        }
        found
    })
}

fn one_line(error: &cronexpr::Error) -> String {
    error.to_string().lines().map(str::trim).filter(|line| !line.is_empty()).collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn is_on(schedule: &Schedule, time: &str) -> bool {
        schedule.is_on(time.parse().unwrap())
    }

    #[test]
    fn office_hours_are_those_of_their_time_zone_summer_and_winter() {
        let office = Schedule::new("Europe/Berlin", "0 8 * * 1-5", "0 18 * * 1-5", 4).unwrap();
        // 2026-07-20 and 2026-11-23 are Mondays.
        for (time, on) in [
            ("2026-07-20T05:59:59Z", false),
            ("2026-07-20T06:00:00Z", true),
            ("2026-07-20T15:59:59Z", true),
            ("2026-07-20T16:00:00Z", false),
            ("2026-11-23T06:30:00Z", false),
            ("2026-11-23T07:00:00Z", true),
            ("2026-11-22T12:00:00Z", false),
        ] {
            assert_eq!(is_on(&office, time), on, "{time}");
        }
    }

    #[test]
    fn a_night_goes_over_midnight() {
        let night = Schedule::new("UTC", "0 22 * * *", "0 4 * * *", 2).unwrap();
        assert!(is_on(&night, "2026-11-24T23:30:00Z") && is_on(&night, "2026-11-25T03:59:00Z"));
        assert!(!is_on(&night, "2026-11-25T04:30:00Z"));
    }

    #[test]
    fn a_start_and_an_end_may_come_at_different_paces() {
        // 2026-11-27 is a Friday.
        let office = Schedule::new("UTC", "0 8 * * 1-5", "0 18 * * *", 4).unwrap();
        assert!(is_on(&office, "2026-11-27T12:00:00Z"));
        assert!(!is_on(&office, "2026-11-28T12:00:00Z"), "Friday ended");
        let twice = Schedule::new("UTC", "0 8,12 * * *", "0 18 * * *", 4).unwrap();
        assert!(is_on(&twice, "2026-11-27T09:00:00Z") && is_on(&twice, "2026-11-27T13:00:00Z"));
        assert!(!is_on(&twice, "2026-11-27T19:00:00Z"));
        let error = Schedule::new("UTC", "0 8 * * *", "0 0 31 2 *", 4).unwrap_err();
        assert_eq!(error, "end (0 0 31 2 *) never comes");
    }

    #[test]
    fn what_is_wrong_is_named() {
        let error = Schedule::new("UTC", "0 25 * * *", "0 4 * * *", 2).unwrap_err();
        assert!(error.starts_with("start (0 25 * * *) in timeZone UTC: "), "{error}");
        let error = Schedule::new("Europe/Berlinn", "0 5 * * *", "0 4 * * *", 2).unwrap_err();
        assert!(error.contains("in timeZone Europe/Berlinn: "), "{error}");
        let error = Schedule::new("UTC", "0 5 * * *", "0 4 * *", 2).unwrap_err();
        assert_eq!(error, "end (0 4 * *) must have five fields, such as 0 8 * * 1-5");
    }

    #[test]
    fn a_schedule_is_written_as_its_fields_and_read_with_its_rules() {
        let office = Schedule::new("Europe/Berlin", "0 8 * * 1-5", "0 18 * * 1-5", 4).unwrap();
        let written = serde_json::to_string(&office).unwrap();
        assert_eq!(serde_json::from_str::<Schedule>(&written).unwrap(), office);
        let wrong = serde_json::from_str::<Schedule>(&written.replace("0 18", "0 25")).unwrap_err();
        assert!(wrong.to_string().starts_with("end (0 25 * * 1-5) in timeZone Europe/Berlin"), "{wrong}");
    }
}
