"""hf/template.py on chat templates as they are published (TRL ships some thirty): refused, or all there."""

import importlib.util
import re
from datetime import datetime
from pathlib import Path

import pytest
import transformers
from text_world import BYTES, added, both, spec

from hf.template import cut, fixed_date
from plumbing.config import InputError

FOLDER = Path(importlib.util.find_spec("trl").origin).parent / "chat_templates"
# left out: those of models that read images, which want content parts, and TRL's own variants for training
NAMES = sorted(
    path.stem for path in FOLDER.glob("*.jinja") if not re.search("_training|_vl|llava|idefics|smolvlm", path.stem)
)
TOKENS = r"<\|[^|<>]+\|>|<｜[^｜]+｜>|<\w+_of_turn>|<\|?turn\|?>|<\|?channel\|?>|\[/?[A-Z_]{3,}\]"


def user(content):
    return {"role": "user", "content": content}


def assistant(content, **more):
    return {"role": "assistant", "content": content} | more


THOUGHT = "<think>\n1, then 2\n</think>\n\n"
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": "one"}}}
CONVERSATIONS = {  # the turns before, the turn to learn
    "plain": ([user("1+1?")], assistant("It is 2.")),
    "system": ([{"role": "system", "content": "Be brief."}, user("1+1?")], assistant("It is 2.")),
    "thoughts in the text": ([user("1+1?")], assistant(THOUGHT + "It is 2.")),
    "thoughts in a field": ([user("1+1?")], assistant("It is 2.", reasoning_content="1, then 2")),
    "earlier thoughts": (
        [user("0+1?"), assistant(THOUGHT.replace("1", "7") + "One."), user("1+1?")],
        assistant("It is 2.", reasoning_content="1, then 2"),
    ),
    "a call": ([user("1+1?")], assistant("I add.", tool_calls=[CALL])),
    "a result": ([user("1+1?"), assistant("", tool_calls=[CALL]), {"role": "tool", "content": "Two"}], assistant("2.")),
    "an unknown role": ([{"role": "villain", "content": "Ha!"}, user("1+1?")], assistant("It is 2.")),
}


def without_blanks(text):
    return re.sub(r"\s", "", text)


@pytest.fixture(scope="module")
def accepted():
    """Counts what was not refused; at the end there must have been enough for the test to mean something."""
    counts = {name: 0 for name in CONVERSATIONS}
    yield counts
    if sum(counts.values()) > 20:  # not where only some of the templates were asked for
        assert all(counts.values()) and sum(counts.values()) > 100, counts


@pytest.mark.parametrize("name", NAMES)
def test_a_published_template_writes_all_of_a_conversation_or_it_is_refused(tmp_path, name, accepted):
    source = (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")
    tokens = dict.fromkeys(["<s>", "</s>", *re.findall(TOKENS, source)])
    made = spec(BYTES, tokens=[added(256 + i, token) for i, token in enumerate(tokens)])
    ours, _ = both(tmp_path, made, bos_token="<s>", eos_token="</s>", chat_template=source)
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(tmp_path / "tokenizer.json"), bos_token="<s>", eos_token="</s>", chat_template=source
    )
    today = {"strftime_now": fixed_date(f"{datetime.now():%Y-%m-%d}")}
    for kind, (turns, turn) in CONVERSATIONS.items():
        for tags in (False, True) if "thoughts" in kind else (False,):
            try:
                prompt, response = cut(ours, turns, turn, today, tags)
            except InputError:
                continue
            accepted[kind] += 1
            assert prompt == theirs.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
            for part in [message["content"].rpartition("</think>")[2].strip() for message in turns]:
                assert part in prompt
            thoughts = turn.get("reasoning_content", "1, then 2" if "<think>" in turn["content"] else "")
            assert thoughts in response and turn["content"].rpartition("</think>")[2].strip() in response
            assert "tool_calls" not in turn or "one" in response
            full = theirs.apply_chat_template([*turns, turn], tokenize=False)
            # the template's own words; or the text verbatim, where the template would tidy it or take thoughts out
            verbatim = response.strip().endswith(turn["content"].removeprefix("<think>\n").strip())
            # Nemotron's prompt has a line feed that its full rendering lacks
            same = without_blanks(full).startswith(without_blanks(prompt + response))
            assert same or verbatim or (thoughts and thoughts not in full)
