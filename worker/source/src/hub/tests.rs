use std::sync::Mutex;

use sha2::Digest;

use super::*;
use crate::testing::{Asked, COMMIT, TestHub, answer};

const WEIGHTS: &str = "model.safetensors";

fn weights() -> Vec<u8> {
    (0..100_000u32).flat_map(|at| at.to_le_bytes()).collect()
}

fn hub_with(special: impl Fn(&Asked) -> Option<Vec<u8>> + Send + Sync + 'static) -> TestHub {
    let files = [(WEIGHTS.to_owned(), weights()), ("config.json".to_owned(), b"{}\n".to_vec())];
    TestHub::new(files.into(), special)
}

fn open(hub: &TestHub, token: Option<&str>) -> Result<Hub, SourceError> {
    let repository = Repository { id: "a/b".into(), revision: "main".into() };
    Hub::open(repository, Access { endpoint: Some(hub.endpoint.clone()), token: token.map(str::to_owned) })
}

fn read(hub: &Hub, path: &str, range: Range<u64>) -> Result<Vec<u8>, SourceError> {
    let file = hub.files().iter().find(|file| file.path == path).expect("it is listed").clone();
    let mut bytes = vec![];
    hub.read(&file, range.clone(), &mut |at, piece| {
        assert_eq!(at, range.start + bytes.len() as u64, "ascending, and each byte once");
        bytes.extend_from_slice(piece);
        Ok(())
    })?;
    Ok(bytes)
}

/// The first request that begins so gets this answer, later ones a hub's.
fn once(path: &'static str, answer: Vec<u8>) -> impl Fn(&Asked) -> Option<Vec<u8>> {
    let left = Mutex::new(Some(answer));
    move |asked| asked.path.starts_with(path).then(|| left.lock().unwrap().take()).flatten()
}

#[test]
fn a_revision_is_resolved_once_and_files_are_read_by_ranges_at_its_commit() {
    let hub = hub_with(|_| None);
    let source = open(&hub, None).unwrap();
    assert_eq!(source.revision(), COMMIT);
    let sizes: Vec<_> =
        source.files().iter().map(|file| (file.path.as_str(), file.size, file.sha256.as_deref())).collect();
    let checksum = format!("{:x}", sha2::Sha256::digest(weights()));
    assert_eq!(sizes, [("config.json", 3, None), ("model.safetensors", 400_000, Some(checksum.as_str()))]);
    assert_eq!(read(&source, "model.safetensors", 7..300_007).unwrap(), weights()[7..300_007]);
    assert_eq!(read(&source, "config.json", 0..3).unwrap(), b"{}\n", "whole, where no range is known");
    let resolved: Vec<String> =
        hub.asked().into_iter().filter(|asked| asked.contains("/revision/")).collect();
    assert_eq!(resolved.len(), 1);
    assert!(hub.asked().contains(&"/cdn/model.safetensors bytes=7-300006".to_owned()), "{:?}", hub.asked());
}

#[test]
fn a_token_goes_to_the_hub_and_to_no_other_host() {
    let elsewhere = hub_with(|asked| {
        assert_eq!(asked.header("authorization"), "", "the token went to another host");
        Some(asked.piece(WEIGHTS, "\"w1\""))
    });
    let other = elsewhere.endpoint.replace("127.0.0.1", "localhost");
    let hub = hub_with(move |asked| match asked.header("authorization") {
        "Bearer secret" if asked.path.ends_with("model.safetensors") => {
            Some(answer("302 Found", &[("location", &format!("{other}/signed"))], b""))
        }
        "Bearer secret" => None,
        _ => Some(answer("401 Unauthorized", &[], b"")),
    });
    let source = open(&hub, Some(" secret\n")).unwrap();
    assert_eq!(read(&source, "model.safetensors", 0..8).unwrap(), weights()[..8]);
    assert_eq!(elsewhere.asked(), ["/signed bytes=0-7"]);
}

#[test]
fn what_is_refused_says_what_to_do() {
    let told = |status: &'static str, code: &'static str| {
        let hub = hub_with(move |_| Some(answer(status, &[("x-error-code", code)], b"")));
        let error = open(&hub, None).err().unwrap();
        assert_eq!(hub.asked().len(), 1, "it is not tried again");
        (error.reason(), error.to_string().replace(&hub.endpoint, "HUB"))
    };
    assert_eq!(
        told("401 Unauthorized", ""),
        ("SourceUnauthorized", "hf://a/b@main is not given without a valid token: set HF_TOKEN".into())
    );
    assert_eq!(
        told("403 Forbidden", "GatedRepo"),
        (
            "SourceGated",
            "hf://a/b@main is gated: the token's account has to be granted access at HUB/a/b".into()
        )
    );
    let missing = "hf://a/b@main is not there, or is private; a private one needs a token";
    assert_eq!(told("401 Unauthorized", "RepoNotFound"), ("SourceNotFound", missing.into()));
    assert_eq!(told("404 Not Found", "RevisionNotFound"), ("SourceNotFound", missing.into()));
    assert_eq!(told("403 Forbidden", "").0, "SourceRefused");
    assert_eq!(told("400 Bad Request", ""), ("SourceRefused", "HUB/api/models/a/b/revision/main: HUB/api/models/a/b/revision/main answered with 400 Bad Request".into()));
}

