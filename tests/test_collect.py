"""collect.py: from a teacher's sampled answers to one right trace a prompt."""

import json
from collections import Counter
from pathlib import Path

import pytest
from asking import lines
from test_engine import serving

import collect
import data
from plumbing.config import InputError, read_json

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def in_tmp(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    prompts = [{"id": f"p{i}", "prompt": f"{i}+1?", "answer": str(i + 1)} for i in range(6)]
    Path("prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))


def answers(path, by_prompt):
    """{prompt: [response]} -> a file of answers; a response that ends in ... was cut off."""
    with open(path, "w") as file:
        for name, several in by_prompt.items():
            for k, text in enumerate(several):
                row = {"id": name, "sample": k, "response": text, "truncated": text.endswith("...")}
                file.write(json.dumps(row) + "\n")
    return path


def test_one_right_trace_a_prompt_is_drawn_and_the_rest_is_reported(capsys):
    path = answers("r1.jsonl", {
        "p0": ["so 1", "it is 1", "2"], "p1": ["3", "nothing"], "p2": ["3..."], "p3": ["<think>4"], "p4": ["hence 5"],
    })  # fmt: skip
    collect.main(source="prompts.jsonl", out="traces.jsonl", samples_from=path)
    rows = lines("traces.jsonl")
    assert [row["id"] for row in rows] == ["p0", "p4"]
    assert rows[0]["response"] in ("so 1", "it is 1") and rows[1]["response"] == "hence 5"
    report = read_json("traces.jsonl.report.json")
    assert report["teachers"]["r1"] == {
        "answers": {"right": 3, "wrong": 2, "unparsed": 1, "truncated": 1, "unclosed": 1}, "traces": 2
    }  # fmt: skip
    assert report["dropped"] == {
        "p1": {"wrong": 1, "unparsed": 1}, "p2": {"truncated": 1}, "p3": {"unclosed": 1}, "p5": {"no answer": 1}
    }  # fmt: skip
    assert "prompts: 6; dropped, as no answer was right: 4" in capsys.readouterr().out
    data.main(source="traces.jsonl", tokenizer=str(ROOT / "students/toy-1"), out="traces", verifier="integer")
    assert [example["answer"] for example in data.load("traces").examples] == ["1", "5"]


def test_the_draw_is_uniform_and_a_function_of_the_seed():
    prompts = [collect.Prompt("a", [], "1")]
    right = {"t": {"a": ["x", "y", "z"]}}
    drawn = [collect.draw(prompts, right, seed)["a"][1] for seed in range(600)]
    assert drawn == [collect.draw(prompts, right, seed)["a"][1] for seed in range(600)]
    assert all(150 < n < 250 for n in Counter(drawn).values()) and len(set(drawn)) == 3


def test_several_teachers_give_equally_many_traces_as_far_as_they_can():
    prompts = [collect.Prompt(f"p{i}", [], "1") for i in range(30)]
    everywhere = {f"p{i}": ["x"] for i in range(30)}
    drawn = collect.draw(prompts, {"a": everywhere, "b": everywhere, "c": everywhere}, 0)
    shares = Counter(teacher for teacher, _ in drawn.values())
    assert shares == {"a": 10, "b": 10, "c": 10}
    few = {"p3": ["x"], "p4": ["x"]}
    shares = Counter(t for t, _ in collect.draw(prompts, {"a": everywhere, "few": few}, 0).values())
    assert shares.total() == 30 and shares["few"] >= 1


def test_thoughts_that_the_template_opened_are_made_whole():
    path = answers("r1.jsonl", {"p0": ["0 and 1</think>1"], "p1": ["1 and 1 is 2"]})
    collect.main(source="prompts.jsonl", out="traces.jsonl", samples_from=f"R1={path}")
    assert [row["response"] for row in lines("traces.jsonl")] == ["<think>\n0 and 1</think>1"]
    assert lines("traces.jsonl")[0]["teacher"] == "R1"


def test_a_server_is_the_teacher_and_a_killed_collection_goes_on():
    with serving(None, None, 400) as server:
        keys = dict(source="prompts.jsonl", out="traces.jsonl", server=server.url, samples=1, batch_size=1, retries=0)
        with pytest.raises(InputError, match="HTTP 400"):
            collect.main(**keys)
        with open("traces.jsonl.samples.jsonl", "a") as file:
            file.write('{"id": "p5", "sam')  # half a line, of a kill
        collect.main(**keys)
        assert len(server.asked) == 3 + 4
        with pytest.raises(InputError, match="sampled with other keys"):
            collect.main(**keys, temperature=0.1)
    # it answers with the length of the messages: the same for all, right for one
    assert len(lines("traces.jsonl.samples.jsonl")) == 6 and len(lines("traces.jsonl")) == 1


def test_our_own_sampler_is_the_teacher():
    prompts = [{"id": "a", "prompt": "3+5*2?", "answer": "6"}]
    Path("toy.jsonl").write_text(json.dumps(prompts[0]) + "\n")
    model = str(ROOT / "students/toy-1")
    keys = dict(source="toy.jsonl", out="t.jsonl", model=model, samples=2, max_new_tokens=20, verifier="toy")
    try:
        collect.main(**keys)
    except InputError as error:
        assert "no prompt has a right trace" in str(error)
    assert [row["sample"] for row in sorted(lines("t.jsonl.samples.jsonl"), key=lambda r: r["sample"])] == [0, 1]


@pytest.mark.parametrize(
    "row, says",
    [
        ({"prompt": "1+1?"}, 'line 1: no "answer"'),
        ({"answer": "2"}, 'line 1: no "prompt", "messages" or "question"'),
        ({"prompt": "1+1?", "answer": ""}, 'line 1: "answer" is empty'),
        ({"messages": [], "answer": "2"}, 'line 1: "messages" is empty'),
    ],
)
def test_a_prompt_that_cannot_be_graded_is_refused(row, says):
    Path("bad.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(InputError, match=says):
        collect.main(source="bad.jsonl", out="t.jsonl", samples_from="r1.jsonl")


@pytest.mark.parametrize(
    "keys, says",
    [
        (dict(), "--source is missing"),
        (dict(source="prompts.jsonl", out="t"), "give one of --samples_from, --server and --model"),
        (dict(source="prompts.jsonl", out="t", samples_from="none.jsonl"), "none.jsonl: cannot be read"),
        (dict(source="prompts.jsonl", out="t", samples_from="a/x=r,x=s"), "x is named twice|cannot be read"),
    ],
)
def test_keys_that_do_not_fit_are_refused(keys, says):
    with pytest.raises(InputError, match=says):
        collect.main(**keys)
