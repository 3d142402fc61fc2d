//! Whatever a chat template does: an error or a prompt within its bounds. An input is a template, a zero byte, and what a user
//! says.

#![no_main]
use expertmesh_fuzz::{Folder, REQUESTS};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: &[u8]| {
    let mut parts = input.splitn(2, |&byte| byte == 0);
    let (source, text) = (parts.next().unwrap_or_default(), parts.next().unwrap_or_default());
    let folder = Folder::new();
    folder.write("chat_template.jinja", source);
    expertmesh_worker::fuzz::template(folder.path(), &String::from_utf8_lossy(text), &REQUESTS);
});
