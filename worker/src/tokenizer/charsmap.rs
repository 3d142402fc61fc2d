//! A SentencePiece `precompiled_charsmap`: what becomes of characters, as a trie in a double array and the texts that its leaves
//! point into. Whoever follows it trusts it, so every way through it is gone once before.
//!
//! Bytes: the trie's size in bytes (u32, little-endian), its units (u32 each), then the texts, each ended by a zero byte.

use base64::Engine;
use base64::prelude::BASE64_STANDARD;

/// How many times longer a text may become; an error where a way leads out of the trie or of the texts.
pub(super) fn growth(map: &str) -> Result<usize, String> {
    let bytes = BASE64_STANDARD.decode(map).map_err(|error| error.to_string())?;
    let (size, rest) = bytes.split_first_chunk().ok_or("it ends too early")?;
    let units = u32::from_le_bytes(*size) as usize / 4;
    let (trie, texts) = rest.split_at_checked(units * 4).ok_or("it ends too early")?;
    let trie: Vec<Unit> = trie.as_chunks().0.iter().map(|&unit| Unit(u32::from_le_bytes(unit))).collect();
    let texts = std::str::from_utf8(texts).map_err(|error| error.to_string())?;
    walk(&trie, texts).ok_or_else(|| "it leads out of itself".to_owned())
}

/// The longest text that any way through the trie leads to, at least 1; `None` where one leads out.
fn walk(trie: &[Unit], texts: &str) -> Option<usize> {
    let mut longest = 1;
    let mut seen = vec![false; trie.len()];
    let mut open = vec![trie.first()?.offset()];
    while let Some(node) = open.pop() {
        for byte in 1..=u8::MAX {
            let at = node ^ usize::from(byte);
            let unit = trie.get(at)?;
            if unit.label() != u32::from(byte) {
                continue;
            }
            let next = at ^ unit.offset();
            if unit.has_leaf() {
                let text = texts.get(trie.get(next)?.value()..)?;
                longest = longest.max(text.find('\0').unwrap_or(text.len()));
            }
            if !std::mem::replace(seen.get_mut(next)?, true) {
                open.push(next);
            }
        }
    }
    Some(longest)
}

/// A unit of a double array, as darts-clone lays it out.
struct Unit(u32);

impl Unit {
    fn has_leaf(&self) -> bool {
        self.0 >> 8 & 1 == 1
    }

    fn value(&self) -> usize {
        (self.0 & (u32::MAX >> 1)) as usize
    }

    fn label(&self) -> u32 {
        self.0 & (1 << 31 | 0xff)
    }

    fn offset(&self) -> usize {
        ((self.0 >> 10) as usize) << ((self.0 & 1 << 9) >> 6)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A charsmap in which "a" becomes "bc", of these units beside those of the trie.
    fn charsmap(changed: &[(usize, u32)]) -> String {
        let mut units = [0u32; 512];
        units[0] = 256 << 10;
        units[256 + 97] = u32::from(b'a') | 1 << 8 | (97 << 10);
        units[256] = 1;
        changed.iter().for_each(|&(at, unit)| units[at] = unit);
        let units = units.iter().flat_map(|unit| unit.to_le_bytes());
        let bytes: Vec<u8> =
            2048u32.to_le_bytes().into_iter().chain(units).chain(*b"xbc\0d\xc3\xa9").collect();
        BASE64_STANDARD.encode(bytes)
    }

    #[test]
    fn a_way_out_of_the_trie_or_of_its_texts_is_found() {
        assert_eq!(growth(&charsmap(&[])), Ok(2));
        let out = Err("it leads out of itself".to_owned());
        assert_eq!(growth(&charsmap(&[(0, 512 << 10)])), out, "a first unit outside");
        assert_eq!(
            growth(&charsmap(&[(353, u32::from(b'a') | 1 << 8 | 1 << 9 | (99 << 10))])),
            out,
            "a leaf outside"
        );
        assert_eq!(growth(&charsmap(&[(353, u32::from(b'a') | (1024 << 10))])), out, "a node outside");
        assert_eq!(growth(&charsmap(&[(256, 99)])), out, "a text outside");
        assert_eq!(growth(&charsmap(&[(256, 6)])), out, "half a character");
        assert_eq!(growth(&charsmap(&[(256, 7)])), Ok(1), "no text at all");
        assert_eq!(growth(""), Err("it ends too early".to_owned()));
        assert_eq!(growth("EAAAAA=="), Err("it ends too early".to_owned()));
        assert_eq!(growth("AAAAAA=="), out, "no unit");
        assert!(growth("?").is_err());
    }

    #[test]
    fn what_is_walked_is_what_the_library_reads() {
        let json = serde_json::json!({"type": "Precompiled", "precompiled_charsmap": charsmap(&[])});
        let normalizer: tokenizers::NormalizerWrapper = serde_json::from_value(json).unwrap();
        let mut text = tokenizers::NormalizedString::from("aéa");
        tokenizers::Normalizer::normalize(&normalizer, &mut text).unwrap();
        assert_eq!(text.get(), "bcébc");
    }
}
