//! Who may ask a frontend: clients with keys, of which hashes alone are known here, and the limits of each.

mod account;

use std::collections::BTreeMap;
use std::fs;
use std::io::Read;
use std::num::NonZeroU64;
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, Instant};

use axum::http::{HeaderMap, HeaderName, HeaderValue, header};
use expertmesh_proto::files;
use serde::Deserialize;
use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;

pub(crate) use self::account::Turn;

use self::account::{Account, Limits};
use super::openai::{ApiError, Completed};
use crate::metrics::clients::{ClientMetrics, CountersOfClient};

/// The key of a client, where it is not in `authorization`.
const API_KEY: HeaderName = HeaderName::from_static("x-api-key");
/// The most clients, each of which has metrics of its own.
const MOST: usize = 1024;
/// The most bytes that are read of one client's file.
const FILE: u64 = 4096;
const SHA256: &str = "sha256:";

type Hash = [u8; 32];

/// Why a folder does not say who may ask.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ClientsError {
    #[error("{}: {error}", path.display())]
    Read { path: PathBuf, error: std::io::Error },
    #[error("more than {MOST} clients")]
    TooMany,
}

/// What a file says of a client: its key's hash, alone or in an object with limits.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
struct Entry {
    key: String,
    requests_per_minute: Option<NonZeroU64>,
    tokens_per_minute: Option<NonZeroU64>,
    concurrent_requests: Option<NonZeroU64>,
}

/// All clients of a frontend. Without any it is open to everybody.
pub(crate) struct Clients {
    known: Option<RwLock<Vec<Arc<Client>>>>,
    metrics: ClientMetrics,
}

/// Somebody who may ask, as long as the request lives that it makes.
pub(crate) struct Client {
    name: String,
    hash: Hash,
    limits: Limits,
    /// What it used up; it outlives a change of key or limits.
    account: Arc<Account>,
    metrics: CountersOfClient,
}

impl Clients {
    /// Takes requests of anybody.
    pub(crate) fn anybody(metrics: ClientMetrics) -> Self {
        Self { known: None, metrics }
    }

    /// Takes requests of those that a folder names: a file for each client, called as it is.
    pub(crate) fn read(folder: &Path, metrics: ClientMetrics) -> Result<Self, ClientsError> {
        let clients = Self { known: Some(RwLock::default()), metrics };
        clients.swap(entries(&contents(folder)?));
        Ok(clients)
    }

    /// Takes over for ever what the folder says. Where it cannot be read, that is told, and those of before go on.
    pub(crate) async fn follow(&self, folder: &Path) {
        let take = |files: Result<&_, ClientsError>| match files {
            Ok(files) => self.swap(entries(files)),
            Err(error) => tracing::warn!(%error, "the API keys cannot be read; those of before go on"),
        };
        files::follow(|| contents(folder), take).await;
    }

    /// Knows these from now on. An entry that says nothing of use is a client without a key, whatever it said before: one that was revoked
    /// beside it stays revoked.
    fn swap(&self, Entries { valid, invalid }: Entries) {
        let Some(known) = &self.known else { return };
        for Invalid { name, problem } in &invalid {
            tracing::warn!(client = name, problem, "this client has no key");
        }
        self.metrics.invalid(invalid.len());
        let mut known = known.write().unwrap_or_else(PoisonError::into_inner);
        for gone in known.iter().filter(|client| !valid.contains_key(&client.name)) {
            self.metrics.forget(&gone.name);
        }
        let client = |(name, (hash, limits)): (String, (Hash, Limits))| {
            let before = known.iter().find(|client| client.name == name);
            let account = before.map_or_else(Arc::default, |client| client.account.clone());
            let metrics = self.metrics.of(&name);
            Arc::new(Client { name, hash, limits, account, metrics })
        };
        *known = valid.into_iter().map(client).collect();
        tracing::info!(clients = known.len(), "API keys");
    }

    /// Whose request this is; nobody's in particular where everybody may ask.
    pub(crate) fn of(&self, headers: &HeaderMap) -> Result<Option<Arc<Client>>, ApiError> {
        let Some(known) = &self.known else { return Ok(None) };
        let hash: Hash = Sha256::digest(presented(headers).ok_or(ApiError::KeyMissing)?).into();
        let known = known.read().unwrap_or_else(PoisonError::into_inner);
        // All are compared, so that the time tells nothing of a hash.
        let mut found = None;
        for client in known.iter() {
            if bool::from(client.hash.ct_eq(&hash)) {
                found = Some(client);
            }
        }
        found.cloned().map(Some).ok_or(ApiError::KeyUnknown)
    }
}

