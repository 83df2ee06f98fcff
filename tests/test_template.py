"""hf/template.py: prompt and response are the conversation as transformers renders it, cut where the answer begins."""

import itertools
import json
from pathlib import Path

import pytest
import transformers
from text_world import (
    DEEPSEEK,
    GOOD,
    LLAMA3,
    QWEN3,
    TEMPLATES,
    chat_tokenizer,
    ids_of,
    in_an_empty_folder,
    make,
)

from hf.template import cut
from hf.tokenizer import load_tokenizer

GLM = """{% for m in messages %}<|{{ m.role }}|>
{{ m.content }}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"""
MISTRAL = """{{ bos_token }}{% for m in messages %}
{%- if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %} {{ m.content }}{{ eos_token }}{% endif %}
{%- endfor %}"""
ASKS = "{%- if add_generation_prompt %}\n    {{- '<|im_start|>assistant\\n"
THINKING = QWEN3.replace(ASKS, ASKS + r"<think>\n")
DATED = "{{ strftime_now('%d %B %Y') }}\n" + LLAMA3
DATE_STRING = """{% if not date_string is defined %}{% set date_string = strftime_now('%d') %}{% endif %}
{{- date_string }}
"""
ASKED = {"role": "user", "content": "1+1?"}
THOUGHT = {"role": "assistant", "content": "It is 2.", "reasoning_content": "1, then 2"}


@pytest.fixture
def here(tmp_path, monkeypatch):
    return in_an_empty_folder(tmp_path, monkeypatch)


def transformers_text(folder, template, turns, **more):
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), bos_token="<s>", eos_token="</s>"
    )
    theirs.chat_template = template
    return theirs.apply_chat_template(turns, tokenize=False, **more)


PROMPTS = [
    [ASKED],
    [{"role": "system", "content": "Be brief."}, ASKED],
    [{"role": "user", "content": "a"}, {"role": "assistant", "content": "<think>\nhm\n</think>\n\nb"}, ASKED],
]
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": "one"}}}
ANSWERS = [
    {"role": "assistant", "content": "<think>\n1, then 2\n</think>\n\nIt is 2."},
    THOUGHT,
    THOUGHT | {"content": "I add.", "tool_calls": [CALL]},
]


@pytest.mark.parametrize("template", [QWEN3, THINKING])
@pytest.mark.parametrize("tools", [None, [CALL]])
def test_prompt_and_response_together_begin_the_full_rendering(tmp_path, template, tools):
    """For thoughts in the text, thoughts in a field, and calls of tools."""
    ours = chat_tokenizer(tmp_path, template)
    variables = {"tools": tools} if tools else {}
    for turns, answer in itertools.product(PROMPTS, ANSWERS):
        prompt, response = cut(ours, turns, answer, variables, tags=True)
        full = transformers_text(tmp_path, template, [*turns, answer], **variables)
        assert prompt == transformers_text(tmp_path, template, turns, add_generation_prompt=True, **variables)
        assert full.startswith(prompt + response) and "1, then 2" in response
        assert ours.decode(ours.encode_response(response)) == full[len(prompt) :].rstrip("\n")


@pytest.mark.parametrize("name", sorted(TEMPLATES.keys() - {"tojson", "deepseek"}))
def test_a_plain_text_is_learnt_verbatim_under_every_template(tmp_path, name):
    ours = chat_tokenizer(tmp_path, TEMPLATES[name])
    for content in ("2", " 2 ", "<think>a</think>b", "<think>\n\n</think>\n\nx\n", "a\n\nb", "assistant", "é</s>"[:1]):
        prompt, response = cut(ours, [ASKED], {"role": "assistant", "content": content})
        assert response == content
        assert prompt == transformers_text(tmp_path, TEMPLATES[name], [ASKED], add_generation_prompt=True)


@pytest.mark.parametrize("template, prompt, response", [
    (GLM, "<|user|>\n1+1?<|assistant|>", "\n2"),
    (MISTRAL, "<s>[INST] 1+1? [/INST]", " 2"),
])  # fmt: skip
def test_blanks_that_a_template_writes_before_an_answer_belong_to_it(tmp_path, template, prompt, response):
    ours = chat_tokenizer(tmp_path, template)
    assert cut(ours, [ASKED], {"role": "assistant", "content": "2"}) == (prompt, response)
    full = transformers_text(tmp_path, template, [ASKED, {"role": "assistant", "content": "2"}])
    assert full.startswith(prompt + response)


HARMONY = """{% for m in messages %}{% if m.role == 'assistant' %}
{%- if m.thinking %}<|im_start|>analysis {{ m.thinking }}<|eot_id|>{% endif -%}
<|im_start|>final {{ m.content }}<|im_end|>
{%- else %}<|user|>{{ m.content }}{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"""


def test_what_a_template_writes_behind_its_generation_prompt_is_learnt(tmp_path):
    """gpt-oss': an answer opens with the name of its channel; thoughts are called thinking."""
    harmony = HARMONY.replace("{%- if m.thinking", "<|assistant|>{%- if m.thinking")
    ours = chat_tokenizer(tmp_path, harmony)
    for turn, response in (
        ({"role": "assistant", "content": "2"}, "<|im_start|>final 2"),
        (THOUGHT, "<|im_start|>analysis 1, then 2<|eot_id|><|im_start|>final It is 2.<|im_end|>"),
    ):
        assert cut(ours, [ASKED], turn) == ("<|user|>1+1?<|assistant|>", response)
        named = {"thinking" if key == "reasoning_content" else key: value for key, value in turn.items()}
        full = transformers_text(tmp_path, harmony, [ASKED, named])
        assert full.startswith("<|user|>1+1?<|assistant|>" + response)


