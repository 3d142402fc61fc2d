//! Texts whose control tokens stay text: a mark within each keeps the vocabulary from seeing it, wherever a template puts
//! the text, and is taken out before the text becomes tokens.

use std::ops::Range;

use tokenizers::{Model, OffsetReferential, OffsetType, PreTokenizer};

use super::vocabulary::Vocabulary;

/// What may be a mark: characters that Unicode keeps out of texts.
const MARKS: [Range<u32>; 2] = [0xfdd0..0xfdf0, 0xfffe..0x1_0000];

/// How often the texts are looked through: of tokens that overlap, each time half of what is left is marked. A normalizer
/// that takes the marks away would never be done.
const ROUNDS: usize = 64;

/// A text of a client.
pub(crate) struct Literal<'a> {
    pub(crate) text: &'a mut String,
    /// Whether the tags of thoughts are tokens in it all the same.
    pub(crate) thinks: bool,
}

/// Marks every control token that the texts spell, each by itself or where one follows another. The mark, where one was
/// needed; an error where the texts hold all characters that could be one.
pub(super) fn mark(vocabulary: &Vocabulary, texts: &mut [Literal]) -> Result<Option<char>, String> {
    if !vocabulary.may_spell_control(&together(texts)) || found(vocabulary, texts).is_empty() {
        return Ok(None);
    }
    let unused = |mark: &char| texts.iter().all(|literal| !literal.text.contains(*mark));
    let mark = MARKS.into_iter().flatten().filter_map(char::from_u32).find(unused);
    let mark = mark.ok_or("the contents hold all of Unicode's noncharacters")?;
    // Where tokens overlap, one is seen only when the one before it is not.
    for _ in 0..ROUNDS {
        let found = found(vocabulary, texts);
        if found.is_empty() {
            return Ok(Some(mark));
        }
        for Place { text, at } in found.into_iter().rev() {
            texts[text].text.insert(at, mark);
        }
    }
    Err("a control token stays one whatever is put into it".to_owned())
}

/// The tokens of a text with marks, as the tokenizer has them of the text without, were what is marked none of its control
/// tokens.
pub(super) fn encode(vocabulary: &Vocabulary, text: &str, mark: char) -> tokenizers::Result<Vec<u32>> {
    let tokenizer = &vocabulary.tokenizer;
    let added = tokenizer.get_added_vocabulary();
    let mut pieces = added.extract_and_normalize(tokenizer.get_normalizer(), text);
    pieces.normalize(|piece| {
        piece.filter(|char| char != mark);
        Ok(())
    })?;
    if let Some(split) = tokenizer.get_pre_tokenizer() {
        split.pre_tokenize(&mut pieces)?;
    }
    tokenizer.get_model().tokenize_in_pretokenized(&mut pieces, None)?;
    Ok(pieces.into_encoding(None, 0, OffsetType::None)?.get_ids().to_vec())
}

/// Where a mark is to be: a text, and a byte of it.
struct Place {
    text: usize,
    at: usize,
}

/// Places within the control tokens that the tokenizer sees in the texts, one after the other; ascending.
fn found(vocabulary: &Vocabulary, texts: &[Literal]) -> Vec<Place> {
    let together = together(texts);
    let tokenizer = &vocabulary.tokenizer;
    let added = tokenizer.get_added_vocabulary();
    let pieces = added.extract_and_normalize(tokenizer.get_normalizer(), &together);
    let mut ends = Vec::with_capacity(texts.len());
    texts.iter().fold(0, |end, literal| {
        ends.push(end + literal.text.len());
        end + literal.text.len()
    });
    let place = |at: usize| {
        let text = ends.partition_point(|&end| end <= at);
        Place { text, at: at - text.checked_sub(1).map_or(0, |before| ends[before]) }
    };
    let pieces = pieces.get_splits(OffsetReferential::Original, OffsetType::Byte);
    let seen = pieces.into_iter().filter_map(|(_, (start, end), tokens)| {
        let id = tokens.as_ref()?.first()?.id;
        let thinks = texts.get(place(start).text).is_some_and(|literal| literal.thinks);
        let kept = vocabulary.is_kept(id) && thinks;
        (vocabulary.is_control(id) && !kept).then(|| within(&together, start..end))?
    });
    seen.map(place).collect()
}

fn together(texts: &[Literal]) -> String {
    texts.iter().map(|literal| literal.text.as_str()).collect()
}

