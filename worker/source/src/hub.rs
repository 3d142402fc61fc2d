//! A hub with the API of huggingface.co: a revision is resolved to its commit once, and files are read by ranges at that commit.

use std::ops::Range;

use serde::Deserialize;
use ureq::http::{Response, StatusCode};

use crate::address::Repository;
use crate::http::{ATTEMPTS, Http};
use crate::{RemoteFile, Sink, Source, SourceError};

/// The hub where none is named.
pub const ENDPOINT: &str = "https://huggingface.co";
/// The most pages of a list of files.
const PAGES: usize = 100;

/// Whom to ask, and as whom.
#[derive(Clone, Default)]
pub struct Access {
    /// `HF_ENDPOINT`: a mirror, or a hub of one's own.
    pub endpoint: Option<String>,
    /// `HF_TOKEN`.
    pub token: Option<String>,
}

impl std::fmt::Debug for Access {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        let token = self.token.as_ref().map(|_| "…"); // no log is to have it
        f.debug_struct("Access").field("endpoint", &self.endpoint).field("token", &token).finish()
    }
}

impl Access {
    /// What the environment says.
    pub fn from_environment() -> Self {
        let variable = |name| std::env::var(name).ok().filter(|value: &String| !value.trim().is_empty());
        Self { endpoint: variable("HF_ENDPOINT"), token: variable("HF_TOKEN") }
    }
}

/// A repository at a commit.
pub struct Hub {
    http: Http,
    endpoint: String,
    repository: Repository,
    commit: String,
    files: Vec<RemoteFile>,
}

#[derive(Deserialize)]
struct Revision {
    sha: String,
}

#[derive(Deserialize)]
struct Entry {
    #[serde(rename = "type")]
    kind: String,
    path: String,
    #[serde(default)]
    size: u64,
    lfs: Option<Lfs>,
}

#[derive(Deserialize)]
struct Lfs {
    /// SHA-256 in hex.
    oid: String,
    size: u64,
}

impl Hub {
    /// Finds the commit of a repository's revision, and its files.
    pub fn open(repository: Repository, access: Access) -> Result<Self, SourceError> {
        Self::resolve(repository, access, ATTEMPTS)?.listed()
    }

    /// Finds the commit of a repository's revision alone, in so many attempts.
    pub fn resolve(repository: Repository, access: Access, attempts: u32) -> Result<Self, SourceError> {
        let endpoint = access.endpoint.as_deref().unwrap_or(ENDPOINT).trim_end_matches('/').to_owned();
        let mut hub = Self {
            http: Http::new(&endpoint, access.token.map(|token| token.trim().to_owned())),
            endpoint,
            repository,
            commit: String::new(),
            files: vec![],
        };
        hub.http.attempts = attempts;
        let what = hub.repository.to_string();
        let url = hub.api("revision", &hub.repository.revision);
        let (Revision { sha }, _) = hub.http.document(&url, &what, &|answer| hub.refused(answer, &what))?;
        if sha.len() < 40 || !sha.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            let problem = format!("the hub names {sha:?} as its commit, which is none");
            return Err(SourceError::Refused { what, problem });
        }
        (hub.commit, hub.http.attempts) = (sha, ATTEMPTS);
        Ok(hub)
    }

    /// The same with its files.
    pub fn listed(mut self) -> Result<Self, SourceError> {
        self.files = self.list()?;
        Ok(self)
    }

    fn list(&self) -> Result<Vec<RemoteFile>, SourceError> {
        let what = self.repository.to_string();
        let mut page = Some(self.api("tree", &self.commit) + "?recursive=true");
        let mut files = vec![];
        for _ in 0..PAGES {
            let Some(url) = page else { break };
            let (entries, next) = self.http.document(&url, &what, &|answer| self.refused(answer, &what))?;
            let of_file = |Entry { kind, path, size, lfs }: Entry| {
                let (size, sha256) = lfs.map_or((size, None), |lfs| (lfs.size, Some(lfs.oid)));
                (kind == "file").then_some(RemoteFile { path, size, sha256 })
            };
            let entries: Vec<Entry> = entries;
            files.extend(entries.into_iter().filter_map(of_file));
            page = next;
        }
        files.sort_unstable_by(|a: &RemoteFile, b| a.path.cmp(&b.path));
        Ok(files)
    }

    /// The address of what the hub knows of a revision.
    fn api(&self, what: &str, revision: &str) -> String {
        let revision = revision.replace('/', "%2F");
        format!("{}/api/models/{}/{what}/{revision}", self.endpoint, self.repository.id)
    }

    /// What an answer means that is no success; none where it may be another the next time.
    fn refused(&self, answer: &Response<ureq::Body>, what: &str) -> Option<SourceError> {
        let code = answer.headers().get("x-error-code").and_then(|code| code.to_str().ok());
        let what = what.to_owned();
        Some(match (answer.status(), code) {
            (_, Some("GatedRepo")) => {
                let page = format!("{}/{}", self.endpoint, self.repository.id);
                SourceError::Gated { what, page }
            }
            (_, Some("RepoNotFound" | "RevisionNotFound" | "EntryNotFound")) => {
                SourceError::NotFound { what }
            }
            (StatusCode::UNAUTHORIZED, _) => SourceError::Unauthorized { what },
            (StatusCode::NOT_FOUND, _) => SourceError::NotFound { what },
            (StatusCode::FORBIDDEN, _) => {
                let problem = "the hub forbids it to this token; it needs the right to read this repository";
                SourceError::Refused { what, problem: problem.to_owned() }
            }
            _ => return None,
        })
    }
}

impl Source for Hub {
    fn revision(&self) -> &str {
        &self.commit
    }

    fn files(&self) -> &[RemoteFile] {
        &self.files
    }

    fn read(&self, file: &RemoteFile, range: Range<u64>, sink: &mut Sink) -> Result<(), SourceError> {
        let url = format!("{}/{}/resolve/{}/{}", self.endpoint, self.repository.id, self.commit, file.path);
        let what = format!("{} of hf://{}@{}", file.path, self.repository.id, self.commit);
        self.http.range(&url, (&what, file.size), range, sink, &|answer| self.refused(answer, &what))
    }
}

#[cfg(test)]
mod tests;
