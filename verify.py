r"""The verifier: from the text of a response to right or wrong. No model, no torch.

    grade(r"so \boxed{\frac12}", "0.5", "auto")      True
    judge(text, answer, "auto", thinking=True)       what was read as well, and what became of the thoughts

Two readers. Plain numbers (with units, fractions, powers) are read by quantities.py and compared
exactly. What is no plain number on both sides (x^2 - 1 and (x-1)(x+1), sets, intervals) is compared
by math-verify if it is installed (pip install math-verify), see plumbing/algebra.py.
Next: quantities.py.
"""

import re

from plumbing.algebra import algebra
from plumbing.config import InputError
from quantities import IN_TEXT, LONGEST, equal_quantities, is_number, plain, read, unwrap, value

VERIFIERS = ("boxed", "gsm8k", "integer", "toy", "auto")
THOUGHTS = ("valid", "empty", "unclosed", "missing")


def judge(text, answer, verifier, thinking=False):
    """What is recorded of a response: {"extracted", "correct", "thoughts"}, and "undecided": True
    where only math-verify, which is not installed, could have compared the two.

    text      the response      answer  the reference
    thinking  did the prompt end in an open <think>, as some chat templates do?
    """
    found = extract(text, verifier, thinking, answer)
    verdict = found is not None and same(found, str(answer))
    row = {"extracted": found, "correct": verdict is True, "thoughts": thoughts(text, thinking)}
    if verdict is None:
        row["undecided"] = True
    return row


def grade(text, answer, verifier, thinking=False):
    """Is the answer that `text` ends in the right one? Undecided answers count as wrong."""
    return judge(text, answer, verifier, thinking)["correct"]


# --------------------------------------------------------------------------------------------------
# Where in the response is the answer?

BEHIND_ARROW = re.compile(r"(?<=>) *-?[0-9]+")
FORMULA = re.compile(r"(?<!\\)\$[^$]+\$|\\\([^()]*(?:\([^()]*\)[^()]*)*\\\)|\*\*[^*\n]+\*\*")


def extract(text, verifier, thinking=False, reference=None):
    r"""The answer that a response ends in, as it stands there; None: it gives none ("unparsed").

    boxed    the last \boxed{...} whose braces are balanced
    gsm8k    the line behind the last ####
    integer  the last number
    toy      the last number behind a >
    auto     boxed if there is a \boxed; else gsm8k if the line behind #### is a number or the last
             one (or #### is a heading); else the last number; where the reference is not a number,
             the last **bold** text or formula, $...$ or \(...\), instead

    Only what follows the thoughts counts; thoughts that never end give no answer.
    Raises InputError for another verifier.
    """
    if verifier not in VERIFIERS:
        raise InputError(f"unknown verifier {verifier!r}: must be one of {', '.join(VERIFIERS)}")
    # a thought may try several answers: what counts is what the response comes to
    text = after_thoughts(text, thinking)
    if verifier == "auto":
        found = extract_auto(text, reference)
    elif verifier == "boxed":
        found = last_boxed(text)
    elif verifier == "gsm8k":
        found = last_hashes(text)
    elif verifier == "integer":
        found = last_match(IN_TEXT, plain(text))
    else:
        found = last_match(BEHIND_ARROW, text)
    # the limit keeps hostile text cheap to read
    if not found or not found.strip() or len(found) > LONGEST:
        return None
    return found.strip()


def extract_auto(text, reference):
    # surest sign first: who writes a box means it; the last number may be the number of a step
    if "\\boxed" in text:
        return last_boxed(text)
    line = last_hashes(text)
    # "#### Final answer" is a heading: what follows it is the answer
    if line and (not text.rpartition("####")[2].strip()[len(line) :].strip() or is_number(line)):
        return line
    # a text that answers with a formula is likely to end in another number
    if reference is not None and not is_number(str(reference)):
        return last_match(FORMULA, text)
    return last_match(IN_TEXT, plain(text))


def last_hashes(text):
    """The line behind the last ####, or None."""
    _, mark, rest = text.rpartition("####")
    return rest.strip().partition("\n")[0] if mark else None


def last_match(pattern, text):
    # one pass from the left: a pattern anchored at the end would try every start
    last = None
    for match in pattern.finditer(text):
        last = match
    return last and last[0]


BRACES = re.compile(r"\\\\(?!boxed)|(\\boxed\s*\{)|\\[{}]|[{}]")  # an escaped brace is no brace


