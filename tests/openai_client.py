"""Drives a frontend with the unmodified `openai` package: whole and streamed answers are the same, errors are the client's own classes.

    target/venv/bin/python tests/openai_client.py BASE_URL MODEL        exit code 0: all as expected

BASE_URL is the frontend's address with /v1, as in http://127.0.0.1:8000/v1. Where OPENAI_API_KEY is set, the frontend is to ask for it.
"""
import os
import sys

import openai

NO_KEY = "none"
QUESTION = [{"role": "user", "content": "What is 46 + 37?"}]


def expect(holds, what):
    if not holds:
        raise AssertionError(what)


def expect_error(kind, code, call):
    try:
        call()
    except openai.APIStatusError as error:
        expect(type(error) is kind, f"expected {kind.__name__}, got {type(error).__name__}: {error}")
        expect(error.code == code, f"expected the code {code}, got {error.code}: {error}")
        return error
    raise AssertionError(f"expected {kind.__name__}, got an answer")


def models(client, model):
    expect([entry.id for entry in client.models.list()] == [model], "the list of models is not the one that is served")
    expect(client.models.retrieve(model).id == model, "the model is not found by its name")


def gather(chunks):
    """What a stream adds up to: per choice (reasoning, content, finish_reason), and the usage."""
    choices, usage = {}, None
    for chunk in chunks:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            thought, content, end = choices.get(choice.index, ("", "", None))
            thought += getattr(choice.delta, "reasoning_content", None) or ""
            content += choice.delta.content or ""
            choices[choice.index] = (thought, content, choice.finish_reason or end)
    return choices, usage


def chat(client, model, **wishes):
    wishes = dict(model=model, messages=QUESTION, **wishes)
    answer = client.chat.completions.create(**wishes)
    whole = {
        choice.index: (getattr(choice.message, "reasoning_content", None) or "", choice.message.content or "", choice.finish_reason)
        for choice in answer.choices
    }
    chunks = client.chat.completions.create(stream=True, stream_options={"include_usage": True}, **wishes)
    streamed, usage = gather(chunks)
    expect(streamed == whole, f"streamed {streamed}, whole {whole}")
    expect(usage == answer.usage, f"streamed {usage}, whole {answer.usage}")
    return whole


def chats(client, model):
    thought, content, end = chat(client, model, temperature=0)[0]
    expect(thought and content == "83" and end == "stop", f"46 + 37 is {content!r} after {thought!r}, finished by {end}")
    _, _, end = chat(client, model, temperature=0, max_tokens=3)[0]
    expect(end == "length", f"three tokens were finished by {end}")
    expect(chat(client, model, temperature=0, stop=["13,"])[0] == (thought, "83", "stop"), "a stop string of the thought cost the answer")
    expect(chat(client, model, temperature=0, stop=["3"])[0] == (thought, "8", "stop"), "a stop string of the answer did not end it")
    stopped, _, end = chat(client, model, temperature=0, stop=["13,"], extra_body={"stop_in_reasoning": True})[0]
    expect(thought.startswith(stopped) and "13," not in stopped and end == "stop", f"stopped by {end} after {stopped!r}")
    expect(chat(client, model, temperature=0, extra_body={"include_reasoning": False})[0] == ("", "83", "stop"), "the thought was not left out")
    _, both, _ = chat(client, model, temperature=0, extra_body={"separate_reasoning": False})[0]
    expect(both == f"{thought}</think>\n\n83", f"the thought is not in the content: {both!r}")
    usage = client.chat.completions.create(model=model, messages=QUESTION, temperature=0).usage
    spent = usage.completion_tokens_details.reasoning_tokens
    expect(0 < spent < usage.completion_tokens and usage.prompt_tokens_details.cached_tokens == 0, f"usage is {usage}")
    expect(chat(client, model, temperature=3, top_p=0)[0][1] == "83", "a top_p of nothing is not the most probable token")
    expect(chat(client, model, seed=7) == chat(client, model, seed=7), "the same seed gave other tokens")
    several = chat(client, model, seed=7, n=3)
    expect(len(several) == 3, f"{len(several)} choices of 3")
    expect(several[1] == chat(client, model, seed=8)[0], "choice 1 is not what seed + 1 gives")


