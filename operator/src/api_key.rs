//! Keys of clients, and what is known of them where they are asked for.

use sha2::{Digest, Sha256};

/// The bytes of a key, of which nobody guesses one: it is hashed without salt.
const BYTES: usize = 32;

/// A new key, or why the system has no random number.
pub(crate) fn draw() -> Result<String, getrandom::Error> {
    let mut bytes = [0; BYTES];
    getrandom::fill(&mut bytes)?;
    Ok(format!("em-{}", hexadecimal(&bytes)))
}

/// A key of somebody's own, which a header and a shell take as it is.
pub(crate) fn checked(text: &str) -> Result<String, String> {
    let is_plain = |byte: u8| byte.is_ascii_graphic() && !b"'\"\\$`".contains(&byte);
    let is_key = !text.is_empty() && text.bytes().all(is_plain);
    is_key
        .then(|| text.to_string())
        .ok_or_else(|| "a key has visible ASCII characters, no space, quote, \\ or $".into())
}

/// What a frontend is told of a key, by which it knows it and nobody else can use it.
pub(crate) fn entry(key: &str) -> String {
    format!("sha256:{}", hexadecimal(&Sha256::digest(key)))
}

fn hexadecimal(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_is_the_hash_of_the_key() {
        // printf secret | sha256sum
        assert_eq!(
            entry("secret"),
            "sha256:2bb80d537b1da3e38bd30361aa855686bde0eacd7162fef6a25fe97bf527a25b"
        );
        assert!(checked(&draw().unwrap()).is_ok());
        assert!(["", "a b", "a\\r", "it's", "é"].iter().all(|wrong| checked(wrong).is_err()));
        assert_ne!(draw().unwrap(), draw().unwrap());
    }
}
