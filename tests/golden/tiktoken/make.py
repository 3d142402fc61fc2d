"""Makes a small model's vocabulary in the layout of Kimi-K2 and Moonlight, and records what tiktoken makes of many texts with it.

    pip install tiktoken==0.14.0 tokenizers==0.23.3
    python make.py        writes tiktoken.model, tokenizer_config.json and recorded.json beside itself

tiktoken.model         a line for each token: its bytes in base64, and its rank
tokenizer_config.json  the keys of the published one that say what its special tokens are and which code reads it
recorded.json          {text, ids, decoded}: the ids with all special tokens recognised, and the text of those that are not special
"""
import base64
import json
import random
from pathlib import Path

import tiktoken
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

# The published pattern, alternative by alternative.
PATTERN = "|".join([
    r"[\p{Han}]+",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    r"\p{N}{1,3}",
    r" ?[^\s\p{L}\p{N}]+[\r\n]*",
    r"\s*[\r\n]+",
    r"\s+(?!\S)",
    r"\s+",
])
SIZE = 1500
RESERVED = 256
NAMED = {0: "[BOS]", 1: "[EOS]", 2: "<|im_end|>", 3: "<|im_user|>", 4: "<|im_assistant|>", 6: "<|start_header_id|>", 10: "<|im_system|>",
         17: "<|im_middle|>", 20: "<think>", 21: "</think>", 254: "[UNK]", 255: "[PAD]"}
CORPUS = [
    "The quick brown fox jumps over the lazy dog. It's what they'll say: we've seen THEM, I'm sure you'd agree.",
    "def read(path):\n    with open(path) as file:\n        return [line.strip() for line in file if line]\n\n\n",
    "fn main() {\n    let xs: Vec<u32> = (0..10).map(|x| x * 2).collect();\n\tprintln!(\"{:?}\", xs);\n}\r\n",
    "月之暗面是一家人工智能公司。它在2023年成立，开发了名为Kimi的语言模型。你好，世界！中文English混合。",
    "日本語のテキストには、ひらがなとカタカナがあります。ﾊﾝｶｸ文字も少し。", "한국어 문장입니다. 안녕하세요, 세계?",
    "Привет, мир! Ёжик бежит по ТРАВЕ.", "Γειά σου Κόσμε. Ελληνικά κείμενα.", "مرحبا بالعالم، كيف حالك؟", "हिन्दी में एक वाक्य है।",
    "naïve café über Œuvre, Ǆ ǅ ǆ, İstanbul, straße", "1234567 3.14159 0x1F 2024-01-31T23:59:59Z ½ ² ١٢٣ Ⅷ",
    "🦀🦀 👩‍👩‍👧‍👦 👍🏽 ❤️", "   spaces   and\ttabs\n\n\n  \n x  ", "{\"a\": [1, 2, {\"b\": null}]} <div class=\"x\">&nbsp;</div> !!! ??? --- ===",
    "aaaaaaaaaa aaaa aa abababab banana bananas nanana mississippi",
]
ALPHABETS = ["abc XYZ", "  \n\t\r", "0123456789", "'sSrRe'lLdmMtT\"!?.,;:-_()", "éüñßøçǅİ", "你好世界月暗", "かなカナﾊ", "مرحبا", "🦀👍🏽❤️\u200d", "\u0301\u0308\u200b\u00a0\u3000", "aaaab", "ab", "한글ไทยहि", "𠮷㐀々〇", "\u0000\u0085\u2028\ufffd"]


def spelled():
    """The character that stands for each byte, as in GPT-2."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + at): byte for at, byte in enumerate(hidden)}


def trained():
    """Tokens in the order of their ranks."""
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(PATTERN), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    trainer = trainers.BpeTrainer(vocab_size=SIZE, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    tokenizer.train_from_iterator(CORPUS * 2, trainer)
    table = spelled()
    vocabulary = sorted(tokenizer.get_vocab(with_added_tokens=False).items(), key=lambda entry: entry[1])
    return [bytes(table[char] for char in token) for token, _ in vocabulary]


def fuzz(rng):
    """A text whose neighbours are often of different kinds."""
    return "".join(rng.choice(rng.choice(ALPHABETS)) * rng.choice([1, 1, 1, 2, 5]) for _ in range(rng.randint(1, 60)))


def main():
    here, rng, tokens = Path(__file__).parent, random.Random(11), trained()
    here.joinpath("tiktoken.model").write_text("".join(f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(tokens)))
    token = lambda content: dict(content=content, lstrip=False, normalized=False, rstrip=False, single_word=False, special="think" not in content)
    config = dict(added_tokens_decoder={str(len(tokens) + at): token(content) for at, content in NAMED.items()},
                  auto_map=dict(AutoTokenizer=["tokenization_kimi.TikTokenTokenizer", None]), bos_token="[BOS]", eos_token="[EOS]",
                  tokenizer_class="TikTokenTokenizer")
    here.joinpath("tokenizer_config.json").write_text(json.dumps(config, indent=1))
    special = {NAMED.get(at, f"<|reserved_token_{len(tokens) + at}|>"): len(tokens) + at for at in range(RESERVED)}
    encoding = tiktoken.Encoding("small", pat_str=PATTERN, mergeable_ranks={token: rank for rank, token in enumerate(tokens)}, special_tokens=special)
    skipped = {id for content, id in special.items() if "think" not in content}
    turns = ["<|im_system|>system<|im_middle|>Be brief.<|im_end|><|im_user|>user<|im_middle|>Hi<|im_end|><|im_assistant|>assistant<|im_middle|><think>Hm</think>Yes",
             "[BOS]x[EOS]", "<|im_user", f"a<|reserved_token_{len(tokens) + 5}|>b", " <|im_end|> ", "<think></think>", "[EOT] [BO S]"]
    recorded = []
    for text in CORPUS + turns + ["a" * n for n in range(1, 40)] + ["ab" * 40, "x" * 500, " " * 300 + "x", "\n" * 64, ""] + [fuzz(rng) for _ in range(240)]:
        ids = encoding.encode(text, allowed_special="all")
        decoded = encoding.decode([id for id in ids if id not in skipped])
        recorded.append(dict(text=text, ids=ids, decoded=decoded))
    here.joinpath("recorded.json").write_text(json.dumps(recorded, separators=(",", ":")))


main()
