"""data.py: bad input costs nothing: one line that names file, line and mend, and no half-written folder."""

import json
import os
from pathlib import Path

import pytest
from text_world import (
    DEEPSEEK,
    GOOD,
    LLAMA3,
    chat_tokenizer,
    ids_of,
    in_an_empty_folder,
    make,
    talk,
    without,
    write_lines,
)

import data
from plumbing.config import InputError


@pytest.fixture
def here(tmp_path, monkeypatch):
    return in_an_empty_folder(tmp_path, monkeypatch)


@pytest.mark.parametrize("line, says", [
    (b'{"prompt": "1+1?", "respon', "not JSON (Unterminated string starting at: line 1 column 20"),
    (b'{"prompt": "a", "response": "b"', "not JSON"),
    (b'{"prompt": "a", "response": "b"} {}', "not JSON (Extra data"),
    (b"prompt", "not JSON"),
    (b'{"prompt": "a", "response": "\xff"}', "not UTF-8"),
    (b'\xef\xbb\xbf{"prompt": "a", "response": "b"}', "not JSON"),  # a mark in the middle of the file
    (json.dumps(GOOD).encode("utf-16"), "not UTF-8"),
    (b'{"prompt": "a", "response": "\\ud83d"}', "half of a character, a lone surrogate"),
    (b'{"prompt": "a", "response": "b", "id": "\\ud83d"}', "half of a character, a lone surrogate"),
    (b'{"prompt": "a", "response": "b", "answer": NaN}', "not JSON"),
    (b'{"prompt": "a", "response": "b", "answer": -Infinity}', "not JSON"),
    (b'{"prompt": "a", "response": "b", "answer": ' + b"9" * 5000 + b"}", "not JSON"),
    (b"[" * 100_000, "not JSON"),
    (b"[1]", "not an object but list"), (b'"a"', "not an object but str"), (b"null", "not an object but NoneType"),
    (GOOD, "the id 'a' was in line 1 already"),
    (without("id", id=1), "the id '1' was in line 2 already"),
    (without("id", id=1.5), '"id" is of type float'), (without("id", id=True), '"id" is of type bool'),
    (without(prompt=3), '"prompt" is of type int'), (without(prompt=["a"]), '"prompt" is of type list'),
    (without(response={"a": 1}), '"response" is of type dict'), (without(answer=[1]), '"answer" is of type list'),
    (without(answer=False), '"answer" is of type bool'),
    (without("prompt", messages="hi"), '"messages" is of type str'),
    (without("prompt"), 'needs either "prompt" or "messages"'), ({}, 'needs either "prompt" or "messages"'),
    (without(messages=[]), 'needs either "prompt" or "messages"'), (without(prompt=None), "needs either"),
    (without(prompt=""), "no prompt, or an empty one"), (without(prompt=" \n"), "no prompt, or an empty one"),
    (without(response=""), "no response, or an empty one"), (without(response=" \n"), "no response, or an empty one"),
    (without("response"), "no response, or an empty one"), (without(response=None), "no response"),
    (without("prompt", messages=[]), '"messages" is empty'),
    (without("prompt", messages=["hi"]), '"messages" must be objects with "role" and "content"'),
    (without("prompt", messages=[{"role": "user"}]), '"messages" must be objects'),
    (without("prompt", messages=[{"role": "user", "content": {"type": "text", "text": "hi"}}]), "both texts"),
    (talk("user"), "no response, or an empty one"),
    (talk("user", "assistant", "user"), "no response, or an empty one"),
    (talk("assistant"), "no prompt, or an empty one"),
    (talk("user", "assistant", "assistant"), '"messages" must end before the response'),
    (talk("user", "assistant", response="r"), '"messages" must end before the response'),
    (talk("user", response=""), "no response, or an empty one"),
    ({"question": "q"}, '"answer" must end in #### and the number'),
    ({"question": "q", "answer": "12"}, '"answer" must end in #### and the number'),
    ({"question": "q", "answer": "a ####  "}, '"answer" must end in #### and the number'),
    ({"question": 3, "answer": "a #### 1"}, '"question" is of type int'),
    ({"question": None, "answer": "a #### 1"}, "no prompt, or an empty one"),
    ({"question": "", "answer": "a #### 1"}, "no prompt, or an empty one"),
    ({"question": "q", "answer": 12}, '"answer" must end in ####'),
    ({"question": "q", "answer": "#### 1", "prompt": "p", "response": "r", "messages": []}, "needs either"),
])  # fmt: skip
def test_a_bad_line_is_named_and_nothing_is_written(here, line, says):
    source = write_lines(GOOD, without("id"), b"", line, GOOD)  # the second has the id 2, unless it is asked for 1
    if "'1'" in says:
        source = write_lines(GOOD, without(id="1"), b"", line)
    with pytest.raises(InputError) as error:
        data.main(source=source, tokenizer="student", out="out")
    assert str(error.value).startswith(f"in.jsonl, line 4: {says}") or "in.jsonl, line 4: " in str(error.value)[:20]
    assert says in str(error.value) and "\n" not in str(error.value)
    assert sorted(os.listdir()) == ["in.jsonl", "student"]