def last_boxed(text):
    r"""The inside of the last \boxed{...} with balanced braces, or None."""
    opened = []  # of every open brace: where the inside of its \boxed begins, or None
    last = None  # (start, end)
    for brace in BRACES.finditer(text):
        if brace[1] or brace[0] == "{":
            opened.append(brace.end() if brace[1] else None)
        elif brace[0] == "}" and opened:
            start = opened.pop()
            # of boxes in boxes the innermost, which begins last, as in the usual last_boxed_only
            if start is not None and (last is None or start > last[0]):
                last = start, brace.start()
    return last and text[last[0] : last[1]]


# --------------------------------------------------------------------------------------------------
# Thoughts


def after_thoughts(text, thinking=False):
    """What follows the last </think>; all of a text without thoughts; "" if they never end."""
    _, closed, rest = one_spelling(text).rpartition("</think>")
    # a thought that was begun and cut off holds no answer, whatever numbers stand in it
    opened_again = "<think>" in rest
    if opened_again or (thinking and not closed):
        return ""
    return rest


def thoughts(text, thinking=False):
    """valid, empty (closed at once), unclosed (cut off: no answer) or missing (no <think> at all)."""
    before, closed, rest = one_spelling(text).rpartition("</think>")
    if "<think>" in rest or (thinking and not closed):
        return "unclosed"
    if not closed:
        return "missing"
    return "valid" if before.replace("<think>", "").strip() else "empty"


def one_spelling(text):
    """OpenThoughts' tags as <think> and </think>."""
    for begin, tag in (("<|begin_of_thought|>", "<think>"), ("<|end_of_thought|>", "</think>")):
        text = text.replace(begin, tag)
    return text


def opens_thoughts(prompt):
    """Does the text of a prompt end in an open <think>, as some chat templates let it?"""
    return one_spelling(prompt[-100:]).rstrip().endswith("<think>")


# --------------------------------------------------------------------------------------------------
# Right or wrong


def same(found, answer):
    """Do two answers mean the same? True, False, or None: only math-verify could tell, and it is
    not installed."""
    # two quantities are compared exactly, and here: math-verify is for what these cannot read
    a, b = read(found), read(answer)
    if a and b:
        return equal_quantities(a, b)
    if value(found) == value(answer):
        return True
    if len(answer) > LONGEST:
        return False
    # it is lenient: better ask it less than believe it where it drops what matters
    if beyond_algebra(found, answer) or beyond_algebra(answer, found):
        return False
    found, answer = unwrap(found), unwrap(answer)
    if found.count("=") + answer.count("=") == 1:  # f(x) = x + 1 and x + 1
        found, answer = found.rpartition("=")[2], answer.rpartition("=")[2]
    return algebra(*(re.sub(r"\s+", " ", side) for side in (found, answer)))


# f, x_1, f(x), \angle ABC: the name of what an equation gives the value of
NAME = re.compile(r"\s*(?:\\angle\s*)?[A-Za-z]+(?:_\{?\w{1,9}\}?)?(?:\([^()]{1,9}\))?\s*")


def beyond_algebra(one, other):
    """Is `one` so clearly different from `other` that math-verify, which drops words, units, the
    left side of an equation and the base of a number, must not be asked?"""
    text = plain(unwrap(one))
    words = re.search(r"(?<![\\A-Za-z])[A-Za-z]{3,}(?<!or)", text)
    if (words or str(value(one)).isalpha()) and (is_number(other) or str(value(other)).isalpha()):
        return True  # 5 less and 5, five and 5, yes and no
    if re.search(r"[0-9]_", text):
        return True  # 101_2 and 101
    if re.search(r"[0-9][eE][-+]?[0-9]{4}", text):
        return True  # a number too long to be written out
    left, equals, _ = text.partition("=")
    if equals and "=" not in other and re.search("[A-Za-z]", left):
        return not NAME.fullmatch(left)  # 2x = 5 and 5
    return False


def unmatchable(answer, verifier):
    """Why no response can match this reference, or None: so that nobody trains for a grade that
    cannot be had."""
    answer = str(answer)  # JSON has numbers, too
    if not unwrap(answer):
        return "is empty"
    if len(answer) > LONGEST:
        return f"has more than {LONGEST} characters"
    if "####" in answer:
        return "holds ####: keep what follows it only"
    if verifier in ("integer", "toy") and not is_number(answer):
        return f"is not a number, and the verifier is {verifier}"
    return None
