//! Public traces: Azure's LLM inference traces (CSV) and Mooncake's (JSONL), told apart by their first line.

use std::io::{self, BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::time::Duration;

use expertmesh_model::files::{self, FileError};
use jiff::Timestamp;
use jiff::civil::DateTime;
use jiff::tz::TimeZone;
use serde::Deserialize;

use super::lengths::MAX_TOKENS;
use super::trace::{MAX_REQUESTS, Request, Trace, milliseconds};

/// A Mooncake line of a million tokens' hashes is shorter.
const MAX_LINE: u64 = 1 << 20;
/// A century: what is later is in another unit.
const MAX_MILLISECONDS: f64 = 100.0 * 366.0 * 86_400e3;

#[derive(Debug, thiserror::Error)]
pub(crate) enum TraceError {
    #[error("{}: {error}", path.display())]
    Read { path: PathBuf, error: FileError },
    #[error("{}:{line}: {problem}", path.display())]
    Malformed { path: PathBuf, line: usize, problem: String },
    #[error("{}: no request in it", path.display())]
    Empty { path: PathBuf },
}

impl Trace {
    /// From a file of either format. Time begins at the earliest request.
    pub(crate) fn read(path: &Path) -> Result<Self, TraceError> {
        let unreadable = |error| TraceError::Read { path: path.into(), error };
        parse(BufReader::new(files::open(path).map_err(unreadable)?), path)
    }
}

fn parse(mut file: impl BufRead, path: &Path) -> Result<Trace, TraceError> {
    let (mut format, mut rows, mut number, mut line) = (None, vec![], 0, String::new());
    let unreadable = |error| TraceError::Read { path: path.into(), error: FileError::Io(error) };
    while next_line(&mut file, &mut line).map_err(unreadable)? {
        number += 1;
        let text = line.trim_start_matches('\u{feff}').trim();
        if text.is_empty() {
            continue;
        }
        let malformed = |problem| TraceError::Malformed { path: path.into(), line: number, problem };
        let (known, header) = match &format {
            Some(format) => (format, false),
            None => (&*format.insert(Format::of(text).map_err(malformed)?), true),
        };
        match known {
            Format::Mooncake => rows.push(mooncake(text).map_err(malformed)?),
            Format::Azure(_) if header => {}
            Format::Azure(columns) => rows.push(azure(text, columns).map_err(malformed)?),
        }
        if rows.len() > MAX_REQUESTS {
            return Err(malformed(format!("more than {MAX_REQUESTS} requests")));
        }
    }
    from_rows(&rows).ok_or_else(|| TraceError::Empty { path: path.into() })
}

/// Reads the next line; false at the end of the file.
fn next_line(file: &mut impl BufRead, line: &mut String) -> io::Result<bool> {
    line.clear();
    let read = file.by_ref().take(MAX_LINE).read_line(line)?;
    if read as u64 == MAX_LINE && !line.ends_with('\n') {
        return Err(io::Error::other(format!("a line of more than {MAX_LINE} bytes")));
    }
    Ok(read > 0)
}

/// Milliseconds since whenever, prompt, output.
type Row = (f64, u32, u32);

fn from_rows(rows: &[Row]) -> Option<Trace> {
    let first = rows.iter().map(|row| row.0).reduce(f64::min)?;
    let request = |&(at, prompt, output): &Row| Request { at: milliseconds(at - first), prompt, output };
    let requests: Vec<Request> = rows.iter().map(request).collect();
    let last = requests.iter().map(|request| request.at).max()?;
    Some(Trace::new(requests, last + Duration::from_millis(1)))
}

/// What a file's first line says it is.
enum Format {
    Mooncake,
    /// Which columns hold time, prompt and output.
    Azure([usize; 3]),
}

impl Format {
    fn of(first: &str) -> Result<Self, String> {
        if first.starts_with('{') {
            return Ok(Self::Mooncake);
        }
        let columns: Vec<&str> = first.split(',').map(str::trim).collect();
        let column = |name: &str| {
            columns.iter().position(|column| column.eq_ignore_ascii_case(name)).ok_or_else(|| {
                let expected = r#"{"timestamp": …, "input_length": …, "output_length": …}"#;
                format!("expected {expected} or the header TIMESTAMP,ContextTokens,GeneratedTokens")
            })
        };
        Ok(Self::Azure([column("TIMESTAMP")?, column("ContextTokens")?, column("GeneratedTokens")?]))
    }
}

#[derive(Deserialize)]
struct Mooncake {
    /// Milliseconds since the trace began.
    timestamp: f64,
    input_length: u64,
    output_length: u64,
}

fn mooncake(line: &str) -> Result<Row, String> {
    let row: Mooncake = serde_json::from_str(line).map_err(|error| error.to_string())?;
    if !(0.0..=MAX_MILLISECONDS).contains(&row.timestamp) {
        return Err(format!("timestamp: {} is not a number of milliseconds", row.timestamp));
    }
    Ok((
        row.timestamp,
        tokens("input_length", row.input_length)?,
        tokens("output_length", row.output_length)?,
    ))
}

fn azure(line: &str, columns: &[usize; 3]) -> Result<Row, String> {
    let cells: Vec<&str> = line.split(',').map(str::trim).collect();
    let cell = |at: usize, name: &str| cells.get(at).copied().ok_or_else(|| format!("{name}: missing"));
    let [time, prompt, output] = *columns;
    let number = |at: usize, name: &str| {
        let text = cell(at, name)?;
        tokens(name, text.parse().map_err(|_| format!("{name}: {text:?} is not a number of tokens"))?)
    };
    let at = timestamp(cell(time, "TIMESTAMP")?)?;
    Ok((at, number(prompt, "ContextTokens")?, number(output, "GeneratedTokens")?))
}

/// Milliseconds since 1970, of a time that is UTC where it does not say otherwise.
fn timestamp(text: &str) -> Result<f64, String> {
    let zoned = text.parse::<Timestamp>();
    let plain = || text.parse::<DateTime>()?.to_zoned(TimeZone::UTC).map(|zoned| zoned.timestamp());
    let time = zoned.or_else(|_| plain()).map_err(|error| format!("TIMESTAMP: {text:?}: {error}"))?;
    Ok(time.as_nanosecond() as f64 / 1e6)
}

/// A request that a trace has without tokens still has one.
fn tokens(field: &str, count: u64) -> Result<u32, String> {
    let fits = u32::try_from(count).ok().filter(|count| *count <= MAX_TOKENS);
    Ok(fits.ok_or_else(|| format!("{field}: {count}; at most {MAX_TOKENS}"))?.max(1))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<Vec<(u64, u32, u32)>, String> {
        let trace = parse(text.as_bytes(), Path::new("t")).map_err(|error| error.to_string())?;
        Ok(trace.requests.iter().map(|r| (r.at.as_millis() as u64, r.prompt, r.output)).collect())
    }

    const AZURE: &str = "TIMESTAMP,ContextTokens,GeneratedTokens\n";

    #[test]
    fn azures_times_count_from_the_first_request() {
        let rows = "2023-11-16 18:15:46.6805900,374,44\n2023-11-16 18:15:50.9951690,396,109\n";
        assert_eq!(read(&format!("{AZURE}{rows}")).unwrap(), [(0, 374, 44), (4315, 396, 109)]);
        let rows = "2024-05-10 00:00:00.009930+00:00,2162,5\n\n2024-05-10 02:00:00.009930+02:00,1,0\n";
        assert_eq!(read(&format!("{AZURE}{rows}")).unwrap(), [(0, 2162, 5), (0, 1, 1)]);
    }

    #[test]
    fn mooncakes_hashes_are_passed_over_and_any_order_is_sorted() {
        let rows = "{\"timestamp\": 3000, \"input_length\": 6758, \"output_length\": 500, \"hash_ids\": [0, 1]}\n\
                    {\"timestamp\": 1500.4, \"input_length\": 7, \"output_length\": 1}";
        assert_eq!(read(rows).unwrap(), [(0, 7, 1), (1500, 6758, 500)]);
    }

    #[test]
    fn errors_name_the_file_and_the_line() {
        let error = |text: &str| read(text).expect_err(text);
        assert!(error("a,b\n1,2\n").starts_with("t:1: expected {\"timestamp\""));
        assert_eq!(
            error(&format!("{AZURE}2023-11-16 18:15:46,374,x\n")),
            "t:2: GeneratedTokens: \"x\" is not a number of tokens"
        );
        assert_eq!(error(&format!("{AZURE}2023-11-16 18:15:46,374\n")), "t:2: GeneratedTokens: missing");
        assert!(error(&format!("{AZURE}\nyesterday,1,1")).starts_with("t:3: TIMESTAMP: \"yesterday\""));
        assert!(
            error("{\"timestamp\": 1, \"input_length\": 2}")
                .starts_with("t:1: missing field `output_length`")
        );
        assert!(
            error("{\"timestamp\": -1, \"input_length\": 2, \"output_length\": 3}").contains("milliseconds")
        );
        assert!(
            error("{\"timestamp\": 1, \"input_length\": 5000000, \"output_length\": 3}").contains("at most")
        );
        assert_eq!(error("\n"), "t: no request in it");
    }

    #[test]
    fn what_is_no_file_is_told_at_once() {
        let error = |path: &str| Trace::read(Path::new(path)).unwrap_err().to_string();
        assert_eq!(error("/nowhere/trace.csv"), "/nowhere/trace.csv: no such file");
        assert_eq!(error("/dev/zero"), "/dev/zero: a device or a pipe, not a file");
        assert_eq!(error("/"), "/: a directory, not a file");
    }

    #[test]
    fn what_a_trace_writes_it_reads() {
        let text = "{\"timestamp\":0,\"input_length\":5,\"output_length\":6}\n{\"timestamp\":10,\"input_length\":7,\"output_length\":8}\n";
        let mut written = vec![];
        parse(text.as_bytes(), Path::new("t")).unwrap().write(&mut written).unwrap();
        assert_eq!(read(std::str::from_utf8(&written).unwrap()), read(text));
        let long = format!("{}{}", "{\"x\":\"", "y".repeat(MAX_LINE as usize));
        assert_eq!(read(&long).unwrap_err(), "t: a line of more than 1048576 bytes");
    }
}
