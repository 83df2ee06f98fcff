"""plumbing/engine.py: files and servers of other engines; a small server on this machine plays one."""

import json
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from asking import lines

import eval as evaluation
from plumbing import engine
from plumbing.config import InputError

IDS = {"p1", "p2", "p-7"}


def write(*rows):
    Path("s.jsonl").write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return "s.jsonl"


def choices(*texts, reason="stop"):
    made = [{"index": i, "message": {"content": text}, "finish_reason": reason} for i, text in enumerate(texts)]
    return {"choices": made, "usage": {"completion_tokens": 9}}


@pytest.fixture(autouse=True)
def in_tmp(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_a_batch_output_is_read():
    path = write(
        {"custom_id": "p1/0", "response": {"status_code": 200, "body": choices("so 5")}, "error": None},
        {"custom_id": "p1/1", "response": {"status_code": 200, "body": choices("so 6", reason="length")}},
        {"custom_id": "p-7", "response": {"status_code": 200, "body": choices("a", "b")}},
        {"custom_id": "p2-3", "response": {"status_code": 500, "body": {}}},
        {"custom_id": "p2", "response": None, "error": {"message": "lost"}},
    )
    found = engine.read_samples(path, IDS)
    assert [(a["id"], a["sample"], a["response"], a["truncated"], a["n_tokens"]) for a in found] == [
        ("p1", 0, "so 5", False, 9),
        ("p1", 1, "so 6", True, 9),
        ("p-7", 0, "a", False, None),  # usage counts both together
        ("p-7", 1, "b", False, None),
    ]


def test_plain_responses_and_our_own_rows_are_read():
    path = write(
        {"id": "p1", "choices": [{"text": "5", "finish_reason": "stop"}]},
        {"id": "p1", "choices": [{"text": "6", "finish_reason": "stop"}]},
        {"id": "p2", "sample": 4, "response": "7", "truncated": True, "n_tokens": 3},
    )
    found = engine.read_samples(path, IDS)
    assert [(a["id"], a["sample"], a["response"]) for a in found] == [("p1", 0, "5"), ("p1", 1, "6"), ("p2", 4, "7")]


@pytest.mark.parametrize(
    "content, reason, expected",
    [
        ("5", "stop", "<think>\nhm\n</think>\n\n5"),
        (None, "length", "<think>\nhm"),  # cut off in its thoughts
    ],
)
def test_thoughts_that_the_engine_took_out_are_put_back(content, reason, expected):
    message = {"content": content, "reasoning_content": "hm"}
    [answer] = engine.read_choices({"choices": [{"message": message, "finish_reason": reason}]})
    assert answer["response"] == expected


@pytest.mark.parametrize(
    "rows, says",
    [
        ([], "holds no answer"),
        (["\n"], "holds no answer"),
        (['{"id": "p1", "respo'], "line 1: not JSON"),
        (["[1]"], "line 1: not an object but list"),
        ([{"response": "5"}], 'line 1: no "custom_id" or "id"'),
        ([{"id": "p9", "response": "5"}], "line 1: no problem of the data has the id 'p9'"),
        ([{"id": "p1", "sample": 0, "response": "5"}] * 2, "line 2: sample 0 of problem p1 was in line 1 already"),
        ([{"id": "p1", "choices": []}], 'line 1: no "choices"'),
        ([{"id": "p1", "sample": -1, "response": "5"}], '"sample" must be'),
        ([{"id": "p1", "choices": [{"message": {"content": [1]}}]}], "is not a text"),
        ([{"custom_id": "p1", "error": {"code": 1}}], "holds no answer"),
    ],
)
def test_what_is_no_file_of_answers_is_refused_with_its_line(rows, says):
    with pytest.raises(InputError) as error:
        engine.read_samples(write(*rows), IDS)
    assert says in str(error.value) and "\n" not in str(error.value)


# --------------------------------------------------------------------------------------------------
# A server that answers `> n`, with n the number of characters it was asked with, after some trouble


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_GET(self):  # noqa: N802
        self.send({"data": [{"id": name} for name in self.server.names]})

    def do_POST(self):  # noqa: N802
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.asked.append((self.path, body))
            trouble = self.server.trouble.pop(0) if self.server.trouble else None
        if trouble == "slow":
            time.sleep(1.5)
        if trouble == "half":
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b'{"choices": [{"text": "5')
            self.close_connection = True
        elif isinstance(trouble, int):
            self.send({"error": "out of order"}, trouble)
        else:
            prompt = body.get("prompt", body.get("messages"))
            text = f"> {sum(prompt) % 10}" if isinstance(prompt[0], int) else f"> {len(str(prompt)) % 6 + 1}"
            kind = {"text": text} if "prompt" in body else {"message": {"content": text}}
            self.send({"choices": [kind | {"finish_reason": "stop"}], "usage": {"completion_tokens": 2}})

    def send(self, value, status=200):
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        try:
            self.wfile.write(data)
        except BrokenPipeError:
            pass  # who waited has given up


