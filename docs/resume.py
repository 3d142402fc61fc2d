"""Streams a chat, and goes on at any frontend of the deployment where one dies: nothing is lost, nothing comes twice.

    python resume.py MODEL PROMPT URL [URL ...]
"""
import http.client
import itertools
import json
import sys
import time
import urllib.error
import urllib.request


def stream(urls, body, headers):
    """The events of a streamed answer. One URL is enough where it is a Service's."""
    last = {}
    for url in itertools.cycle(urls):
        try:
            request = urllib.request.Request(f"{url}/v1/chat/completions", json.dumps(body).encode(), headers | last)
            with urllib.request.urlopen(request, timeout=120) as lines:
                event = {}
                for line in lines:
                    field, _, value = line.decode().rstrip("\n").partition(": ")
                    event[field] = value
                    if line != b"\n":
                        continue  # an event is whole at an empty line
                    if event.get("data") == "[DONE]":
                        return
                    data = json.loads(event.get("data", "{}"))
                    if "error" in data:
                        break
                    if data:
                        yield data
                    last = {"last-event-id": event["id"]} if "id" in event else last
                    event = {}
        except urllib.error.HTTPError as error:
            if error.code not in (429, 503):
                raise
        except (OSError, http.client.HTTPException):
            pass  # it is gone: the next one goes on
        time.sleep(0.2)


def main(model, prompt, *urls):
    body = {"model": model, "stream": True, "messages": [{"role": "user", "content": prompt}]}
    headers = {"content-type": "application/json", "x-request-id": f"resume-{time.time_ns()}"}
    for event in stream(urls, body, headers):
        for choice in event["choices"]:
            delta = choice["delta"]
            print((delta.get("reasoning_content") or "") + (delta.get("content") or ""), end="", flush=True)
    print()


if __name__ == "__main__":
    main(*sys.argv[1:])
