"""data.py: every form of a line becomes prompt, response and answer; the arrays on disk are what their hashes say."""

import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pytest
from text_world import (
    GOOD,
    ID,
    LLAMA3,
    NAMES,
    QWEN3,
    added,
    chat_tokenizer,
    ids_of,
    in_an_empty_folder,
    make,
)

import data
from hf import tokenizer as tokenizer_file
from plumbing import tally
from plumbing.config import InputError, read_json, write_json


@pytest.fixture
def here(tmp_path, monkeypatch):
    return in_an_empty_folder(tmp_path, monkeypatch)


def test_every_form_of_a_line_becomes_prompt_and_response(here, capsys):
    say = "<|im_start|>{}\n{}<|im_end|>\n".format
    ask = "<|im_start|>assistant\n"
    system, user, assistant = (lambda text, role=role: {"role": role, "content": text}
                               for role in ("system", "user", "assistant"))  # fmt: skip
    cases = [
        ({"id": "a", "prompt": "1+1?", "response": "<think>\nx</think>2", "answer": 2, "more": [1]},
         say("user", "1+1?") + ask, "<think>\nx</think>2", "a", "2"),
        ({"prompt": "é\u2028<|im", "response": " 3 ", "id": None}, say("user", "é\u2028<|im") + ask, " 3 ", "2", None),
        ({"id": 7, "messages": [system("s"), user("u")], "response": "r", "answer": "x"},
         say("system", "s") + say("user", "u") + ask, "r", "7", "x"),
        ({"messages": [user("u"), assistant("<think>t</think>v"), user("w"), assistant("r")], "answer": 1.5},
         say("user", "u") + say("assistant", "v") + say("user", "w") + ask, "r", "4", "1.5"),
        ({"question": "How many?", "answer": "1,000 + 1.\n#### 1,001"}, say("user", "How many?") + ask,
         "1,000 + 1.\n#### 1,001", "5", "1001"),
    ]  # fmt: skip
    made = make(*(line for line, *_ in cases))
    expected, spans = [], []
    for i, (_, prompt, response, name, answer) in enumerate(cases):
        prompt, response = ids_of(prompt), ids_of(response) + [ID["<|im_end|>"]]
        assert made.prompt(i).tolist() == prompt and made.response(i).tolist() == response
        assert made.examples[i] == {"id": name, "answer": answer}
        spans.append([len(expected), len(expected) + len(prompt), len(expected) + len(prompt) + len(response)])
        expected += prompt + response
    assert len(made) == 5 and made.spans.tolist() == spans and made.spans.dtype == np.int64
    assert np.fromfile("out/tokens.bin", dtype="<u4").tolist() == expected and made.tokens.dtype == np.uint32
    assert made.response_mask().tolist() == [any(p <= i < e for _, p, e in spans) for i in range(len(expected))]
    assert sorted(os.listdir("out")) == ["examples.jsonl", "meta.json", "spans.npy", "tokens.bin"]
    assert {k: v for k, v in made.meta.items() if "sha256" not in k} == {
        "n_examples": 5, "n_tokens": len(expected), "too_long": 0, "max_tokens": 0, "verifier": "auto",
        "source": "in.jsonl", "tokenizer": "student",
        "tokenizer_hash": tokenizer_file.load_tokenizer("student").hash,
        "template_hash": hashlib.sha256(QWEN3.encode()).hexdigest(), "template_kwargs": {}, "date": "",
        "counts": dict.fromkeys(tally.COUNTED, 0) | {"with_thoughts": 1, "without_thoughts": 4, "with_answer": 4,
                                                    "graded_right": 2, "earlier_answers": 1},
        "command": ["data.py", "--some=key"]}  # fmt: skip
    said = capsys.readouterr().out
    assert f"out: 5 examples, {len(expected):,} tokens" in said and "assistant\n|<think>" in said


def test_lines_that_look_odd_but_are_fine(here):
    made = make(b"\xef\xbb\xbf" + json.dumps(GOOD).encode() + b"\r", b"", b"  ", GOOD | {"id": "b"})
    assert [e["id"] for e in made.examples] == ["a", "b"]
    Path("in.jsonl").write_bytes(json.dumps(GOOD).encode())  # no line feed at the end
    data.main(source="in.jsonl", tokenizer="student", out="out")
    assert len(data.load("out")) == 1


def test_too_long_examples_are_counted_and_told(here, capsys):
    lines = [GOOD | {"id": i, "response": "x" * n} for i, n in enumerate((5, 6, 7, 50))]
    prompt = len(ids_of("<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n"))
    made = make(*lines, max_tokens=prompt + 6 + 1)
    assert [e["id"] for e in made.examples] == ["0", "1"] and made.meta["too_long"] == 2
    assert f"left out as longer than {prompt + 7}: 2" in capsys.readouterr().out
    with pytest.raises(InputError, match=r"in.jsonl: no usable example \(4 longer than 3 tokens\)"):
        make(*lines, max_tokens=3, out="none")
    with pytest.raises(InputError, match=r"no usable example \(0 longer"):
        make(b"", out="none")
    assert not Path("none").exists()


def test_gsm8k_lines_are_read_by_auto_and_an_explicit_verifier_wins(here):
    gsm8k = {"question": "q", "answer": "a #### 1"}
    assert make(gsm8k).meta["verifier"] == "auto" and make(gsm8k, verifier="gsm8k").meta["verifier"] == "gsm8k"
    assert make(gsm8k, verifier="boxed").meta["verifier"] == "boxed"


def test_two_runs_give_the_same_bytes(here):
    lines = [GOOD | {"id": i, "prompt": f"{i}?"} for i in range(20)]
    first, second = make(*lines, out="one"), make(*lines, out="two")
    for name in os.listdir("one"):
        assert Path("one", name).read_bytes() == Path("two", name).read_bytes()
    assert first.sha256 == second.sha256
    assert make(*lines[::-1], out="two").sha256 != first.sha256
    write_json("student/tokenizer_config.json", read_json("student/tokenizer_config.json") | {"chat_template": LLAMA3})
    assert make(*lines, out="two").sha256 != first.sha256  # other tokens
    chat_tokenizer(Path("student"), QWEN3)
    spec_now = read_json("student/tokenizer.json")
    spec_now["added_tokens"].append(added(256 + len(NAMES), "<never>"))
    write_json("student/tokenizer.json", spec_now)
    again = make(*lines, out="two")
    assert again.meta["sha256_tokens"] == first.meta["sha256_tokens"] and again.sha256 != first.sha256
