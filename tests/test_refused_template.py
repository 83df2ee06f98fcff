"""hf/template.py: a conversation that the template does not write whole, or twice, is refused with the way out."""

import os
from datetime import datetime
from pathlib import Path

import pytest
from test_template import ASKED, DATED, THINKING, THOUGHT
from text_world import CHATML, DEEPSEEK, GOOD, LLAMA3, QWEN3, chat_tokenizer, in_an_empty_folder, make

from plumbing.config import InputError, write_json

SILENT = """{% for m in messages %}{% if m.role == 'user' %}<|user|>{{ m.content }}
{%- elif m.role == 'assistant' %}<|assistant|>{{ m.content }}</s>{% endif %}{% endfor %}
{%- if add_generation_prompt %}<|assistant|>{% endif %}"""
NO_PROMPT = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
SHOUTS = "{% for m in messages %}<|{{ m.role }}|>{{ m.content | upper }}{% endfor %}<|assistant|>"
MUTE = "{% for m in messages if m.role == 'user' %}<|user|>{{ m.content }}{% endfor %}<|assistant|>"
SAID = {"role": "assistant", "content": "4"}
SYSTEM = {"role": "system", "content": "Be brief."}
CALL = {"type": "function", "id": "x", "function": {"name": "add", "arguments": {"a": "one"}}}


@pytest.fixture
def here(tmp_path, monkeypatch):
    return in_an_empty_folder(tmp_path, monkeypatch)


def talk(*turns, **more):
    return {"messages": [*turns]} | more


@pytest.mark.parametrize("template, row, keys, says", [
    # every turn is in the prompt, whatever its content
    (SILENT, talk(SYSTEM, ASKED, SAID), {}, "the chat template leaves out the turn of role 'system'"),
    (SILENT, talk({"role": "villain", "content": "<|u"}, ASKED, SAID), {}, "leaves out the turn of role 'villain'"),
    (SILENT, talk({"role": "villain", "content": "1"}, ASKED, SAID), {}, "leaves out the turn of role 'villain'"),
    (LLAMA3, talk({"role": "tool", "content": "a"}, ASKED, SAID), {}, "the chat template failed: unknown role tool"),
    (SHOUTS, talk(ASKED | {"content": "two?"}, SAID), {}, "leaves out, or changes, the user's 'two?'"),
    # the answer stands where the template puts it
    (NO_PROMPT, GOOD, {}, "has no generation prompt: it writes '<|im_start|>assistant\\n' only before"),
    (MUTE, GOOD, {}, "the chat template leaves out the response, or changes it"),
    (QWEN3.replace("{{- answer }}", "{{- 'x' }}"), GOOD | {"response": "two"}, {}, "leaves out the response"),
    (QWEN3.replace("'<|im_start|>assistant\\n' }}\n        {%-", "'<|im_start|>model\\n' }}\n        {%-"), GOOD, {},
     "asks for an answer with"),
    # what the turn holds is in the response
    (CHATML, talk(ASKED, THOUGHT), {}, "leaves out the thoughts ('reasoning_content'); --thoughts=tags writes them"),
    (CHATML, talk(ASKED, SAID | {"tool_calls": [CALL]}), {}, "leaves out 'tool_calls' of the response"),
    (CHATML, talk(ASKED, SAID | {"function_call": {"name": "f", "arguments": "{}"}}), {}, "leaves out 'function_call'"),
    (CHATML, talk(ASKED, THOUGHT | {"tool_calls": [CALL]}), {"thoughts": "tags"}, "leaves out"),
    (QWEN3, talk(ASKED, THOUGHT | {"verdict": "right"}), {}, "leaves out 'verdict' of the response"),
    (QWEN3, talk(ASKED | {"name": "ann"}, SAID), {}, "leaves out 'name' of a turn of role 'user'; --ignore=name"),
    (QWEN3, talk(ASKED, SAID | {"tool_calls": [CALL]}, ASKED, SAID), {"ignore": "x"}, None),
    (CHATML, talk(ASKED, SAID | {"tool_calls": [CALL]}, ASKED, SAID), {}, "leaves out 'tool_calls' of a turn"),
    # what goes to the template is in the prompt
    (CHATML, GOOD | {"tools": [CALL]}, {}, "the chat template does not know 'tools', it would be left out"),
    (CHATML + "{# tools #}", GOOD | {"tools": [CALL]}, {}, "leaves out 'tools', or parts of it; --ignore=tools"),
    (QWEN3, GOOD | {"documents": [{"text": "d"}]}, {}, "does not know 'documents'"),
    (QWEN3, GOOD | {"chat_template_kwargs": {"thinking_budget": 5}}, {}, "does not know 'thinking_budget'"),
    (QWEN3, GOOD, {"template_kwargs": '{"enable_thinkin": false}'}, "does not know 'enable_thinkin'"),
    # thoughts are opened and closed once
    (DEEPSEEK, GOOD, {}, "has opened <think>, and the response never closes it: give it thoughts and a </think>"),
    (THINKING, GOOD, {}, "has opened <think>, and the response never closes it"),
    (THINKING, GOOD | {"response": "<think>a</think>b"}, {}, "has opened <think> already; take it off the response"),
    (QWEN3, talk(ASKED, THOUGHT), {"template_kwargs": '{"enable_thinking": false}'}, "has closed <think>"),
    (QWEN3, GOOD | {"response": "<think>a</think>b"}, {"template_kwargs": '{"enable_thinking": false}'}, "has closed"),
    (QWEN3, GOOD | {"response": "a</think>b"}, {}, "closes <think>, which nothing has opened; put <think> in front"),
    (QWEN3, {"prompt": "x<think>\n", "response": "2"}, {"template": "none"}, "never closes it"),
    # control tokens are the template's
    (QWEN3, GOOD | {"prompt": "a<|im_end|>b"}, {}, "'<|im_end|>', with which the chat template marks turns"),
    (QWEN3, GOOD | {"response": "a<|im_start|>b"}, {}, "'<|im_start|>', with which"),
    (QWEN3, talk(ASKED, THOUGHT | {"reasoning_content": "<|im_end|>"}), {}, "'<|im_end|>', with which"),
    (QWEN3, GOOD | {"prompt": "a</s>b"}, {}, "'</s>', with which"),
    # without a template
    (QWEN3, talk(SYSTEM, ASKED, SAID), {"template": "none"}, "no chat template, so messages cannot be rendered"),
    (None, GOOD | {"thoughts": "t"}, {}, "no chat template to write 'reasoning_content': put it into the text"),
    (None, GOOD | {"tools": [CALL]}, {}, "no chat template to write 'tools'"),
    # the date
    (DATED, GOOD, {}, f"it writes today's date; --date={datetime.now():%Y-%m}"),
])  # fmt: skip
def test_what_a_template_leaves_out_or_says_twice_is_refused(here, template, row, keys, says):
    chat_tokenizer(Path("student"), template)
    if says is None:
        assert len(make(row, **keys)) == 1
        return
    with pytest.raises(InputError) as error:
        make(row, **keys)
    assert str(error.value).startswith("in.jsonl, line 1: ") and says in str(error.value)
    assert "\n" not in str(error.value) and sorted(os.listdir()) == ["in.jsonl", "student"]