impl Client {
    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// Begins a request, unless one of the client's limits is used up.
    pub(crate) fn begin(&self) -> Result<Turn, ApiError> {
        let turn = self.account.begin(&self.limits, Instant::now());
        match &turn {
            Ok(_) => self.metrics.began(),
            Err(exceeded) => self.metrics.refused(exceeded.limit),
        }
        turn.map_err(|exceeded| ApiError::ClientLimit {
            problem: format!("{}: {exceeded}", self.name),
            wait: exceeded.wait.unwrap_or(Duration::from_secs(1)),
        })
    }

    /// Takes a prompt's tokens from what the client may use.
    pub(crate) fn prompt(&self, tokens: usize) {
        self.metrics.prompt(tokens);
        self.spend(tokens);
    }

    /// Takes generated tokens from what the client may use.
    pub(crate) fn generated(&self, completed: Completed) {
        self.metrics.generated(completed.tokens);
        self.spend(completed.tokens);
    }

    /// A request that began was turned away for want of a worker or of room: it and its prompt's tokens count for nothing.
    pub(crate) fn unserved(&self, prompt: usize) {
        self.account.give_back(&self.limits, prompt, Instant::now());
    }

    fn spend(&self, tokens: usize) {
        self.account.spend(&self.limits, tokens, Instant::now());
    }
}

/// The key that came with a request: `Authorization: Bearer KEY`, or `x-api-key: KEY`.
fn presented(headers: &HeaderMap) -> Option<&[u8]> {
    let bearer = headers.get(header::AUTHORIZATION).map(HeaderValue::as_bytes).and_then(|value| {
        let (scheme, key) = value.split_at_checked(7)?;
        scheme.eq_ignore_ascii_case(b"bearer ").then(|| key.trim_ascii())
    });
    let key = bearer.or_else(|| headers.get(API_KEY).map(HeaderValue::as_bytes))?;
    (!key.is_empty()).then_some(key)
}

/// What is in each file of a folder, by the file's name. Those whose names begin with a dot are the kubelet's.
fn contents(folder: &Path) -> Result<BTreeMap<String, Vec<u8>>, ClientsError> {
    let failed = |path: &Path| {
        let path = path.to_path_buf();
        move |error| ClientsError::Read { path, error }
    };
    let mut files = BTreeMap::new();
    for entry in fs::read_dir(folder).map_err(failed(folder))? {
        let path = entry.map_err(failed(folder))?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if name.starts_with('.') {
            continue;
        }
        if files.len() == MOST {
            return Err(ClientsError::TooMany);
        }
        let mut text = vec![];
        let file = fs::File::open(&path).map_err(failed(&path))?;
        file.take(FILE + 1).read_to_end(&mut text).map_err(failed(&path))?;
        files.insert(name, text);
    }
    Ok(files)
}

/// What a folder says of its clients.
#[derive(Debug, Default)]
struct Entries {
    valid: BTreeMap<String, (Hash, Limits)>,
    invalid: Vec<Invalid>,
}

/// An entry of which nobody's key is known, and why.
#[derive(Debug, PartialEq, Eq)]
struct Invalid {
    name: String,
    problem: String,
}

fn entries(files: &BTreeMap<String, Vec<u8>>) -> Entries {
    let mut holders: BTreeMap<Hash, &str> = BTreeMap::new();
    let mut entries = Entries::default();
    for (name, text) in files {
        let found = entry(text).and_then(|(hash, limits)| match holders.insert(hash, name) {
            Some(holder) => Err(format!("the key is {holder}'s")),
            None => Ok((hash, limits)),
        });
        let name = name.clone();
        match found {
            Ok(known) => drop(entries.valid.insert(name, known)),
            Err(problem) => entries.invalid.push(Invalid { name, problem }),
        }
    }
    entries
}

fn entry(text: &[u8]) -> Result<(Hash, Limits), String> {
    if text.len() as u64 > FILE {
        return Err(format!("longer than {FILE} bytes"));
    }
    let text = str::from_utf8(text).map_err(|error| error.to_string())?.trim();
    let (key, limits) = match text.starts_with('{') {
        true => {
            let entry: Entry = serde_json::from_str(text).map_err(|error| error.to_string())?;
            let Entry { key, requests_per_minute, tokens_per_minute, concurrent_requests } = entry;
            (key, Limits { requests_per_minute, tokens_per_minute, concurrent_requests })
        }
        false => (text.to_string(), Limits::default()),
    };
    let hash = key.strip_prefix(SHA256).and_then(from_hex);
    // Not what is written: it may be the key itself.
    let hash = hash.ok_or_else(|| {
        format!("not {SHA256} and the 64 hexadecimal digits of a key's hash, as `expertmesh key` makes one")
    })?;
    Ok((hash, limits))
}

