"""Answers of an inference engine (vLLM, SGLang, llama.cpp): from its files, or asked over HTTP.

    read_samples("answers.jsonl", ids)                  what the engine wrote: OpenAI's batch format and its like
    Server("http://localhost:8000/v1").complete(body)   one request, tried again until it succeeds

An answer is {"id", "sample", "response", "truncated", "n_tokens"}; n_tokens is None where nobody counted.
Standard library only. Next: plumbing/answers.py.
"""

import hashlib
import http.client
import json
import os
import re
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from urllib.parse import urlsplit

from plumbing.config import InputError

# --------------------------------------------------------------------------------------------------
# Files of answers


def read_samples(path, known):
    """A jsonl file of answers -> a list of answers, in the order of the file.

    A line is one of
        {"custom_id", "response": {"body": {"choices": [...]}}, "error"}    a batch's output
        {"id" or "custom_id", "choices": [...], "usage"}                    a response as the server sent it
        {"id", "sample", "response", ...}                                   as eval.py writes it

    known: the ids of the problems. custom_id is such an id, or an id with the number of the sample
    behind it (problem-7/3, problem-7-3, ...). Raises InputError with file and line for an id that
    is unknown, for two answers with the same number, and for what is no answer at all. Requests
    that failed in the engine are left out.
    """
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({error})") from None
    answers = []
    seen = {}  # (id, sample) -> line
    used = {}  # id -> how many answers without a number of their own there were
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        for answer in read_answers(line, where, known):
            if answer["sample"] is None:
                answer["sample"] = used.get(answer["id"], 0)
                used[answer["id"]] = answer["sample"] + 1
            key = answer["id"], answer["sample"]
            if key in seen:
                raise InputError(
                    f"{where}: sample {key[1]} of problem {key[0]} was in line {seen[key]} already"
                )
            seen[key] = number
            answers.append(answer)
    if not answers:
        raise InputError(f"{path}: holds no answer")
    return answers


