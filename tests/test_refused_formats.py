"""formats.py: what a row says and cannot be honoured, or could mean two things, is one line with the way out."""

import gzip
import json
import os
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from text_world import GOOD, in_an_empty_folder, make, without, write_lines

import data
from formats import read_examples
from plumbing.config import InputError

ASKED = {"role": "user", "content": "2+2?"}
SAID = {"role": "assistant", "content": "4"}


@pytest.fixture
def here(tmp_path, monkeypatch):
    return in_an_empty_folder(tmp_path, monkeypatch)


def turns(*more, last=None):
    return {"messages": [ASKED | (more[0] if more else {}), SAID | (last or {})]}


@pytest.mark.parametrize("row, says", [
    # two columns for one thing
    ({"question": "q", "problem": "p", "response": "r"}, "question and problem: which of them is the prompt?"),
    ({"prompt": "p", "output": "a", "completion": "b"}, "completion and output: which of them is the response?"),
    ({"prompt": "p", "response": "r", "cot": "a", "thoughts": "b"}, "thoughts and cot: which of them are the"),
    ({"messages": [ASKED, SAID], "conversations": [ASKED, SAID]}, "messages and conversations: which of them?"),
    ({"prompt": "p", "response": "r", "expected_answer": "1", "ground_truth": "2"}, "which of them is the answer?"),
    ({"prompt": "another", "messages": [ASKED, SAID]}, 'needs either "prompt" or "messages", not both'),
    # nothing for one thing: what there is, and the conversion
    ({"question": "q", "answer": "42"}, "columns found: question, answer); name them, as in --columns="),
    ({"question": "q", "answer": "42"}, "for row in rows: print(json.dumps({"),
    ({"text": "all in one"}, 'no prompt, or an empty one: needs either "prompt" or "messages" (columns found: text'),
    ({"input_ids": [1, 2], "attention_mask": [1, 1]}, "columns found: input_ids, attention_mask"),
    ({"prompt": "p", "chosen": "a", "rejected": "b"}, "no response, or an empty one (columns found: prompt, chosen"),
    ({"problem": "p", "generations": ["a", "b"]}, '"generations" holds 2 texts: write a line for the one'),
    ({"question": "q", "attempt": [], "thinking_trajectories": ["t"]}, '"attempt" holds 0 texts'),
    # what cannot be honoured
    (GOOD | {"images": ["x.png"]}, '"images": only text can be learnt; --ignore=images leaves it out'),
    (GOOD | {"weight": 0.5}, '"weight" is 0.5, but all examples count the same here'),
    (GOOD | {"train": False}, '"train" is False'),
    (GOOD | {"functions": [{"name": "f"}]}, '"functions": call it "tools"'),
    (GOOD | {"label": False}, '"label" is false: a response that is not to be imitated'),
    (GOOD | {"loss_mask": [0, 1]}, '"loss_mask": which tokens to learn is chosen by select.py'),
    (GOOD | {"labels": [-100, 5]}, '"labels": which tokens to learn is chosen by select.py'),
    (turns({"weight": 1}), 'an earlier turn has "weight": 1, but only the last turn is learnt'),
    (turns({"train": True}), 'an earlier turn has "train": True, but only the last turn is learnt'),
    (turns(last={"weight": 0}), 'the last turn has "weight": 0: nothing to learn'),
    (turns(last={"train": False}), 'the last turn has "train": False: nothing to learn'),
    (turns(last={"loss_weight": 0.3}), '"loss_weight": 0.3; only 0, 1, false and true are understood'),
    (turns(last={"train_detail": [{"begin_offset": 0}]}), "the chat template leaves out 'train_detail'"),
    (turns({"content": [{"type": "image_url", "image_url": {"url": "x"}}]}), "a content part of type 'image_url'"),
    (turns({"content": [{"type": "text", "text": "a", "image": "x"}]}), "a content part of type 'text' with image"),
    (turns({"content": [3]}), "a content part is of type int"),
    (turns(last={"reasoning": "a", "thinking": "b"}), "one turn has its thoughts under two names, and they differ"),
    (turns(last={"reasoning_content": ["a"]}), '"reasoning_content" is of type list'),
    (turns(last={"content": "", "reasoning_content": "a"}), "no response, or an empty one"),
    (GOOD | {"system": "s", "prompt": [{"role": "system", "content": "t"}, ASKED]}, "two different system prompts"),
    (GOOD | {"history": ["a"]}, '"history" must be a list of [question, answer]'),
    (GOOD | {"tools": "[{"}, '"tools": not JSON'), (GOOD | {"tools": {"a": 1}}, '"tools" is of type dict, not list'),
    (GOOD | {"chat_template_kwargs": [1]}, '"chat_template_kwargs" is of type list, not dict'),
    (b'{"prompt": "a", "response": "b", "response": "c"}', "the key 'response' stands there twice"),
])  # fmt: skip
def test_a_row_is_refused_and_nothing_is_written(here, row, says):
    with pytest.raises(InputError) as error:
        make({"prompt": "a", "response": "b"}, row)
    assert str(error.value).startswith("in.jsonl, line 2: ") and says in str(error.value)
    assert "\n" not in str(error.value) and sorted(os.listdir()) == ["in.jsonl", "student"]


@pytest.mark.parametrize("row, keys", [
    (GOOD | {"images": ["x.png"]}, "images"), (GOOD | {"weight": 0.5}, "weight"), (turns({"weight": 1}), "weight"),
    (turns({"name": "ann"}, last={"info": {"a": "b"}}), "name,info"),
])  # fmt: skip
def test_what_is_to_be_ignored_is_named(here, row, keys):
    with pytest.raises(InputError):
        make(row)
    assert len(make(row, ignore=keys)) == 1


@pytest.mark.parametrize("columns, says", [
    ("prompt", "must be kind:column,..., each kind once, of messages, prompt, thoughts, response, answer, id"),
    ("prompt:", "must be kind:column"), ("question:q", "must be kind:column"), ("prompt:a,prompt:b", "each kind once"),
    ("prompt:absent", "line 1: --columns=prompt:absent: this row has no such column, or it is null (columns found: id"),
])  # fmt: skip
def test_columns_that_cannot_be_meant(here, columns, says):
    with pytest.raises(InputError) as error:
        make(GOOD, columns=columns)
    assert says in str(error.value) and "\n" not in str(error.value)


def test_damaged_files_are_named(here):
    whole = gzip.compress(json.dumps(GOOD).encode() * 50)
    Path("cut.gz").write_bytes(whole[:-20])
    Path("cut.json").write_text('[{"prompt": "a"')
    Path("list.json").write_text('[{"prompt": "a", "response": "b"}, 3]')
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([without()]), "in.parquet")
    Path("cut.parquet").write_bytes(Path("in.parquet").read_bytes()[:-30])
    for name, says in (
        ("cut.gz", "cut.gz: a damaged gzip file"),
        ("cut.json", "cut.json: not JSON"),
        ("list.json", "list.json, item 2: not an object but int"),
        ("cut.parquet", "cut.parquet: a damaged parquet file"),
    ):
        with pytest.raises(InputError) as error:
            data.main(source=name, tokenizer="student", out="out")
        assert says in str(error.value) and "\n" not in str(error.value) and not Path("out").exists()


def test_ids_that_repeat_are_named_with_their_rows(here):
    rows = write_lines(GOOD, without("id"), GOOD)
    with pytest.raises(InputError, match="line 3: the id 'a' was in line 1 already; --ignore=id numbers"):
        list(read_examples(rows))
    assert [example.id for example in read_examples(rows, ignore=["id"])] == ["1", "2", "3"]