#[test]
fn who_is_asked_to_wait_waits_and_a_server_in_trouble_is_asked_again() {
    let busy = answer("429 Too Many Requests", &[("retry-after", "1")], b"");
    let source = open(&hub_with(once("/api/models", busy)), None).unwrap();
    assert_eq!(source.revision(), COMMIT);
    let source = open(&hub_with(once("/cdn", answer("503 Service Unavailable", &[], b""))), None).unwrap();
    assert_eq!(read(&source, "model.safetensors", 0..400_000).unwrap(), weights());
}

#[test]
fn a_body_that_is_cut_goes_on_where_it_was() {
    let cut = |asked: &Asked| {
        let mut whole = asked.piece(WEIGHTS, "\"model.safetensors\"");
        whole.truncate(whole.len() - 1000);
        whole
    };
    let hub = hub_with(move |asked| {
        let is_long = asked.range().is_some_and(|range| range.len() > 10_000);
        (asked.path == "/cdn/model.safetensors" && is_long).then(|| cut(asked))
    });
    let source = open(&hub, None).unwrap();
    assert_eq!(read(&source, "model.safetensors", 0..400_000).unwrap(), weights());
    assert_eq!(hub.asked().last().map(String::as_str), Some("/cdn/model.safetensors bytes=399000-399999"));
}

#[test]
fn a_file_that_is_another_than_at_first_is_told_and_a_server_that_ignores_ranges_too() {
    let hub = hub_with(|asked| {
        let is_first = asked.range().is_some_and(|range| range.start == 0);
        (asked.path == "/cdn/model.safetensors")
            .then(|| asked.piece(WEIGHTS, if is_first { "\"w1\"" } else { "\"w2\"" }))
    });
    let source = open(&hub, None).unwrap();
    read(&source, "model.safetensors", 0..8).unwrap();
    let error = read(&source, "model.safetensors", 8..16).unwrap_err();
    assert_eq!(error.reason(), "SourceChanged");
    assert!(error.to_string().ends_with(r#"its entity tag was "w1" and is "w2""#), "{error}");

    let ignores =
        |asked: &Asked| (asked.path == "/cdn/model.safetensors").then(|| answer("200 OK", &[], &weights()));
    let source = open(&hub_with(ignores), None).unwrap();
    let error = read(&source, "model.safetensors", 8..16).unwrap_err().to_string();
    assert!(error.ends_with("its server knows no ranges: it answered with 200 OK"), "{error}");
    assert_eq!(
        read(&source, "model.safetensors", 0..400_000).unwrap(),
        weights(),
        "whole, it is what was asked for"
    );
}

#[test]
fn a_sink_that_is_full_ends_it_at_once() {
    let hub = hub_with(|_| None);
    let source = open(&hub, None).unwrap();
    let file = source.files()[1].clone();
    let full = |_: u64, _: &[u8]| Err(std::io::Error::from(std::io::ErrorKind::StorageFull));
    let error = source.read(&file, 0..8, &mut { full }).unwrap_err();
    assert_eq!(
        (error.reason(), hub.asked().iter().filter(|asked| asked.contains("/cdn")).count()),
        ("SourceNotKept", 1)
    );
}

#[test]
fn a_small_file_that_is_cut_where_no_range_is_known_is_read_from_its_beginning_again() {
    let mut cut = answer("200 OK", &[], b"{}\n");
    cut.truncate(cut.len() - 1);
    let hub = hub_with(once("/a/b/resolve", cut));
    assert_eq!(read(&open(&hub, None).unwrap(), "config.json", 0..3).unwrap(), b"{}\n");
}

#[test]
fn what_comes_encoded_or_longer_than_it_is_is_refused() {
    let encoded = |asked: &Asked| {
        assert_eq!(asked.header("accept-encoding"), "identity");
        let headers = [("content-range", "bytes 0-7/400000"), ("content-encoding", "gzip")];
        asked.path.starts_with("/cdn").then(|| answer("206 Partial Content", &headers, b"12345678"))
    };
    let error = read(&open(&hub_with(encoded), None).unwrap(), WEIGHTS, 0..8).unwrap_err();
    assert!(error.to_string().ends_with("it came encoded as gzip, though as it is was asked for"), "{error}");
    let longer =
        |asked: &Asked| asked.path.ends_with("config.json").then(|| answer("200 OK", &[], b"{}\n\n"));
    let error = read(&open(&hub_with(longer), None).unwrap(), "config.json", 0..3).unwrap_err();
    assert!(error.to_string().ends_with("more than its 3 bytes came"), "{error}");
}
