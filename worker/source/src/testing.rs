//! A hub on loopback, for tests: it has the files that it is given, as a hub has them, and answers otherwise where a test says so.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::ops::Range;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use sha2::{Digest, Sha256};

/// The commit that every revision is at.
pub const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";
/// Files of so many bytes lie elsewhere, and the hub knows their checksums.
const LARGE: usize = 1000;

type Files = BTreeMap<String, Vec<u8>>;
type Special = dyn Fn(&Asked) -> Option<Vec<u8>> + Send + Sync;

/// A request as the hub sees it: its path, and its headers in lower case.
pub struct Asked {
    pub path: String,
    pub headers: BTreeMap<String, String>,
    files: Arc<Files>,
}

impl Asked {
    pub fn header(&self, name: &str) -> &str {
        self.headers.get(name).map_or("", String::as_str)
    }

    pub fn range(&self) -> Option<Range<usize>> {
        let (first, last) = self.header("range").strip_prefix("bytes=")?.split_once('-')?;
        Some(first.parse().ok()?..last.parse::<usize>().ok()? + 1)
    }

    /// The range of a large file that is asked for, under an entity tag.
    pub fn piece(&self, file: &str, tag: &str) -> Vec<u8> {
        let Some(bytes) = self.files.get(file) else { return answer("404 Not Found", &[], b"") };
        let Some(range) = self.range() else { return answer("200 OK", &[("etag", tag)], bytes) };
        let given = format!("bytes {}-{}/{}", range.start, range.end - 1, bytes.len());
        let headers = [("content-range", given.as_str()), ("etag", tag)];
        match bytes.get(range) {
            Some(piece) => answer("206 Partial Content", &headers, piece),
            None => answer("416 Range Not Satisfiable", &[], b""),
        }
    }

    /// What a hub answers that has these files, in `organisation/name`.
    fn as_a_hub_does(&self) -> Vec<u8> {
        let files = &self.files;
        let path = self.path.as_str();
        if let Some(file) = path.strip_prefix("/cdn/") {
            return self.piece(file, &format!("\"{file}\""));
        }
        if let Some((_, rest)) = path.split_once("/api/models/") {
            return match rest.splitn(4, '/').skip(2).collect::<Vec<_>>()[..] {
                ["revision", _] => answer("200 OK", &[], format!(r#"{{"sha":"{COMMIT}"}}"#).as_bytes()),
                ["tree", page] if page.starts_with(COMMIT) => self.tree(page.contains("&cursor=1")),
                _ => answer("404 Not Found", &[("x-error-code", "RevisionNotFound")], b""),
            };
        }
        let file = path.split_once(&format!("/resolve/{COMMIT}/")).map(|(_, file)| file).unwrap_or_default();
        match files.get(file) {
            Some(bytes) if bytes.len() < LARGE => answer("200 OK", &[], bytes),
            Some(_) => answer("302 Found", &[("location", &format!("/cdn/{file}"))], b""),
            None => answer("404 Not Found", &[("x-error-code", "EntryNotFound")], b""),
        }
    }

    /// The large files, and on a second page the small ones.
    fn tree(&self, is_second: bool) -> Vec<u8> {
        let files = self.files.iter().filter(|(_, bytes)| (bytes.len() < LARGE) == is_second);
        let entries: Vec<String> = files
            .map(|(path, bytes)| {
                let size = bytes.len();
                let lfs = format!(r#","lfs":{{"oid":"{:x}","size":{size}}}"#, Sha256::digest(bytes));
                let lfs = if is_second { "" } else { &lfs };
                format!(r#"{{"type":"file","path":"{path}","size":{size},"oid":"x"{lfs}}}"#)
            })
            .collect();
        let body = format!("[{}]", entries.join(","));
        let next = format!("<http://{}{}&cursor=1>; rel=\"next\"", self.header("host"), self.path);
        let links = [("link", next.as_str())];
        answer("200 OK", if is_second { &[] } else { &links }, body.as_bytes())
    }
}

/// A whole answer of HTTP/1.1.
pub fn answer(status: &str, headers: &[(&str, &str)], body: &[u8]) -> Vec<u8> {
    let mut head = format!("HTTP/1.1 {status}\r\nconnection: close\r\ncontent-length: {}\r\n", body.len());
    headers.iter().for_each(|(name, value)| head += &format!("{name}: {value}\r\n"));
    [head.as_bytes(), b"\r\n", body].concat()
}

/// A hub that serves until the test ends.
pub struct TestHub {
    pub endpoint: String,
    asked: Arc<Mutex<Vec<String>>>,
}

impl TestHub {
    /// Answers what is `special`, and anything else as a hub does that has these files.
    pub fn new(
        files: BTreeMap<String, Vec<u8>>,
        special: impl Fn(&Asked) -> Option<Vec<u8>> + Send + Sync + 'static,
    ) -> Self {
        Self::at("127.0.0.1:0", files, special).expect("a port")
    }

    /// The same at an address; none where this machine has no such.
    pub fn at(
        address: &str,
        files: BTreeMap<String, Vec<u8>>,
        special: impl Fn(&Asked) -> Option<Vec<u8>> + Send + Sync + 'static,
    ) -> Option<Self> {
        let listener = TcpListener::bind(address).ok()?;
        let endpoint = format!("http://{}", listener.local_addr().expect("an address"));
        let asked = Arc::new(Mutex::new(vec![]));
        let (special, seen, files): (Arc<Special>, _, _) =
            (Arc::new(special), asked.clone(), Arc::new(files));
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let (special, seen, files) = (special.clone(), seen.clone(), files.clone());
                std::thread::spawn(move || serve(stream, files, &*special, &seen));
            }
        });
        Some(Self { endpoint, asked })
    }

    /// One with the files of a directory.
    pub fn of(directory: &Path) -> Self {
        let entries = std::fs::read_dir(directory).expect("a directory").flatten();
        let read = |entry: std::fs::DirEntry| {
            let name = entry.file_name().to_string_lossy().into_owned();
            Some((name, std::fs::read(entry.path()).ok()?))
        };
        Self::new(entries.filter_map(read).collect(), |_| None)
    }

    /// What it was asked: paths, with their ranges.
    pub fn asked(&self) -> Vec<String> {
        self.asked.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

fn serve(mut stream: TcpStream, files: Arc<Files>, special: &Special, seen: &Mutex<Vec<String>>) {
    let Ok(reading) = stream.try_clone() else { return };
    let mut lines = BufReader::new(reading).lines().map_while(Result::ok);
    let Some(first) = lines.next() else { return };
    let path = first.split(' ').nth(1).unwrap_or_default().to_owned();
    let header =
        |line: String| line.split_once(": ").map(|(name, value)| (name.to_lowercase(), value.to_owned()));
    let headers = lines.take_while(|line| !line.is_empty()).filter_map(header).collect();
    let asked = Asked { path, headers, files };
    let said = format!("{} {}", asked.path, asked.header("range")).trim().to_owned();
    seen.lock().unwrap_or_else(PoisonError::into_inner).push(said);
    let bytes = special(&asked).unwrap_or_else(|| asked.as_a_hub_does());
    let _ = stream.write_all(&bytes);
}
