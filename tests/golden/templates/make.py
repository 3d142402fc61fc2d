"""Records what Jinja makes of the templates beside this file, set up as transformers sets it up.

    pip install jinja2==3.1.6
    python make.py >golden.json

A list of {template, context, rendered}, or {template, context, raised} where the template refuses the conversation. The clock stands at
2026-01-02 03:04:05. The templates have the shapes of published ones (DeepSeek V2, R1 and V3.1, Qwen3, Mixtral, OLMoE) and are none of them;
features.jinja is a line for each thing that templates use here and there.
"""
import json
import sys
from datetime import datetime
from pathlib import Path

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

HERE = Path(__file__).parent
TOKENS = {"bos_token": "<｜begin▁of▁sentence｜>", "eos_token": "<｜end▁of▁sentence｜>"}
TOOL = {"type": "function", "function": {"name": "add", "description": " Adds <two> numbers & says 'é'. ", "parameters": {"type": "object", "properties": {"b": {"type": "number"}, "a": {"type": "number"}}, "required": ["b", "a"]}}}


class Generation(Extension):
    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("body"), [], [], body).set_lineno(line)

    def body(self, caller):
        return caller()


def raise_exception(message):
    raise jinja2.exceptions.TemplateError(message)


def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def environment():
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda format: datetime(2026, 1, 2, 3, 4, 5).strftime(format)
    return environment


def say(role, content, **more):
    return {"role": role, "content": content, **more}


def call(name, arguments):
    return {"id": "c1", "type": "function", "function": {"name": name, "arguments": arguments}}


CONVERSATIONS = {
    "short": [say("user", "What is 46 + 37?")],
    "system": [say("system", "Be brief.\n"), say("user", "  Hi {{ there }} <b>&'é' 🦀\n")],
    "turns": [say("user", "One?"), say("assistant", "<think>\nhm\n</think>\n\nTwo. "), say("user", "Three?"), say("assistant", "Four.")],
    "thoughts": [say("user", "One?"), say("assistant", "\n\nTwo.", reasoning_content="\nhm\n"), say("user", "And?"), say("assistant", "<think>a</think>b</think>c")],
    "tools": [say("system", "Use tools."), say("user", "2 + 3?"), say("assistant", "", tool_calls=[call("add", {"b": 3, "a": 2}), call("add", {"a": "é<>", "n": None})]), say("tool", "5"), say("tool", "{\"x\": 6}"), say("assistant", "It is 5."), say("user", "Thanks")],
    "waiting": [say("user", "2 + 3?"), say("assistant", "Let me see.", tool_calls=[call("add", "{\"a\": 2}")]), say("tool", "5")],
    "wrong": [say("assistant", "I begin."), say("critic", "No.")],
    "words": [say("user", "The cat sat, on a mat. banana"), say("assistant", "ok"), say("user", " a big blue banana ba ", name="me")],
}


def cases():
    for template in ("deepseek_v2", "deepseek_r1", "deepseek_v31", "qwen3", "mixtral", "olmoe"):
        for name, messages in CONVERSATIONS.items():
            for open in (True, False):
                yield template, dict(messages=messages, add_generation_prompt=open, tools=[TOOL] if name == "tools" else None)
    for flags in ({"thinking": True}, {"thinking": False}):
        yield "deepseek_v31", dict(messages=CONVERSATIONS["thoughts"][:3], add_generation_prompt=True, tools=None, **flags)
    for flags in ({"enable_thinking": True}, {"enable_thinking": False}):
        yield "qwen3", dict(messages=CONVERSATIONS["short"], add_generation_prompt=True, tools=None, **flags)
    for name in ("words", "turns"):
        yield "features", dict(messages=CONVERSATIONS[name], add_generation_prompt=True, tools=None)


def main():
    jinja, golden = environment(), []
    for template, context in cases():
        context = {"documents": None, **TOKENS, **context}
        case = {"template": template, "context": context}
        compiled = jinja.from_string((HERE / f"{template}.jinja").read_text(encoding="utf-8"))
        try:
            case["rendered"] = compiled.render(**context)
        except jinja2.exceptions.TemplateError as error:
            case["raised"] = str(error)
        golden.append(case)
    json.dump(golden, sys.stdout, ensure_ascii=True, indent=None, separators=(",", ":"))


main()