def test_empty_thoughts_that_only_the_template_writes_are_told(here, capsys):
    make(GOOD)
    assert "the chat template writes empty thoughts before an answer without any" in capsys.readouterr().out
    make(GOOD, template_kwargs='{"enable_thinking": false}')
    assert "empty thoughts" not in capsys.readouterr().out


def test_thoughts_that_the_template_leaves_out_are_written_as_tags_where_that_is_clear_or_asked_for(tmp_path):
    r1 = chat_tokenizer(tmp_path / "r1", DEEPSEEK)
    assert cut(r1, [ASKED], THOUGHT) == ("<s><|user|>1+1?<|assistant|><think>\n", "1, then 2\n</think>\n\nIt is 2.")
    llama = chat_tokenizer(tmp_path / "llama", LLAMA3)
    _, response = cut(llama, [ASKED], THOUGHT, tags=True)
    assert response == "<think>\n1, then 2\n</think>\n\nIt is 2."


def test_variables_reach_the_template_and_a_rows_own_win(here):
    closed = "<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    made = make(GOOD, template_kwargs='{"enable_thinking": false}')
    assert made.prompt(0).tolist() == ids_of(closed) and made.meta["template_kwargs"] == {"enable_thinking": False}
    made = make(GOOD | {"chat_template_kwargs": {"enable_thinking": False}})
    assert made.prompt(0).tolist() == ids_of(closed)
    thinks = GOOD | {"chat_template_kwargs": {"enable_thinking": True}}
    made = make(thinks, template_kwargs='{"enable_thinking": false}')
    assert made.prompt(0).tolist() == ids_of(closed.removesuffix("<think>\n\n</think>\n\n"))


def test_todays_date_is_the_day_that_was_given(here):
    chat_tokenizer(Path("student"), DATED)
    made = make(GOOD, date="2026-11-25")
    assert made.prompt(0).tolist()[:16] == ids_of("25 November 2026") and made.meta["date"] == "2026-11-25"
    again = make(GOOD, date="2026-11-25", out="again")
    assert again.sha256 == made.sha256 and make(GOOD, date="2026-11-26", out="other").sha256 != made.sha256
    chat_tokenizer(Path("student"), DATE_STRING + LLAMA3)
    made = make(GOOD, template_kwargs='{"date_string": "26 Jul 2024"}')
    assert made.prompt(0).tolist()[:11] == ids_of("26 Jul 2024")


def test_text_that_is_rendered_already(here):
    prompt = "<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n"
    made = make({"prompt": prompt, "response": "2<|im_end|>\n"}, {"prompt": "x", "response": "y</s>"}, template="none")
    assert made.prompt(0).tolist() == ids_of(prompt) and made.response(0).tolist() == ids_of("2<|im_end|>")
    assert made.response(1).tolist() == ids_of("y<|im_end|>")  # one end, the one that the template writes
    assert made.meta["template_hash"] is None
    made = make({"prompt": prompt, "response": "2", "thoughts": "1, then"}, template="none", thoughts="tags")
    assert made.response(0).tolist() == ids_of("<think>\n1, then\n</think>\n\n2<|im_end|>")


def test_bos_of_a_rendered_text_is_not_doubled(tmp_path):
    made = json.loads((chat_tokenizer(tmp_path, LLAMA3).folder / "tokenizer.json").read_text())
    piece = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    made["post_processor"] = {"type": "TemplateProcessing", "single": [piece, {"Sequence": {"id": "A", "type_id": 0}}]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(made))
    ours = load_tokenizer(tmp_path)
    assert ours.encode_bare("<s>hi") == ids_of("<s>hi") == ours.encode_bare("hi")


@pytest.mark.parametrize("response", ["2", "2<|im_end|>", "2<|im_end|>\n", "2</s>", "2<|im_end|>\n</s>\n"])
def test_a_response_ends_once(here, response):
    assert make(GOOD | {"response": response}).response(0).tolist() == ids_of("2<|im_end|>")


# ---------------------------------------------------------------------------------------------------------------------
# Counts


def test_responses_are_counted_by_their_thoughts_and_their_answers(here, capsys):
    rows = [
        {"prompt": "a", "response": "<think>x</think> 2", "answer": "2"},
        {"prompt": "b", "response": "<think>x and x and", "answer": "2"},
        {"prompt": "c", "response": "3", "answer": "2"},
        {"prompt": "c", "response": "3", "answer": "2"},
        {"prompt": "d", "response": "no number"},
    ]
    made = make(*rows)
    counts = made.meta["counts"]
    assert counts["with_thoughts"] == 1 and counts["truncated_thoughts"] == 1 and counts["without_thoughts"] == 3
    assert counts["with_answer"] == 4 and counts["graded_right"] == 1 and counts["duplicates"] == 1
    said = capsys.readouterr().out
    assert "responses with thoughts: 1, without: 3, truncated thoughts: 1" in said and "1 of 4" in said
    assert "examples that are in the file more than once: 1" in said and "warning" not in said
    made = make(*rows, require_correct=True)
    assert [example["id"] for example in made.examples] == ["1"] and made.meta["counts"]["not_correct"] == 4
    assert "1 of 1; left out: 4" in capsys.readouterr().out


def test_a_file_in_which_no_response_is_right_gets_a_warning_with_an_example(here, capsys):
    make({"prompt": "a", "response": "It is \\boxed{3}.", "answer": "4"})
    said = capsys.readouterr().out
    assert "warning: none does" in said and "line 1: the response ends in '3', the answer is '4'" in said
