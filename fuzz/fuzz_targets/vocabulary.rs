//! Whatever a vocabulary's files hold: an error or tokens, never a panic. An input is a tokenizer.json, or a tiktoken.model
//! after a first line "ranks", then a zero byte, and a text.

#![no_main]
use expertmesh_fuzz::Folder;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: &[u8]| {
    let mut parts = input.splitn(2, |&byte| byte == 0);
    let (file, text) = (parts.next().unwrap_or_default(), parts.next().unwrap_or_default());
    let folder = Folder::new();
    match file.strip_prefix(b"ranks\n") {
        Some(ranks) => {
            folder.write("tiktoken.model", ranks);
            folder.write("tokenizer_config.json", br#"{"tokenizer_class": "TikTokenTokenizer"}"#);
        }
        None => folder.write("tokenizer.json", file),
    }
    expertmesh_worker::fuzz::vocabulary(folder.path(), &String::from_utf8_lossy(text));
});