def told(create, **wishes):
    """An answer's token ids and the seed that it tells, by header and in its body; the same for a stream's last chunk."""
    answer = create(**wishes, extra_body={"return_token_ids": True})
    header = int(answer.headers["x-seed"])
    answer = answer.parse()
    if wishes.get("stream"):
        chunks = list(answer)
        ids = [token for chunk in chunks for choice in chunk.choices for token in getattr(choice, "token_ids", None) or []]
        answer = chunks[-1]
    else:
        ids = answer.choices[0].token_ids
    expect(answer.seed == header < 2**53, f"the header tells the seed {header}, the body {answer.seed}")
    return ids, header


def seeds(client, model):
    """Without a seed every answer is another one, and the told seed gives it again."""
    chat, complete = client.chat.completions.with_raw_response.create, client.completions.with_raw_response.create
    for create, wishes in ((chat, dict(messages=QUESTION)), (complete, dict(prompt="The capital of"))):
        wishes = dict(model=model, temperature=3, max_tokens=24, **wishes)
        for stream in (False, True):
            (first, seed), (second, other) = (told(create, stream=stream, **wishes) for _ in range(2))
            expect(first != second and seed != other, f"{seed} gave {first}, {other} gave {second}")
            for again in (False, True):
                expect(told(create, stream=again, seed=seed, **wishes) == (first, seed), f"the seed {seed} gave another answer again")
        expect(told(create, **{**wishes, "temperature": 0})[0] == told(create, **{**wishes, "temperature": 0})[0], "greedy answers differ")


def sampled(client, model):
    """What changes which tokens come: each field by an effect that only it has."""
    create = client.chat.completions.create
    wishes = dict(model=model, messages=QUESTION, temperature=0, max_tokens=60, logprobs=True)
    ids = lambda **more: create(**{**wishes, **more, "extra_body": {"return_token_ids": True, **more.pop("extra_body", {})}}).choices[0].token_ids
    plain = ids()
    expect(plain[0] not in ids(logit_bias={str(plain[0]): -100}), "a token came though its bias is -100")
    expect(ids(logit_bias={str(plain[5]): 100}) == [plain[5]] * 60, "another token came though one's bias is 100")
    expect(ids(max_tokens=6, logit_bias={str(plain[5]): 100}, frequency_penalty=2) == [plain[5]] * 6, "a penalty of 12 outweighed a bias of 100")
    different = lambda **more: len(set(ids(temperature=2, seed=1, max_tokens=300, extra_body={"ignore_eos": True}, **more)))
    for field in ("presence_penalty", "frequency_penalty"):
        few, many = different(**{field: -2}), different(**{field: 2})
        expect(few < many, f"{field} -2 gave {few} different tokens and 2 gave {many}")
    expect(ids(frequency_penalty=0, presence_penalty=0, extra_body={"repetition_penalty": 1}) == plain, "penalties that are none changed the answer")
    expect(ids(extra_body={"repetition_penalty": 3}) != plain, "repetition_penalty changed nothing")
    last = plain[-1]
    expect(last == 1 and len(plain) < 60, f"the answer has no end within 60 tokens: {plain}")
    longer = ids(extra_body={"min_tokens": len(plain) + 3})
    expect(longer[: len(plain) - 1] == plain[:-1] and last not in longer[: len(plain) + 2], "min_tokens let the answer end")
    expect(ids(extra_body={"stop_token_ids": [plain[4]]}) == plain[: plain.index(plain[4]) + 1], "a stop token did not end the answer")