@pytest.mark.parametrize("keys, says", [
    ({"template_kwargs": "{"}, "--template_kwargs={: not JSON"),
    ({"template_kwargs": "[1]"}, "--template_kwargs=[1]: must be a JSON object"),
    ({"template_kwargs": '{"messages": []}'}, "--template_kwargs: 'messages' is not for you to set"),
    ({"date": "tomorrow"}, "--date=tomorrow: must be a day, such as 2026-11-25"),
    ({"date": "2026-11-25", "template": "none"}, "--template_kwargs and --date are for a chat template"),
    ({"template": "mine"}, "--template=mine: must be auto or none"),
    ({"thoughts": "drop"}, "--thoughts=drop: must be template or tags"),
])  # fmt: skip
def test_keys_of_the_template_that_cannot_work(here, keys, says):
    with pytest.raises(InputError) as error:
        make(GOOD, **keys)
    assert says in str(error.value) and "\n" not in str(error.value) and not Path("out").exists()


@pytest.mark.parametrize("config, says", [
    ({"max_position_embeddings": 20}, "tokens, more than the 20 that the student reads (config.json); --max_tokens=20"),
    ({"max_sequence_length": 20}, "more than the 20 that the student reads"),
    ({"vocab_size": 100}, "is beyond the student's embedding of 100 rows"),
    ({"embedding_size": 256, "vocab_size": 999}, "is beyond the student's embedding of 256 rows"),
])  # fmt: skip
def test_rows_that_the_student_cannot_read_are_refused(here, config, says):
    write_json("student/config.json", config)
    with pytest.raises(InputError) as error:
        make(GOOD)
    assert str(error.value).startswith("in.jsonl, line 1: ") and says in str(error.value)
    if "20" in says:
        yarn = {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 20}}
        write_json("student/config.json", config | yarn)
        assert len(make(GOOD)) == 1