fn from_hex(text: &str) -> Option<Hash> {
    let mut hash = Hash::default();
    if text.len() != 2 * hash.len() || !text.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return None;
    }
    for (index, byte) in hash.iter_mut().enumerate() {
        *byte = u8::from_str_radix(text.get(2 * index..2 * index + 2)?, 16).ok()?;
    }
    Some(hash)
}

#[cfg(test)]
mod tests {
    use expertmesh_metrics::Registry;
    use serde_json::json;

    use super::*;

    /// `printf secret | sha256sum`
    const SECRET: &str = "2bb80d537b1da3e38bd30361aa855686bde0eacd7162fef6a25fe97bf527a25b";

    fn files(texts: &[(&str, &str)]) -> BTreeMap<String, Vec<u8>> {
        texts.iter().map(|(name, text)| (name.to_string(), text.as_bytes().to_vec())).collect()
    }

    fn clients(texts: &[(&str, &str)]) -> Clients {
        let metrics = ClientMetrics::new(&Registry::new());
        let clients = Clients { known: Some(RwLock::default()), metrics };
        clients.swap(entries(&files(texts)));
        clients
    }

    fn whose(clients: &Clients, name: HeaderName, value: &str) -> Result<String, ApiError> {
        let headers = HeaderMap::from_iter([(name, value.parse().unwrap())]);
        clients.of(&headers).map(|client| client.map_or(String::new(), |client| client.name.clone()))
    }

    #[test]
    fn a_client_is_known_by_its_key_in_either_header() {
        let clients =
            clients(&[("alice", &format!("sha256:{SECRET}\n")), ("bob", &format!("sha256:{SECRET:.63}0"))]);
        for value in ["Bearer secret", "bearer  secret"] {
            assert_eq!(whose(&clients, header::AUTHORIZATION, value), Ok("alice".into()), "{value}");
        }
        assert_eq!(whose(&clients, API_KEY, "secret"), Ok("alice".into()));
        for value in ["Bearer secret2", "Bearer Secret"] {
            assert_eq!(whose(&clients, header::AUTHORIZATION, value), Err(ApiError::KeyUnknown), "{value}");
        }
        for value in ["Bearer ", "Basic secret", "secret"] {
            assert_eq!(whose(&clients, header::AUTHORIZATION, value), Err(ApiError::KeyMissing), "{value}");
        }
        let open = Clients::anybody(ClientMetrics::new(&Registry::new()));
        assert_eq!(whose(&open, API_KEY, "secret"), Ok(String::new()));
    }

    #[test]
    fn a_change_of_key_or_limits_keeps_what_was_used_up() {
        let limited =
            |hash: &str| json!({"key": format!("sha256:{hash}"), "requestsPerMinute": 1}).to_string();
        let clients = clients(&[("alice", &limited(&"0".repeat(64)))]);
        let first = clients.known.as_ref().unwrap().read().unwrap()[0].clone();
        first.begin().unwrap();
        clients.swap(entries(&files(&[("alice", &limited(SECRET))])));
        let headers = HeaderMap::from_iter([(API_KEY, HeaderValue::from_static("secret"))]);
        let again = clients.of(&headers).unwrap().unwrap().begin();
        let Err(ApiError::ClientLimit { problem, wait }) = again else { panic!("it began") };
        assert_eq!(problem, "alice: its limit is 1 requests a minute");
        assert!(wait > Duration::from_secs(50), "{wait:?}");
    }

    #[test]
    fn an_entry_of_no_use_is_told_without_what_it_says_and_takes_nobody_elses_key() {
        let hash = format!("sha256:{SECRET}");
        let object = |more: &str| format!("{{\"key\": \"{hash}\"{more}}}");
        let cases = [
            ("hunter2".to_string(), "not sha256: and the 64 hexadecimal digits of a key's hash"),
            (hash.clone(), "the key is alice's"),
            (object(", \"requestPerMinute\": 1"), "unknown field `requestPerMinute`"),
            (object(", \"requestsPerMinute\": 0"), "invalid value"),
            ("a".repeat(5000), "longer than 4096 bytes"),
        ];
        for (text, expected) in cases {
            let Entries { valid, invalid } = entries(&files(&[("alice", &hash), ("bob", &text)]));
            assert_eq!(valid.keys().collect::<Vec<_>>(), ["alice"]);
            assert!(invalid[0].name == "bob" && invalid[0].problem.starts_with(expected), "{invalid:?}");
            assert!(!invalid[0].problem.contains("hunter2"), "it may be a key");
        }
        let (_, limits) =
            entry(object(", \"tokensPerMinute\": 500, \"concurrentRequests\": 2").as_bytes()).unwrap();
        assert_eq!(
            limits,
            Limits {
                tokens_per_minute: 500.try_into().ok(),
                concurrent_requests: 2.try_into().ok(),
                ..Limits::default()
            }
        );
    }
}