def logprobs(client, model):
    create = client.chat.completions.create
    wishes = dict(model=model, messages=QUESTION, temperature=0, logprobs=True, top_logprobs=3)
    choice = create(**wishes).choices[0]
    entries = choice.logprobs.content
    expect(len(entries) == create(**wishes).usage.completion_tokens, "not one entry for each token")
    for entry in entries:
        best = entry.top_logprobs[0]
        expect((best.token, best.logprob, best.bytes) == (entry.token, entry.logprob, entry.bytes), f"greedy, and not the most probable: {entry}")
        expect(len(entry.top_logprobs) == 3 and 0 >= best.logprob >= entry.top_logprobs[1].logprob, f"not in order: {entry}")
    text = b"".join(bytes(entry.bytes) for entry in entries).decode()
    expect(choice.message.content in text and choice.message.reasoning_content in text, f"{text!r} is not the answer")
    streamed = [entry for chunk in create(stream=True, **wishes) for one in chunk.choices if one.logprobs for entry in one.logprobs.content]
    expect(streamed == entries, "streamed and whole log-probabilities differ")
    expect(create(model=model, messages=QUESTION, max_tokens=2).choices[0].logprobs is None, "log-probabilities that nobody asked for")

    wishes = dict(model=model, prompt="What is 46 + 37?", max_tokens=12, seed=3, logprobs=2)
    choice = client.completions.create(**wishes).choices[0]
    found = choice.logprobs
    expect(len(found.tokens) == len(found.token_logprobs) == len(found.top_logprobs) == len(found.text_offset), f"of different lengths: {found}")
    for token, logprob, top, offset in zip(found.tokens, found.token_logprobs, found.top_logprobs, found.text_offset):
        expect(2 <= len(top) <= 3 and top[token] == logprob, f"{token!r} is not among {top}")
        expect(choice.text[offset:].startswith(token) or token.startswith(("<｜", "bytes:")), f"{token!r} is not at {offset} of {choice.text!r}")
    streamed = [one.logprobs for chunk in client.completions.create(stream=True, **wishes) for one in chunk.choices if one.logprobs]
    expect([token for part in streamed for token in part.tokens] == found.tokens, "streamed and whole tokens differ")
    expect([at for part in streamed for at in part.text_offset] == found.text_offset, "streamed and whole offsets differ")


def completions(client, model):
    wishes = dict(model=model, prompt=["The capital of", "One"], max_tokens=8, temperature=0)
    whole = {choice.index: choice.text for choice in client.completions.create(**wishes).choices}
    streamed = {}
    for chunk in client.completions.create(stream=True, **wishes):
        for choice in chunk.choices:
            streamed[choice.index] = streamed.get(choice.index, "") + choice.text
    expect(len(whole) == 2 and streamed == whole, f"streamed {streamed}, whole {whole}")


def errors(client, model):
    create = client.chat.completions.create
    expect_error(openai.NotFoundError, "model_not_found", lambda: create(model="nobody", messages=QUESTION))
    expect_error(openai.NotFoundError, "model_not_found", lambda: client.models.retrieve("nobody"))
    error = expect_error(openai.BadRequestError, None, lambda: create(model=model, messages=QUESTION, temperature=-1))
    expect(error.param == "temperature", f"temperature -1 is blamed on {error.param}")
    for wish in (dict(logit_bias={"x": 1}), dict(frequency_penalty=3), dict(presence_penalty=-3), dict(logprobs=True, top_logprobs=21), dict(top_logprobs=1)):
        error = expect_error(openai.BadRequestError, None, lambda: create(model=model, messages=QUESTION, **wish))
        expect(error.param == list(wish)[-1], f"{wish} is blamed on {error.param}")
    for wish in (dict(regex="a+"), dict(typical_p=0.5), dict(min_new_tokens=4), dict(options={"num_predict": 3})):
        error = expect_error(openai.BadRequestError, None, lambda: create(model=model, messages=QUESTION, extra_body=wish))
        expect(error.param == list(wish)[0], f"{wish} is blamed on {error.param}")
    tools = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
    error = expect_error(openai.BadRequestError, None, lambda: create(model=model, messages=QUESTION, tools=tools))
    expect(error.param == "tools", f"tools are blamed on {error.param}")
    long = [{"role": "user", "content": "one " * 100_000}]
    expect_error(openai.BadRequestError, "context_length_exceeded", lambda: create(model=model, messages=long))


def keys(client, model):
    """Where keys are asked for, another one is not enough."""
    if client.api_key == NO_KEY:
        return
    other = client.with_options(api_key="em-other")
    expect_error(openai.AuthenticationError, "invalid_api_key", lambda: other.models.list())
    expect_error(openai.AuthenticationError, "invalid_api_key", lambda: other.chat.completions.create(model=model, messages=QUESTION))


def main():
    base_url, model = sys.argv[1:]
    client = openai.OpenAI(base_url=base_url, api_key=os.environ.get("OPENAI_API_KEY", NO_KEY), max_retries=0, timeout=60)
    for check in (keys, models, chats, seeds, sampled, logprobs, completions, errors):
        try:
            check(client, model)
        except Exception as error:
            print(f"{check.__name__}: {type(error).__name__}: {error}", file=sys.stderr)
            return 1
        print(f"{check.__name__}: ok")
    return 0


if __name__ == "__main__":
    sys.exit(main())
