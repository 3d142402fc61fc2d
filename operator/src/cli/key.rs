//! `expertmesh key`: a key for a client, and what a Secret says of it.

use anyhow::Context as _;
use clap::Args;

use crate::api_key;

#[derive(Args)]
pub(crate) struct Key {
    /// The client's name, as metrics and logs tell it.
    #[arg(value_parser = name)]
    client: String,
}

/// Draws a key and prints it, and the entry for the Secret that `spec.frontend.apiKeysSecretRef` names.
pub(crate) fn run(key: &Key) -> anyhow::Result<()> {
    let text = api_key::draw().context("no random number")?;
    println!("{text}\n{}={}", key.client, api_key::entry(&text));
    Ok(())
}

/// What a Secret takes as the name of an entry, but for those whose names begin with a dot.
fn name(text: &str) -> Result<String, String> {
    let is_valid = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.');
    let valid = !text.is_empty() && text.len() <= 253 && !text.starts_with('.') && text.bytes().all(is_valid);
    let problem = || "letters, digits, -, _ and . make a name, which begins with no dot".to_string();
    valid.then(|| text.to_string()).ok_or_else(problem)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_those_of_a_secrets_entries() {
        assert_eq!(name("team-a.b_2"), Ok("team-a.b_2".to_string()));
        for wrong in ["", ".hidden", "a b", "a/b", &"a".repeat(254)] {
            assert!(name(wrong).is_err(), "{wrong}");
        }
    }
}
