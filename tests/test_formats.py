"""formats.py: rows as people publish them become a prompt, thoughts, a response and an answer; nothing is dropped."""

import gzip
import json
import re
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from text_world import in_an_empty_folder, make, write_lines

import data
from formats import read_examples
from plumbing.config import InputError

ROOT = Path(__file__).parent.parent
THOUGHT = "<think>\n2 and 2.\n</think>\n\n"
SKY = (
    "<|begin_of_thought|>\n\n2 and 2.\n\n<|end_of_thought|>\n\n"
    "<|begin_of_solution|>\n\n\\boxed{4}\n\n<|end_of_solution|>"
)
ASKED = {"role": "user", "content": "2+2?"}
# Columns as published (docs/DATA.md has the same list), a row of each in our words; the keys of the command; and what
# the student is to read and to write: the last user's turn, the response as Qwen3's template writes it, the answer.
LAYOUTS = {
    "simplescaling/s1K-1.1": (
        {"solution": "4", "question": "2+2?", "cot_type": "math", "source_type": "x", "metadata": "{}",
         "gemini_thinking_trajectory": "Two twos.", "gemini_attempt": "So \\boxed{4}.",
         "deepseek_thinking_trajectory": "2 and 2.", "deepseek_attempt": "\\boxed{4}", "gemini_grade": "Yes",
         "gemini_grade_reason": "r", "deepseek_grade": "Yes", "deepseek_grade_reason": "r"},
        {}, "2+2?", THOUGHT + "\\boxed{4}", "4"),
    "simplescaling/s1K": (
        {"solution": "It is $\\boxed{4}$.", "question": "2+2?", "cot_type": "math", "source_type": "x",
         "metadata": "{}", "cot": None, "thinking_trajectories": ["2 and 2."], "attempt": "\\boxed{4}"},
        {}, "2+2?", THOUGHT + "\\boxed{4}", "4"),
    "GAIR/LIMO": (
        {"question": "2+2?", "solution": "Okay, 2 and 2. **Final Answer** \\boxed{4}", "answer": "4"},
        {}, "2+2?", "Okay, 2 and 2. **Final Answer** \\boxed{4}", "4"),
    "open-thoughts/OpenThoughts-114k": (
        {"system": "Think long.", "conversations": [{"from": "user", "value": "2+2?"},
                                                    {"from": "assistant", "value": SKY}]},
        {}, "2+2?", SKY, None),
    "open-thoughts/OpenThoughts-114k, metadata": (
        {"problem": "2+2?", "deepseek_reasoning": "2 and 2.", "deepseek_solution": "\\boxed{4}",
         "ground_truth_solution": "Two twos: $\\boxed{4}$.", "domain": "math", "source": "x", "test_cases": None,
         "starter_code": None},
        {}, "2+2?", THOUGHT + "\\boxed{4}", "4"),
    "open-thoughts/OpenThoughts3-1.2M": (
        {"difficulty": 7, "source": "x", "domain": "math",
         "conversations": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": THOUGHT + "4"}]},
        {}, "2+2?", THOUGHT + "4", None),
    "open-r1/OpenR1-Math-220k": (
        {"problem": "2+2?", "solution": "By counting.", "answer": "4", "problem_type": "Algebra", "question_type": "x",
         "source": "olympiads", "uuid": "u", "is_reasoning_complete": [True, True], "generations": [THOUGHT + "4", "5"],
         "correctness_math_verify": [True, False], "correctness_llama": None, "finish_reasons": None,
         "correctness_count": 1, "messages": [ASKED, {"role": "assistant", "content": THOUGHT + "\\boxed{4}"}]},
        {}, "2+2?", THOUGHT + "\\boxed{4}", "4"),
    "nvidia/OpenMathReasoning": (
        {"expected_answer": "4", "problem_type": "has_answer_extracted", "problem_source": "aops",
         "generation_model": "DeepSeek-R1", "pass_rate_72b_tir": "0.96875", "problem": "2+2?",
         "generated_solution": THOUGHT + "\\boxed{4}", "inference_mode": "cot", "used_in_kaggle": True},
        {}, "2+2?", THOUGHT + "\\boxed{4}", "4"),
    "GeneralReasoning/GeneralThought-195K": (
        {"question_id": 1, "question_url": "u", "question": "2+2?", "reference_answer": "4",
         "prev_messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}],
         "model_name": "m", "model_answer": "\\boxed{4}", "model_reasoning": "2 and 2.", "task": "t",
         "question_license": "MIT", "question_source": "s", "community_answer_score": 0.0,
         "community_question_score": 0, "verifier_score": 1.0},
        {}, "2+2?", THOUGHT + "\\boxed{4}", "4"),
    "FreedomIntelligence/medical-o1-reasoning-SFT": (
        {"Question": "2+2?", "Complex_CoT": "2 and 2.", "Response": "It is 4."},
        {}, "2+2?", THOUGHT + "It is 4.", None),
    "a-m-team/AM-DeepSeek-R1-Distilled-1.4M": (
        {"messages": [ASKED | {"info": {"source": "x", "reference_answer": "4"}},
                      {"role": "assistant", "content": THOUGHT + "<answer>4</answer>",
                       "info": {"think_content": "2 and 2.", "answer_content": "4"}}]},
        {"ignore": "info"}, "2+2?", THOUGHT + "<answer>4</answer>", None),
    "umarigan/deepseek-r1-reasoning-prompts": (
        {"id": 3, "question": "2+2?", "answer": "It is 4.", "reasoning": "2 and 2."},
        {"columns": "prompt:question,thoughts:reasoning,response:answer"}, "2+2?", THOUGHT + "It is 4.", None),
    "tatsu-lab/alpaca": (
        {"instruction": "Add.", "input": "2+2?", "output": "4", "text": "Below is an instruction ..."},
        {}, "Add.\n2+2?", "4", None),
    "openai/gsm8k": (
        {"question": "2+2?", "answer": "2+2=<<2+2=4>>4\n#### 4"}, {}, "2+2?", "2+2=<<2+2=4>>4\n#### 4", "4"),
}  # fmt: skip


@pytest.fixture
def here(tmp_path, monkeypatch):
    return in_an_empty_folder(tmp_path, monkeypatch)


def student_text(ids):
    return data.load_tokenizer("student").decode(ids)


def read(*rows, **keys):
    return list(read_examples(write_lines(*rows), **keys))


def response_of(row, **keys):
    """What the student is to write for a row, without the end of its turn."""
    made = make(row, **keys)
    return student_text(made.response(0)).removesuffix("<|im_end|>")


@pytest.mark.parametrize("name", LAYOUTS)
def test_published_layouts(here, name):
    row, keys, prompt, response, answer = LAYOUTS[name]
    made = make(row, **keys)
    text = student_text(made.prompt(0))
    assert text.endswith(f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n")
    assert student_text(made.response(0)) == response + "<|im_end|>"
    assert made.examples[0]["answer"] == answer
    if "system" in row:
        assert text.startswith(f"<|im_start|>system\n{row['system']}<|im_end|>")
    if "prev_messages" in row:
        assert "user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>" in text


def test_the_documented_layouts_are_the_tested_ones():
    text = (ROOT / "docs/DATA.md").read_text(encoding="utf-8")
    for name, (row, keys, *_) in LAYOUTS.items():
        line = next(line for line in text.splitlines() if line.startswith(f"| {name} |"))
        assert set(re.findall(r"`(\w+)`", line.split("|")[2])) == row.keys(), name
        assert all(f"--{key}={value}" in line for key, value in keys.items()), name


def test_two_teachers_are_told_apart_by_columns(here):
    row, *_ = LAYOUTS["simplescaling/s1K-1.1"]
    keys = {"columns": "prompt:question,thoughts:gemini_thinking_trajectory,response:gemini_attempt"}
    assert response_of(row, **keys) == "<think>\nTwo twos.\n</think>\n\nSo \\boxed{4}."


# ---------------------------------------------------------------------------------------------------------------------
# Thoughts and other parts of a turn

SAID = {"role": "assistant", "content": "4"}


@pytest.mark.parametrize("turn", [
    *({key: "2 and 2."} for key in ("reasoning_content", "reasoning", "thinking", "thoughts", "thought")),
    {"reasoning_content": "2 and 2.", "reasoning": None},
    {"reasoning_content": "2 and 2.", "reasoning": "2 and 2."},
    {"content": [{"type": "thinking", "thinking": "2 and 2."}, {"type": "text", "text": "4"}]},
    {"content": [{"type": "reasoning", "text": "2 and 2."}, {"type": "text", "text": "4", "annotations": None}]},
    {"content": THOUGHT + "4"},
    {"content": "<think>\n2 and 2.\n</think>\n\n4<|im_end|>\n"},
])  # fmt: skip
def test_thoughts_under_whichever_name_are_learnt(here, turn):
    """The fault that this guards against: training on the bare answer."""
    assert response_of({"messages": [ASKED, SAID | turn]}) == THOUGHT + "4"


@pytest.mark.parametrize("row", [
    {"prompt": "2+2?", "reasoning_content": "2 and 2.", "response": "4"},
    {"prompt": "2+2?", "reasoning": "2 and 2.", "completion": "4"},
    {"prompt": [ASKED], "completion": [SAID | {"reasoning_content": "2 and 2."}]},
    {"messages": [ASKED], "thinking": "2 and 2.", "response": "4"},
    {"messages": [ASKED, SAID], "reasoning": "2 and 2."},
    {"instruction": "2+2?", "input": "", "output": "4", "cot": "2 and 2."},
    {"question": "2+2?", "response": THOUGHT + "4", "thoughts": "2 and 2."},
    {"question": "2+2?", "response": THOUGHT + "4", "rationale": "Something else."},
    {"input": "2+2?", "output": THOUGHT + "4", "reasoning": "on", "system_prompt": ""},
])  # fmt: skip
def test_thoughts_in_a_column_of_their_own_are_learnt_once(here, row):
    assert response_of(row) == THOUGHT + "4"


def test_calls_of_tools_are_learnt_and_tools_are_read(here):
    call = {"type": "function", "id": "c1", "function": {"name": "add", "arguments": {"a": 2, "b": "two"}}}
    tools = [{"type": "function", "function": {"name": "add", "description": "Adds."}}]
    turn = {"role": "assistant", "content": None, "tool_calls": [call], "reasoning_content": "2 and 2."}
    row = {"messages": [ASKED, turn], "tools": json.dumps(tools)}
    made = make(row)
    assert response_of(row) == THOUGHT + "\n<tool_call>\n" + json.dumps(call["function"]) + "\n</tool_call>"
    assert json.dumps(tools) in student_text(made.prompt(0))
    again = [*row["messages"], {"role": "tool", "content": "4", "tool_call_id": "c1", "name": "add"}]
    answered = {"messages": [*again, SAID]}
    assert "tool\n4<|im_end|>" in student_text(make(answered).prompt(0))


def test_only_the_last_turn_is_learnt_and_weights_may_say_so(here, capsys):
    turns = [ASKED, SAID | {"weight": 0}, ASKED | {"content": "3+3?"}, SAID | {"content": "6", "train": True}]
    made = make({"messages": turns, "weight": 1})
    assert student_text(made.response(0)) == "6<|im_end|>" and made.meta["counts"]["earlier_answers"] == 1
    assert "conversations with earlier answers, which are read but not learnt: 1" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------------------------
# What a row says


def test_explicit_columns_win_over_guesses_and_null_ones_do_not_exist(here):
    row = {"question": "2+2?", "answer": "2+2=4\n#### 4", "messages": [ASKED, SAID | {"content": "It is 4."}]}
    example, other = read(row, {"prompt": "a", "messages": None, "response": "b", "completion": None, "answer": None})
    assert example.turn["content"] == "It is 4." and example.answer == "4" and not example.is_gsm8k
    assert other.messages == [{"role": "user", "content": "a"}] and other.answer is None
    row = {"prompt": "a", "question": "q", "response": "r", "output": "o", "solution": "s", "answer": "4"}
    unread = {}
    (example,) = read(row, unread=unread)
    assert example.messages[0]["content"] == "a" and example.turn["content"] == "r" and example.answer == "4"
    assert unread == {"question": 1, "output": 1, "solution": 1}


def test_a_prompt_beside_the_messages_that_repeats_them_is_fine(here):
    (example,) = read({"prompt": "2+2?", "prompt_id": "x", "messages": [ASKED, SAID]})
    assert example.messages == [ASKED]


def test_columns_in_front_of_the_question(here):
    row = {"system": "Be brief.", "history": [["1+1?", "2"]], "instruction": "2+2?", "output": "4"}
    (example,) = read(row)
    assert [turn["content"] for turn in example.messages] == ["Be brief.", "1+1?", "2", "2+2?"]
    assert [turn["role"] for turn in example.messages] == ["system", "user", "assistant", "user"]
    (example,) = read({"system": "s", "messages": [{"role": "system", "content": "s"}, ASKED, SAID]})
    assert len(example.messages) == 2


def test_content_parts_are_one_text_and_names_of_roles_are_ours(here):
    parts = [{"type": "text", "text": "2"}, {"type": "text", "text": "+2?"}]
    row = {"conversations": [{"from": "human", "value": parts}, {"from": "gpt", "value": "4"}]}
    (example,) = read(row)
    assert example.messages == [ASKED] and example.turn == SAID


def test_an_evaluation_set_without_solutions(here):
    row = {"question": "2+2?", "answer": 4}
    (example,) = read(row, columns={"prompt": "question", "response": "answer", "answer": "answer"})
    assert example.turn["content"] == "4" and example.answer == "4"


def test_columns_that_are_not_read_are_listed_once(here, capsys):
    make({"prompt": "a", "response": "b", "source": "x"}, {"prompt": "c", "response": "d", "source": "y", "grade": 1})
    assert "columns not read, with the number of rows that have them: grade (1), source (2)" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------------------------
# Files


def test_the_same_rows_in_every_kind_of_file(here):
    talk = [ASKED, SAID]
    rows = [{"id": "a", "messages": talk, "answer": "4"}, {"id": "b", "messages": talk, "answer": None}]
    lines = "\n".join(map(json.dumps, rows)).encode()
    Path("in.jsonl").write_bytes(lines)
    Path("in.jsonl.gz").write_bytes(gzip.compress(lines))
    Path("in.json").write_text("\ufeff \n" + json.dumps(rows, indent=2), encoding="utf-8")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), "in.parquet")
    found = []
    for name in ("in.jsonl", "in.jsonl.gz", "in.json", "in.parquet"):
        data.main(source=name, tokenizer="student", out="out")
        made = data.load("out")
        found.append((made.sha256, made.examples))
    assert found[1:] == found[:1] * 3 and len(found[0][1]) == 2


def test_parquets_nan_is_null(here):
    rows = [{"prompt": "a", "response": "b", "answer": float("nan")}, {"prompt": "c", "response": "4", "answer": 4.0}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), "in.parquet")
    assert [example.answer for example in read_examples("in.parquet")] == [None, "4.0"]


def test_parquet_without_pyarrow_says_what_to_install(here, monkeypatch):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"prompt": "a", "response": "b"}]), "in.parquet")
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(InputError, match="in.parquet: a parquet file; pip install pyarrow, or write it as jsonl"):
        list(read_examples("in.parquet"))