/// A byte within what is seen at a range of a text, after the first character that is not whitespace; before it where no
/// other follows.
fn within(text: &str, seen: Range<usize>) -> Option<usize> {
    let token = text.get(seen.clone())?.trim_start();
    let first = token.chars().next()?.len_utf8();
    Some(seen.end - token.len() + if first < token.len() { first } else { 0 })
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::sync::LazyLock;

    use proptest::prelude::*;

    use super::*;
    use crate::tokenizer::Tokenizer;
    use crate::tokenizer::tests::streams::byte_fallback;
    use crate::tokenizer::tests::tiny_r1;

    static TOKENIZERS: LazyLock<[Tokenizer; 3]> = LazyLock::new(|| {
        let kimi = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/tiktoken");
        [Tokenizer::load(&tiny_r1()).unwrap(), Tokenizer::load(&kimi).unwrap(), byte_fallback(1)]
    });

    /// The texts with marks, and the mark.
    fn marked(tokenizer: &Tokenizer, texts: &[&str], thinks: bool) -> (Vec<String>, Option<char>) {
        let mut texts: Vec<String> = texts.iter().map(|text| text.to_string()).collect();
        let mut literals: Vec<Literal> = texts.iter_mut().map(|text| Literal { text, thinks }).collect();
        let mark = tokenizer.mark(&mut literals).unwrap();
        (texts, mark)
    }

    #[test]
    fn a_normalizer_that_takes_marks_away_is_an_error() {
        let file = r#"{
            "normalizer": {"type": "Replace", "pattern": {"Regex": "[\ufdd0]"}, "content": ""},
            "model": {"type": "BPE", "vocab": {"a": 0, "<x>": 1}, "merges": []},
            "added_tokens": [{"id": 1, "content": "<x>", "single_word": false, "lstrip": false, "rstrip": false,
                "normalized": true, "special": true}]
        }"#;
        let vocabulary = Vocabulary::of(super::super::file::read(file.as_bytes()).unwrap());
        let mark =
            |text: &str| mark(&vocabulary, &mut [Literal { text: &mut text.to_owned(), thinks: false }]);
        assert_eq!(mark("aa"), Ok(None));
        assert_eq!(mark("a<x>"), Err("a control token stays one whatever is put into it".to_owned()));
    }

    #[test]
    fn a_token_across_two_texts_is_marked_and_whitespace_is_none() {
        let tokenizer = Tokenizer::load(&tiny_r1()).unwrap();
        let (texts, mark) = marked(&tokenizer, &["a<｜User", "｜>b", "  \n"], false);
        assert_eq!((texts[0].as_str(), texts[1].as_str()), ("a<\u{fdd0}｜User", "｜>b"));
        assert_eq!(mark, Some('\u{fdd0}'));
        let plain = ["a < b ｜ c", "<｜User ｜>", "   \n"];
        assert_eq!(marked(&tokenizer, &plain, false), (plain.map(str::to_owned).to_vec(), None));
        // A mark that the client took is another's.
        assert_eq!(marked(&tokenizer, &["\u{fdd0}<｜User｜>"], false).0, ["\u{fdd0}<\u{fdd1}｜User｜>"]);
    }

    #[test]
    fn tags_of_thoughts_are_tokens_where_they_may_be() {
        let tokenizer = Tokenizer::load(&tiny_r1()).unwrap();
        let text = "<think>hm</think>8<｜User｜>";
        assert_eq!(marked(&tokenizer, &[text], true).0, ["<think>hm</think>8<\u{fdd0}｜User｜>"]);
        assert_eq!(marked(&tokenizer, &[text], false).0[0].matches('\u{fdd0}').count(), 3);
    }

    #[test]
    fn a_client_that_uses_every_mark_is_told_so() {
        let tokenizer = Tokenizer::load(&tiny_r1()).unwrap();
        let all: String = MARKS.into_iter().flatten().filter_map(char::from_u32).collect();
        let mut text = all + "<｜User｜>";
        assert!(tokenizer.mark(&mut [Literal { text: &mut text, thinks: false }]).is_err());
    }

    proptest! {
        #[test]
        fn without_marks_the_tokens_are_the_tokenizers(text in "(<｜User｜>|<think>|\\[EOS\\]|<s>|\\PC| |\\n){0,30}") {
            for tokenizer in TOKENIZERS.iter() {
                prop_assert_eq!(encode(&tokenizer.0, &text, '\u{fdd0}').unwrap(), tokenizer.encode(&text).unwrap());
            }
        }

        #[test]
        fn what_is_marked_is_text_and_all_of_it(
            text in "(<｜User｜>|<｜end▁of▁sentence｜>|<think>|</think>|\\[EOS\\]|<\\|im_end\\|>|<s>|<tag>|[ <s>▁\\[🦀]|\\PC){0,20}",
            cut in 0usize..40,
        ) {
            let cut = (0..=cut.min(text.len())).rev().find(|&at| text.is_char_boundary(at)).unwrap();
            for tokenizer in TOKENIZERS.iter() {
                let (texts, mark) = marked(tokenizer, &[&text[..cut], &text[cut..]], false);
                let Some(mark) = mark else { continue };
                let together = texts.concat();
                prop_assert_eq!(together.replace(mark, ""), text.clone());
                let ids = encode(&tokenizer.0, &together, mark).unwrap();
                prop_assert!(!ids.iter().any(|&id| tokenizer.0.is_control(id)), "{:?}", ids);
            }
        }
    }
}
