"""What data.py counts on the way, which examples stay, and what it prints in the end.

    tally = Tally(cfg)
    if tally.count(example, prompt, response, too_long): ...
    report(cfg, render, made, tally, unread)

A data set that is a little wrong (thoughts cut off, answers that no verifier reads, rows that stand
twice) trains without an error, and badly. So it is counted and said before anything is trained.

Next: plumbing/algebra.py.
"""

import hashlib
from collections import Counter

from formats import has_thoughts
from hf.template import OPENS, writes_empty_thoughts
from verify import judge, opens_thoughts

COUNTED = (
    "too_long",
    "not_correct",
    "with_thoughts",
    "without_thoughts",
    "truncated_thoughts",
    "with_answer",
    "graded_right",
    "earlier_answers",
    "duplicates",
)


class Tally:
    """What is counted on the way, and which examples stay."""

    def __init__(self, cfg):
        self.cfg = cfg
        self.counts = Counter({key: 0 for key in COUNTED})
        self.wrong = None  # the first response that does not end in its answer
        self.seen = set()

    def count(self, example, prompt, response, too_long):
        """Count an example -> does it stay?"""
        correct = self.grade(example, prompt, response)
        if too_long:
            self.counts["too_long"] += 1
            return False
        if self.cfg.require_correct and not correct:
            self.counts["not_correct"] += 1
            return False
        self.counts[kind_of_thoughts(prompt, response)] += 1
        self.counts["with_answer"] += example.answer is not None
        self.counts["graded_right"] += bool(correct)
        self.counts["earlier_answers"] += any(
            turn["role"] == "assistant" for turn in example.messages
        )
        text = hashlib.sha256(f"{len(prompt)} {prompt}{response}".encode()).digest()
        self.counts["duplicates"] += text in self.seen
        self.seen.add(text)
        return True

    def grade(self, example, prompt, response):
        """Does the response end in the example's answer? None if that is not known."""
        if example.answer is None:
            return None
        verdict = judge(response, example.answer, self.cfg.verifier, opens_thoughts(prompt))
        if not verdict["correct"] and self.wrong is None:
            found = verdict["extracted"]
            self.wrong = (
                f"{example.where}: the response ends in {found!r}, the answer is {example.answer!r}"
            )
        return verdict["correct"]


def kind_of_thoughts(prompt, response):
    """-> "with_thoughts", "without_thoughts", or "truncated_thoughts" for those that never end."""
    if OPENS.search(prompt) or has_thoughts(response):
        ends = "</think>" in response or "<|end_of_thought|>" in response
        return "with_thoughts" if ends else "truncated_thoughts"
    return "without_thoughts"


def report(cfg, render, made, tally, unread):
    """Print what has been written, and what was noticed on the way."""
    tokenizer = render.tokenizer
    counts = tally.counts
    sizes = made.spans[:, 2] - made.spans[:, 0]
    response_tokens = made.response_mask().sum()
    print(
        f"{cfg.out}: {len(made)} examples, {len(made.tokens):,} tokens, {response_tokens:,} of them "
        f"in responses, longest example {sizes.max()}; left out as longer than "
        f"{cfg.max_tokens or 'any limit'}: {counts['too_long']}"
    )
    print(
        f"responses with thoughts: {counts['with_thoughts']}, without: "
        f"{counts['without_thoughts']}, truncated thoughts: {counts['truncated_thoughts']}"
    )
    if render.has_template and counts["without_thoughts"]:
        if writes_empty_thoughts(tokenizer, render.date | render.kwargs):
            # the student would have to unlearn this opening; Qwen3's template can put it in the prompt
            print(
                "in a conversation the chat template writes empty thoughts before an answer "
                "without any; these responses are learnt without them. --template_kwargs, as "
                "'{\"enable_thinking\": false}' for Qwen3, puts them into the prompt"
            )
    if counts["earlier_answers"]:
        n = counts["earlier_answers"]
        print(f"conversations with earlier answers, which are read but not learnt: {n}")
    if counts["duplicates"]:
        print(f"examples that are in the file more than once: {counts['duplicates']}")
    if counts["with_answer"]:
        print(
            f"responses that end in their own answer: {counts['graded_right']} of "
            f"{counts['with_answer']}"
            + (f"; left out: {counts['not_correct']}" if cfg.require_correct else "")
        )
        if not counts["graded_right"]:
            print(
                f"warning: none does, so accuracy would mean nothing. {tally.wrong}; is "
                f"--verifier={cfg.verifier} the right one?"
            )
    if unread:
        shown = ", ".join(f"{name} ({n})" for name, n in sorted(unread.items()))
        print(f"columns not read, with the number of rows that have them: {shown}")
    print("the first one, with | where the response begins:")
    print(f"{tokenizer.decode(made.prompt(0)[-300:])}|{tokenizer.decode(made.response(0)[:300])}")
