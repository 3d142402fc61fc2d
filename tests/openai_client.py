"""Drives a frontend with the unmodified `openai` package: whole and streamed answers are the same, errors are the client's own classes.

    target/venv/bin/python tests/openai_client.py BASE_URL MODEL        exit code 0: all as expected

BASE_URL is the frontend's address with /v1, as in http://127.0.0.1:8000/v1.
"""
import sys

import openai

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
    stopped, _, end = chat(client, model, temperature=0, stop=["13,"])[0]
    expect(thought.startswith(stopped) and "13," not in stopped and end == "stop", f"stopped by {end} after {stopped!r}")
    expect(chat(client, model, seed=7) == chat(client, model, seed=7), "the same seed gave other tokens")
    several = chat(client, model, seed=7, n=3)
    expect(len(several) == 3, f"{len(several)} choices of 3")
    expect(several[1] == chat(client, model, seed=8)[0], "choice 1 is not what seed + 1 gives")


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
    tools = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
    error = expect_error(openai.BadRequestError, None, lambda: create(model=model, messages=QUESTION, tools=tools))
    expect(error.param == "tools", f"tools are blamed on {error.param}")
    long = [{"role": "user", "content": "one " * 100_000}]
    expect_error(openai.BadRequestError, "context_length_exceeded", lambda: create(model=model, messages=long))


def main():
    base_url, model = sys.argv[1:]
    client = openai.OpenAI(base_url=base_url, api_key="none", max_retries=0, timeout=60)
    for check in (models, chats, completions, errors):
        try:
            check(client, model)
        except Exception as error:
            print(f"{check.__name__}: {type(error).__name__}: {error}", file=sys.stderr)
            return 1
        print(f"{check.__name__}: ok")
    return 0


if __name__ == "__main__":
    sys.exit(main())