@contextmanager
def serving(*trouble, names=("small",)):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.names = names
    server.trouble = list(trouble)
    server.asked = []
    server.lock = threading.Lock()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    server.url = f"http://127.0.0.1:{server.server_port}/v1"
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


def test_a_request_is_tried_again_after_whatever_may_pass():
    with serving(500, "half", "slow", 429) as server:
        client = engine.Server(server.url, timeout=0.7, pause=0.01)
        [answer] = client.complete("completions", {"prompt": [1, 2]})
    assert answer["response"] == "> 3" and len(server.asked) == 5


def test_a_server_that_stays_broken_ends_in_one_line():
    with serving(*[500] * 9) as server:
        with pytest.raises(InputError, match="3 attempts failed, the last with HTTP 500 .*out of order"):
            engine.Server(server.url, retries=2, pause=0.01).complete("completions", {"prompt": [1]})
        assert len(server.asked) == 3
    with pytest.raises(InputError, match="attempts failed"):
        engine.Server(server.url, retries=1, pause=0.01).models()


def test_a_wrong_request_is_not_tried_again():
    with serving(404) as server:
        with pytest.raises(InputError, match="HTTP 404"):
            engine.Server(server.url).complete("completions", {"prompt": [1]})
        assert len(server.asked) == 1


def test_each_sample_has_a_seed_of_its_own():
    seeds = {engine.seed_of(seed, f"p{i} {k}") for seed in (0, 1) for i in range(9) for k in range(9)}
    assert len(seeds) == 162 and max(seeds) < 2**31


# --------------------------------------------------------------------------------------------------
# eval.py with the answers of another engine


def test_a_server_answers_for_a_checkpoint_and_goes_on_after_a_failure(toy_runs):
    with serving(names=("a", "b")) as server:
        with pytest.raises(InputError, match="serves a, b; name one with --served"):
            evaluation.main(run="sft", server=server.url, limit=2)
    with serving(None, None, None, 400) as server:  # the fourth answer fails for good
        with pytest.raises(InputError, match="HTTP 400"):
            evaluation.main(run="sft", server=server.url, limit=4, batch_size=1, served="small")
        done = evaluation.main(run="sft", server=server.url, limit=4, batch_size=1, served="small")["sft"][1]
    bodies = [body for path, body in server.asked if path == "/v1/completions"]
    assert len(bodies) == 4 * 2 + 1 and len({body["seed"] for body in bodies}) == 8
    assert {body["max_tokens"] for body in bodies} == {40} and bodies[0]["model"] == "small"
    assert all(row["response"].startswith(">") and row["n_tokens"] == 2 for row in done)
    assert len(done) == 8

    # the same answers from a batch's file give the same table
    with open("batch.jsonl", "w") as file:
        for row in lines("runs/sft/eval/unseen-000004.jsonl"):
            body = choices(row["response"]) | {"usage": {"completion_tokens": 2}}
            name = f"{row['id']}/{row['sample']}"
            file.write(json.dumps({"custom_id": name, "response": {"status_code": 200, "body": body}}) + "\n")
    [(summary, rows)] = evaluation.main(data="data/toy-1/unseen", samples_from="other=batch.jsonl", limit=4).values()
    assert rows == done
    assert lines("runs/other/eval/unseen.jsonl") == done


def test_files_are_rows_of_the_table_beside_runs(toy_runs, capsys):
    own = evaluation.main(run="sft", limit=3)["sft"][1]
    write(*own)
    results = evaluation.main(run="sft", samples_from="again=s.jsonl", limit=3)
    assert results["again"][1] == own
    assert "again - sft: +0.000" in capsys.readouterr().out


@pytest.mark.parametrize(
    "keys, says",
    [
        (dict(samples=5), "--samples=5: problem .* has only 2"),
        (dict(limit=0), "9 of 12 problems have no answer"),
    ],
)
def test_too_few_samples_are_refused(toy_runs, keys, says):
    write(*evaluation.main(run="sft", limit=3)["sft"][1])
    with pytest.raises(InputError, match=says):
        evaluation.main(**{"data": "data/toy-1/unseen", "samples_from": "s.jsonl", "limit": 3} | keys)