def test_a_bad_line_leaves_an_older_folder_alone(here):
    before = make(GOOD)
    with pytest.raises(InputError, match="line 2"):
        make(GOOD, b"{")
    after = data.load("out")
    assert after.sha256 == before.sha256 and sorted(os.listdir()) == ["in.jsonl", "out", "student"]


def test_a_response_that_opens_thoughts_again_is_refused(here):
    chat_tokenizer(Path("student"), DEEPSEEK)
    made = make(GOOD | {"response": "hm\n</think>\n\n2"})
    assert made.prompt(0).tolist() == ids_of("<s><|user|>1+1?<|assistant|><think>\n")
    with pytest.raises(InputError, match="line 1: the chat template has opened <think> already"):
        make(GOOD | {"response": "<think>\nhm\n</think>\n\n2"})


def test_a_template_that_fails_on_an_example_names_its_line(here):
    chat_tokenizer(Path("student"), LLAMA3)
    with pytest.raises(InputError, match="line 2: student: the chat template failed: unknown role tool"):
        make(GOOD, {"messages": [{"role": "user", "content": "a"}, {"role": "tool", "content": "b"}], "response": "r"})


@pytest.mark.parametrize("keys, says", [
    ({"source": ""}, "--source is missing"), ({"tokenizer": ""}, "--tokenizer is missing"), ({"out": ""}, "--out is"),
    ({"source": "absent.jsonl"}, "absent.jsonl: no such file"),
    ({"source": "student"}, "student: a folder, not a jsonl"),
    ({"verifier": "mine"}, "--verifier=mine: must be boxed or gsm8k"), ({"max_tokens": -1}, "--max_tokens=-1"),
    ({"out": "student"}, "student: holds other things (no meta.json)"), ({"out": "."}, "it cannot replace"),
    ({"out": "in.jsonl"}, "in.jsonl: a folder will be written here"), ({"tokenizer": "endless"}, "names no eos_token"),
    ({"out": "in.jsonl/x"}, "cannot be written"),
])  # fmt: skip
def test_keys_that_cannot_work(here, keys, says):
    chat_tokenizer(Path("endless"), eos_token=None)
    given = {"source": write_lines(GOOD), "tokenizer": "student", "out": "out"} | keys
    before = sorted(os.listdir("student"))
    with pytest.raises(InputError) as error:
        data.main(**given)
    assert says in str(error.value) and "\n" not in str(error.value)
    assert sorted(os.listdir()) == ["endless", "in.jsonl", "student"] and sorted(os.listdir("student")) == before


# ---------------------------------------------------------------------------------------------------------------------
# Damaged folders

@pytest.mark.parametrize("name", ["tokens.bin", "spans.npy", "examples.jsonl"])
def test_damaged_files_are_refused(here, name):
    make(GOOD, GOOD | {"id": "b"})
    path = Path("out", name)
    whole = path.read_bytes()
    for damaged in (whole[:-1], whole + b"\n", whole[:-5] + bytes([whole[-5] ^ 1]) + whole[-4:], b""):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match=f"out: sha256_{path.stem} is not what meta.json says"):
            data.load("out")
    path.unlink()
    with pytest.raises(InputError, match=f"{name}: missing; run data.py again"):
        data.load("out")
    path.write_bytes(whole)
    assert len(data.load("out")) == 2


def test_a_folder_without_a_good_meta_json_is_refused(here):
    make(GOOD)
    for content, says in (("{", "not JSON"), ("[]", "not a JSON object"), ("{}", "not written by data.py")):
        Path("out/meta.json").write_text(content)
        with pytest.raises(InputError, match=f"meta.json: {says}"):
            data.load("out")
    Path("out/meta.json").unlink()
    with pytest.raises(InputError, match="meta.json: no such file"):
        data.load("out")
    with pytest.raises(InputError, match="absent: no such folder; make it with python data.py"):
        data.load("absent")
