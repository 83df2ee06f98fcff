"""The verifier: from the text of a response to right or wrong. No model, no torch.

Nothing is evaluated and no pattern can backtrack far, so a hostile text costs time linear in its length.
Next: eval.py.
"""

import re
from fractions import Fraction

from plumbing.config import InputError

VERIFIERS = ("boxed", "gsm8k", "integer", "toy", "auto")
LONGEST = 1000  # characters of an answer; a longer one is no answer (and Python's int() refuses 4300 digits)
NOISE = re.compile(r"\\[!,;:]|\\(?:left|right)(?![a-z])|\\?[$%]|\^ ?\{?\\circ ?\}?|°")
WORDS = re.compile(r"\\(?:text|textbf|mathbf|mathrm|mbox)\{([^{}]*)\}(\^\{?[0-9]\}?)?")  # \text{cm}^2
FRACTION = r"([0-9]*) ?\\frac ?\{ ?(-?[0-9]+) ?\} ?\{ ?([0-9]+) ?\}"
DECIMAL = r"(?:(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]+)?|(?<!\.)\.[0-9]+)"
# In running text 5-3 is no -3, the 2 of x2 or cm^2 no number of its own, and .5 is one but ...5 is not. Powers are
# taken along, so that nobody who writes 10^3 is taken to have said 10.
IN_TEXT = re.compile(
    r"(?<!\^)(?<!\^\{)(?<!\^-)(?<!\^\{-)(?:(?<![\w)}])-|(?<![A-Za-z0-9_]))"
    rf"(?:{FRACTION}|{DECIMAL}(?:[eE][-+]?[0-9]+)?(?:/[0-9]+)?)" r"(?:\^\{?-?\w+\}?)?", re.ASCII)  # fmt: skip
# 1e3 is 1000; an exponent has three digits at most here, since 1e999999999 would fill the memory
ALONE = re.compile(rf"([-+]?)(?:{FRACTION}|({DECIMAL}(?:[eE][-+]?[0-9]{{1,3}})?)(?:/([0-9]+))?)\.?\s*([A-Za-z. ]*)")
BRACES = re.compile(r"\\\\(?!boxed)|(\\boxed\s*\{)|\\[{}]|[{}]")  # an escaped brace is no brace


def extract(text, verifier):
    r"""The answer that a response ends in, as it stands there; None: it gives none ("unparsed").

    boxed    the last \boxed{...} whose braces are balanced
    gsm8k    what follows the last ####
    integer  the last number
    toy      the last number behind a >
    auto     boxed if there is a \boxed, else gsm8k if there is a ####, else integer

    Only what follows the last </think> counts, if there is one; thoughts that never end give no answer.
    Raises InputError for another verifier.
    """
    _, thought, text = text.rpartition("</think>")
    if not thought and "<think>" in text:
        text = ""
    if verifier == "auto":
        verifier = "boxed" if "\\boxed" in text else "gsm8k" if "####" in text else "integer"
    if verifier == "boxed":
        found = last_boxed(text)
    elif verifier == "gsm8k":
        found = text.rpartition("####")[2].strip().partition("\n")[0] if "####" in text else None
    elif verifier == "integer":
        found = last_match(IN_TEXT, plain(text))
    elif verifier == "toy":
        found = last_match(re.compile(r"(?<=>) *-?[0-9]+"), text)
    else:
        raise InputError(f"unknown verifier {verifier!r}: must be one of {', '.join(VERIFIERS)}")
    return found.strip() if found and found.strip() and len(found) <= LONGEST else None


def grade(text, answer, verifier):
    """Is the answer that `text` ends in the right one? Numbers are compared exactly, all else letter by letter."""
    found = extract(text, verifier)
    return found is not None and value(found) == value(str(answer))


def value(answer):
    r"""What an answer means: a Fraction if it is a number (1{,}000.0, 1\frac{1}{2}, 018, $18 dollars, x = 3), else its
    letters without spaces. A percent sign is dropped like any unit: 50% is 50, never 1/2."""
    text = re.sub(r"^[A-Za-z] ?= ?", "", plain(answer).strip(" *\n"))  # **18**
    for reading in (WORDS.sub("", text), WORDS.sub(r"\1", text)):  # 18 \text{ dollars} or \text{18 dollars}
        number = ALONE.fullmatch(reading.strip())
        # 18 dollars is 18, but 18x and 2 pi are no numbers
        if not number or any(len(word) == 1 or word == "pi" for word in number[7].split()):
            continue
        sign, whole, top, bottom, decimal, divisor, _ = number.groups()
        try:
            if top:
                size = int(whole or 0) + Fraction(int(top), int(bottom))
            else:
                size = Fraction(decimal.replace(",", "")) / int(divisor or 1)
            return -size if sign == "-" else size
        except (ValueError, ZeroDivisionError):
            pass
    return re.sub(r"\s", "", WORDS.sub(r"\1\2", text))


def plain(text):
    r"""Without what LaTeX and money put around numbers: 1{,}000\,\$ -> 1,000, \dfrac12 -> \frac{1}{2}."""
    text = NOISE.sub("", text.replace("\u2212", "-").replace("{,}", ",").replace("\\ ", " "))
    return re.sub(r"\\frac ?([0-9])([0-9])", r"\\frac{\1}{\2}", re.sub(r"\\[dt]frac", r"\\frac", text))


def last_match(pattern, text):
    last = None
    for match in pattern.finditer(text):
        last = match
    return last and last[0]


def last_boxed(text):
    opened, last = [], None  # opened: of every open brace, where the inside of its \boxed begins, or None
    for brace in BRACES.finditer(text):
        if brace[1] or brace[0] == "{":
            opened.append(brace.end() if brace[1] else None)
        elif brace[0] == "}" and opened:
            start = opened.pop()
            if start is not None and (last is None or start > last[0]):
                last = start, brace.start()
    return last and text[last[0] : last[1]]