def read_answers(line, where, known):
    """One line -> the answers in it; none for a request that failed."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not JSON ({error})") from None
    if not isinstance(row, dict):
        raise InputError(f"{where}: not an object but {type(row).__name__}")
    name = row.get("custom_id", row.get("id"))
    if not isinstance(name, str | int) or isinstance(name, bool):
        raise InputError(f'{where}: no "custom_id" or "id" that says which problem this answers')
    problem, sample = split_id(str(name), known)
    if problem is None:
        raise InputError(f"{where}: no problem of the data has the id {name!r}")
    response = row.get("response")
    if isinstance(response, str):  # our own
        sample = row.get("sample", sample)
        if sample is not None and (not isinstance(sample, int) or sample < 0):
            raise InputError(f'{where}: "sample" must be a number from 0 on')
        answer = {"id": problem, "sample": sample, "response": response}
        answer["truncated"] = bool(row.get("truncated", False))
        answer["n_tokens"] = row.get("n_tokens")
        return [answer]
    if row.get("error"):
        return []
    if isinstance(response, dict):  # of a batch
        if response.get("status_code", 200) != 200:
            return []
        row = response.get("body")
    try:
        choices = read_choices(row)
    except ValueError as error:
        raise InputError(f"{where}: {error}") from None
    if len(choices) > 1:  # one request for several samples
        first = 0 if sample is None else sample
        return [{"id": problem, "sample": first + i, **choice} for i, choice in enumerate(choices)]
    return [{"id": problem, "sample": sample, **choices[0]}]


def split_id(name, known):
    """The name of an answer -> its problem's id and the number of the sample.

    "problem-7/3" -> ("problem-7", 3); an id that is known as it stands -> (id, None); else (None, None).
    """
    if name in known:
        return name, None
    match = re.fullmatch(r"(.*?)[-_/:# ]*?[-_/:# ]([0-9]{1,9})", name, re.DOTALL)
    if match and match[1] in known:
        return match[1], int(match[2])
    return None, None


def read_choices(body):
    """A response of the server -> [{"response", "truncated", "n_tokens"}]. Raises ValueError if it is none."""
    choices = body.get("choices") if isinstance(body, dict) else None
    if (
        not isinstance(choices, list)
        or not choices
        or not all(isinstance(c, dict) for c in choices)
    ):
        raise ValueError('no "choices"')
    # the engine counts the tokens of all choices together
    usage = body.get("usage") or {}
    tokens = usage.get("completion_tokens") if len(choices) == 1 else None
    found = []
    for choice in sorted(choices, key=lambda choice: choice.get("index", 0)):
        text = choice.get("text")
        if text is None:
            message = choice.get("message") or {}
            text = message.get("content") or ""
            thoughts = message.get("reasoning_content") or message.get("reasoning")
            if not isinstance(text, str):
                raise ValueError("the content of a message is not a text")
            if thoughts:  # what the engine's parser took out; without an end if it was cut off
                cut_off = choice.get("finish_reason") == "length" and not text
                text = f"<think>\n{thoughts}" + ("" if cut_off else f"\n</think>\n\n{text}")
        truncated = choice.get("finish_reason") == "length"
        found.append({"response": text, "truncated": truncated, "n_tokens": tokens})
    return found


# --------------------------------------------------------------------------------------------------
# A server


class Server:
    """An OpenAI-style server. url: up to and with its version, http://localhost:8000/v1.

    What may pass is tried again, `retries` times with growing pauses: no connection, an answer that
    takes longer than `timeout` seconds or breaks off, HTTP 408, 409, 425, 429 and 5xx. All else, a
    wrong model name for one, is an InputError at once. A key is taken from OPENAI_API_KEY.
    """

    def __init__(self, url, timeout=600, retries=8, pause=1.0):
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise InputError(f"--server={url}: must be a URL such as http://localhost:8000/v1")
        self.url = url.rstrip("/")
        self.timeout = timeout
        self.retries = retries
        self.pause = pause
        handlers = []
        if parts.hostname in ("localhost", "127.0.0.1", "::1"):
            # no proxy can reach this machine's own ports
            handlers.append(urllib.request.ProxyHandler({}))
        self.opener = urllib.request.build_opener(*handlers)

    def models(self):
        """The names of the models that it serves."""
        listed = self.request("models", None, lambda body: body["data"])
        return [model["id"] for model in listed]

    def only_model(self):
        """The name of the model, if it serves one alone. Raises InputError otherwise."""
        names = self.models()
        if len(names) != 1:
            raise InputError(
                f"--server={self.url}: serves {', '.join(names) or 'no model'}; name one with --served"
            )
        return names[0]

    def complete(self, path, body):
        """POST body to `path`, completions or chat/completions -> a list of answers without ids."""
        return self.request(path, body, read_choices)

    def request(self, path, body, read):
        url = f"{self.url}/{path}"
        headers = {"Content-Type": "application/json"}
        if os.environ.get("OPENAI_API_KEY"):
            headers["Authorization"] = f"Bearer {os.environ['OPENAI_API_KEY']}"
        data = None if body is None else json.dumps(body).encode()
        wait = 0.0
        for attempt in range(self.retries + 1):
            time.sleep(wait)
            wait = min(60.0, self.pause * 2**attempt)
            try:
                asked = urllib.request.Request(url, data, headers)
                with self.opener.open(asked, timeout=self.timeout) as reply:
                    return read(json.loads(reply.read()))
            except urllib.error.HTTPError as error:
                said = " ".join(error.read(500).decode("utf-8", "replace").split())
                trouble = f"HTTP {error.code} {said}"
                if error.code not in (408, 409, 425, 429) and error.code < 500:
                    raise InputError(f"{url}: {trouble}") from None
                after = error.headers.get("Retry-After", "")
                if after.isdigit():
                    wait = min(600.0, float(after))
            # no connection, too slow, half an answer, or JSON of another kind
            except (OSError, http.client.HTTPException, ValueError, KeyError, TypeError) as error:
                trouble = f"{type(error).__name__}: {error}"
        raise InputError(
            f"{url}: {self.retries + 1} attempts failed, the last with {trouble}; what was answered is kept, "
            "so the same command goes on from there"
        )


def seed_of(seed, name):
    """The seed of one answer: like our own sampler's, a function of (seed, its name) alone."""
    return int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:4], "little") >> 1


def ask_all(server, path, bodies, at_once, finished):
    """Send many requests, `at_once` of them at a time; finished(key, answers) as each one is answered.

    bodies: {key: request body}. After the first failure no more are sent; the answers of those that
    are under way are waited for, and not lost.
    """
    pool = ThreadPoolExecutor(at_once)
    jobs = {pool.submit(server.complete, path, body): key for key, body in bodies.items()}
    waiting = dict(jobs)
    try:
        for job in as_completed(jobs):
            key = waiting.pop(job)
            finished(key, job.result())
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        for job, key in waiting.items():
            if not job.cancelled() and job.exception() is None:
                finished(key, job.result())
