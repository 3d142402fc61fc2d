"""Records what transformers answers to 200 held-out prompts, in float32 and greedily, so that no test needs torch.

    python ask.py DIR        needs torch, transformers 5.23

The prompts are grade.py's: drawn with random.Random(99), its tasks in turn. Writes into DIR
  answers.json   per prompt: task, prompt, want (the right answer), ids (the prompt's), answer (transformers' ids, the ending one
                 included)
"""
import json
import random
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from curriculum import CHECKABLE, capital, fact, sample

PROMPTS = 200
MOST = 160  # tokens of an answer


def main():
    path = Path(sys.argv[1])
    tok = PreTrainedTokenizerFast.from_pretrained(path)
    lm = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    r, out = random.Random(99), []
    tasks = list(CHECKABLE.values()) + [capital, fact]
    for i in range(PROMPTS):
        task = tasks[i % len(tasks)]
        p, _, want = sample(r, train=False, task=task)[0]
        text = tok.apply_chat_template([{"role": "user", "content": p}], tokenize=False, add_generation_prompt=True)
        x = tok(text, return_tensors="pt", add_special_tokens=False).input_ids
        with torch.no_grad():
            y = lm.generate(x, max_new_tokens=MOST, do_sample=False, eos_token_id=1, pad_token_id=1)[0]
        out.append(dict(task=task.__name__, prompt=p, want=want, ids=x[0].tolist(), answer=y[x.shape[1]:].tolist()))
        print(f"\r{i + 1}/{PROMPTS}", end="", file=sys.stderr, flush=True)
    (path / "answers.json").write_text("[\n" + ",\n".join(json.dumps(o, ensure_ascii=False) for o in out) + "\n]\n")
    text = [tok.decode(o["answer"]).split("</think>")[-1].replace("<｜end▁of▁sentence｜>", "").strip() for o in out]
    print(f"\nexact answers {sum(t == o['want'] for t, o in zip(text, out))} of {len(out)}")


if __name__ == "__main__":
    main()
