r"""The verifier: from the text of a response to right or wrong. No model, no torch.

    grade(r"so \boxed{\frac12}", "0.5", "auto")      True
    judge(text, answer, "auto", thinking=True)       what was read as well, and what became of the thoughts

Two readers. Plain numbers (with units, fractions, powers) are read here and compared exactly; nothing
is evaluated and no pattern can backtrack far, so a hostile text costs time linear in its length.
What is no plain number on both sides (x^2 - 1 and (x-1)(x+1), sets, intervals) is compared by
math-verify if it is installed (pip install math-verify): in a child process, within TIME_LIMIT and
MEMORY_LIMIT, since no computer algebra system is safe from hostile input.
Next: intervals.py.
"""

import functools
import importlib.util
import json
import re
import subprocess
import sys
import threading
from fractions import Fraction

from plumbing.config import InputError

VERIFIERS = ("boxed", "gsm8k", "integer", "toy", "auto")
THOUGHTS = ("valid", "empty", "unclosed", "missing")
# characters of an answer; a longer one is no answer (and Python's int() refuses 4300 digits)
LONGEST = 1000


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
    if not found or not found.strip() or len(found) > LONGEST:
        return None
    return found.strip()


def extract_auto(text, reference):
    if "\\boxed" in text:
        return last_boxed(text)
    line = last_hashes(text)
    # "#### Final answer" is a heading: what follows it is the answer
    if line and (not text.rpartition("####")[2].strip()[len(line) :].strip() or is_number(line)):
        return line
    if reference is not None and not is_number(str(reference)):
        return last_match(FORMULA, text)
    return last_match(IN_TEXT, plain(text))


def last_hashes(text):
    """The line behind the last ####, or None."""
    _, mark, rest = text.rpartition("####")
    return rest.strip().partition("\n")[0] if mark else None


def last_match(pattern, text):
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
            if start is not None and (last is None or start > last[0]):
                last = start, brace.start()
    return last and text[last[0] : last[1]]


def after_thoughts(text, thinking=False):
    """What follows the last </think>; all of a text without thoughts; "" if they never end."""
    _, closed, rest = one_spelling(text).rpartition("</think>")
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
    a, b = read(found), read(answer)
    if a and b:
        return equal_quantities(a, b)
    if value(found) == value(answer):
        return True
    if len(answer) > LONGEST:
        return False
    if beyond_algebra(found, answer) or beyond_algebra(answer, found):
        return False
    found, answer = unwrap(found), unwrap(answer)
    if found.count("=") + answer.count("=") == 1:  # f(x) = x + 1 and x + 1
        found, answer = found.rpartition("=")[2], answer.rpartition("=")[2]
    return algebra(*(re.sub(r"\s+", " ", side) for side in (found, answer)))


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


def equal_quantities(a, b):
    """(number, units, scale, variable) of each side -> are they equal?

    A side without units may have any: 18 is $18 is 18 eggs. Otherwise one unit at least must be
    shared; if all are, sizes count: 1 km is 1000 m.
    """
    if a.variable and b.variable and a.variable != b.variable:
        return False
    if not a.units or not b.units:
        return a.number == b.number
    if a.units == b.units:
        return a.number * a.scale == b.number * b.scale
    return bool(a.units & b.units) and a.number == b.number


def is_number(answer):
    return read(answer) is not None


def value(answer):
    r"""What an answer means: a Fraction if it is a number (1{,}000.0, 1\frac{1}{2}, 018, $18 dollars,
    x = 3), else its letters without spaces. A percent sign is a unit: 50% is 50, never 1/2."""
    quantity = read(answer)
    if quantity:
        return quantity.number
    text = re.sub(r"[\s$%]", "", plain(unwrap(answer)))
    text = text.rstrip(".") or text
    return text.lower() if text.isalpha() and len(text) > 1 else text


def unmatchable(answer, verifier):
    """Why no response can match this reference, or None: so that nobody trains for a grade that
    cannot be had."""
    answer = str(answer)
    if not unwrap(answer):
        return "is empty"
    if len(answer) > LONGEST:
        return f"has more than {LONGEST} characters"
    if "####" in answer:
        return "holds ####: keep what follows it only"
    if verifier in ("integer", "toy") and not is_number(answer):
        return f"is not a number, and the verifier is {verifier}"
    return None


# --------------------------------------------------------------------------------------------------
# Everything else: math-verify, in a child process

TIME_LIMIT = 10  # seconds for a pair of answers, after which they count as different
MEMORY_LIMIT = 2 * 2**30  # bytes of the child
HAS_MATH_VERIFY = importlib.util.find_spec("math_verify") is not None


@functools.lru_cache(maxsize=10_000)
def algebra(found, answer):
    """Are two formulas equal? Asks math-verify: True, False, or None if it is not installed."""
    if not HAS_MATH_VERIFY:
        return None
    return CHILD.ask(found, answer)


class Child:
    """A process that compares formulas; it is killed, and replaced, when it takes too long.

    math-verify's own time limit is a signal, which cannot interrupt 9**9**9 (Math-Verify issue 65).
    """

    def __init__(self):
        self.process = None

    def start(self):
        words = [sys.executable, __file__, "--child"]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            words, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True, encoding="utf-8"
        )
        if self.reply(60) != "ready":
            raise InputError("math-verify is installed but does not start: try python -c 'import math_verify'")

    def ask(self, found, answer):
        if self.process is None or self.process.poll() is not None:
            self.start()
        try:
            self.process.stdin.write(json.dumps([found, answer]) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:  # out of memory: what it was asked before was too much
            return False
        return self.reply(TIME_LIMIT) is True

    def reply(self, seconds):
        """The next line of the child; None if it dies or takes longer than this."""
        alarm = threading.Timer(seconds, self.process.kill)
        alarm.start()
        line = self.process.stdout.readline()
        alarm.cancel()
        if not line:
            self.process.wait()
            return None
        return json.loads(line)


CHILD = Child()


def compare_for_parent():
    """The child: pairs of answers from stdin, verdicts to stdout, a line of JSON each."""
    import resource

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, MEMORY_LIMIT))
    replies = sys.stdout
    sys.stdout = sys.stderr  # whatever a library prints is no reply
    from math_verify import LatexExtractionConfig, parse, verify

    # formulas only: math-verify's reader of plain expressions hands them to Python's eval
    reader = [LatexExtractionConfig()]
    print(json.dumps("ready"), file=replies, flush=True)
    for line in sys.stdin:
        try:
            found, answer = json.loads(line)
            sides = [parse(f"${side}$", reader) for side in (answer, found)]
            verdict = all(sides) and bool(verify(*sides, float_rounding=12))
        except Exception:  # of a parser that somebody else wrote, on text that nobody checked
            verdict = False
        print(json.dumps(verdict), file=replies, flush=True)


# --------------------------------------------------------------------------------------------------
# The exact reader: plain numbers


class Quantity:
    """number (Fraction), units (frozenset of names), scale (Fraction: 1 of these in base units),
    variable (the x of x = 5, or "")."""

    def __init__(self, number, units=frozenset(), scale=Fraction(1), variable=""):
        self.number = number
        self.units = units
        self.scale = scale
        self.variable = variable


DECIMAL = r"(?:(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]+)?|(?<!\.)\.[0-9]+)"
FRACTION = rf"\\frac ?\{{ ?(?:-?{DECIMAL}) ?\}} ?\{{ ?(?:-?{DECIMAL}) ?\}}"
TIMES = r" ?(?:\\times|\\cdot|[*x×·]) ?"
SCALES = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
SCALE_WORDS = rf"(?:(?: |-)(?i:{'|'.join(SCALES)})\b)*"
# exponents have three digits at most here, since 1e999999999 would fill the memory
NUMBER = re.compile(
    rf"""(?P<sign>[-+]?)\ ?
    (?:(?:(?P<whole>[0-9]+)\ ?)?\\frac\ ?\{{\ ?(?P<top>-?{DECIMAL})\ ?\}}\ ?\{{\ ?(?P<bottom>-?{DECIMAL})\ ?\}}
      |(?P<mixed>[0-9]+)\ (?P<over>[0-9]+)/(?P<under>[0-9]+)
      |(?P<decimal>{DECIMAL})
       (?:[eE](?P<exponent>[-+]?[0-9]{{1,3}}))?
       (?:\^\{{?(?P<power>-?[0-9]{{1,3}})(?:\}}|(?![0-9])))?
       (?:{TIMES.replace(" ?", r"[ ]?")}10\^\{{?(?P<ten>-?[0-9]{{1,3}})(?:\}}|(?![0-9])))?
       (?:/(?P<divisor>{DECIMAL}))?
    )
    (?P<words>{SCALE_WORDS.replace("(?: |-)", r"[ -]")})
    (?P<rest>.*)""",
    re.ASCII | re.VERBOSE | re.DOTALL | re.IGNORECASE,
)
# In running text 5-3 is no -3, the 2 of x2 or cm^2 no number of its own, and .5 is one but ...5 is
# not. Powers are taken along, so that 10^3 does not count as 10, and so is the million of 5 million.
IN_TEXT = re.compile(
    r"(?<!\^)(?<!\^\{)(?<!\^-)(?<!\^\{-)"
    r"(?:(?<![\w)}])-|(?<=[=:] )- (?=[0-9])|(?<=is )- (?=[0-9])|(?<![A-Za-z0-9_]))"
    rf"(?:[0-9]* ?{FRACTION}"
    rf"|[0-9]+ [0-9]+/[0-9]+"
    rf"|{DECIMAL}(?:[eE][-+]?[0-9]+)?(?:{TIMES}10\^\{{?-?[0-9]+\}}?)?(?:/[0-9]+)?)"
    rf"(?:\^\{{?-?\w+\}}?)?{SCALE_WORDS}",
    re.ASCII,
)
BEHIND_ARROW = re.compile(r"(?<=>) *-?[0-9]+")
FORMULA = re.compile(r"(?<!\\)\$[^$]+\$|\\\([^()]*(?:\([^()]*\)[^()]*)*\\\)|\*\*[^*\n]+\*\*")


def read(answer):
    """An answer -> Quantity if it is a plain number with or without units, else None."""
    if len(answer) > LONGEST:
        return None
    text = re.sub(r"\s+", " ", plain(unwrap(answer)))
    label = LABEL.match(text)
    text = text[label.end() :] if label else text
    text = text.strip()
    currency = re.match(r"(-?) ?(US\$|[$€£¥]|USD|EUR)\s*", text)
    if currency:  # -$5 and $-5
        text = currency[1] + text[currency.end() :]
    text = text.rstrip(" .")
    if re.fullmatch(r"[0-9]{1,3}(?: [0-9]{3})+", text):  # 12 345 678
        text = text.replace(" ", "")
    if match := REPEATING.fullmatch(text):
        return repeating(match)
    match = NUMBER.fullmatch(text)
    measured = match and read_units(match["rest"], glued=match["rest"][:1].isalpha())
    if not measured:
        return None
    try:
        number = number_of(match)
    except (ValueError, ZeroDivisionError):
        return None
    names, scale = measured
    if currency:
        name, size = UNITS[currency[2]]
        names, scale = names | {name}, scale * size
    return Quantity(number, names, scale, label["variable"] or "" if label else "")


def number_of(match):
    """A match of NUMBER -> Fraction. Raises ValueError or ZeroDivisionError for what is none."""

    def fraction(name):
        return Fraction(match[name].replace(",", ""))

    if match["top"]:
        size = fraction("top") / fraction("bottom")
        if match["whole"]:
            if not 0 <= size:
                raise ValueError("1 and -1/2 is no mixed number")
            size += int(match["whole"])
    elif match["mixed"]:
        size = int(match["mixed"]) + Fraction(int(match["over"]), int(match["under"]))
    else:
        size = fraction("decimal")
        if match["exponent"]:
            size *= Fraction(10) ** int(match["exponent"])
        if match["power"]:
            if len(match["decimal"]) * abs(int(match["power"])) > 3 * LONGEST:
                raise ValueError("too long to be written out")
            size **= int(match["power"])
        if match["ten"]:
            size *= Fraction(10) ** int(match["ten"])
        if match["divisor"]:
            size /= fraction("divisor")
    for word in re.findall(r"[a-z]+", match["words"].lower()):
        size *= 10 ** SCALES[word]
    return -size if match["sign"] == "-" else size


REPEATING = re.compile(r"(-?)([0-9]*)\.([0-9]*)\\(?:overline|bar|dot) ?\{?([0-9]+)\}?")


def repeating(match):
    r"""A match of REPEATING, 0.1\overline{6} -> Quantity."""
    sign, whole, fixed, period = match.groups()
    digits = Fraction(int(whole + fixed or 0)) + Fraction(int(period), 10 ** len(period) - 1)
    number = digits / 10 ** len(fixed)
    return Quantity(-number if sign else number)


# f, x_1, f(x), \angle ABC: the name of what an equation gives the value of
NAME = re.compile(r"\s*(?:\\angle\s*)?[A-Za-z]+(?:_\{?\w{1,9}\}?)?(?:\([^()]{1,9}\))?\s*")
# what may stand before a number: "The final answer is", "x =", "x_1 =", "Area ="
LABEL = re.compile(
    r"\s*(?:(?:the )?(?:final )?answer\b(?: is)?[:=]? *)?"
    r"(?:(?P<variable>[A-Za-z](?:_\{?[A-Za-z0-9]{1,9}\}?)?|(?=[a-z]*[aeiou])[a-z]{3,}) ?= ?)?",
    re.IGNORECASE,
)

# --------------------------------------------------------------------------------------------------
# Units

UNITS = {}  # word -> (name of what is measured, size in its base unit)
for name, sizes in {
    "m": "mm 1/1000 millimeter 1/1000 cm 1/100 centimeter 1/100 m 1 meter 1 metre 1 km 1000 kilometer 1000",
    "ft": "in 1/12 inch 1/12 inche 1/12 ft 1 foot 1 feet 1 yd 3 yard 3 mi 5280 mile 5280",
    "g": "mg 1/1000 g 1 gram 1 kg 1000 kilogram 1000",
    "lb": "oz 1/16 ounce 1/16 lb 1 pound 1",
    "l": "ml 1/1000 mL 1/1000 l 1 L 1 liter 1 litre 1",
    "s": "ms 1/1000 s 1 sec 1 second 1 min 60 minute 60 h 3600 hr 3600 hour 3600 day 86400 week 604800",
    "year": "month 1/12 yr 1 year 1",
    "$": "$ 1 US$ 1 USD 1 dollar 1 buck 1 ¢ 1/100 cent 1/100 penny 1/100 pennie 1/100",
    "€": "€ 1 EUR 1 euro 1",
    "£": "£ 1",
    "¥": "¥ 1 yen 1",
    "%": "% 1 percent 1",
    "°": "° 1 degree 1",
    "°C": "°C 1 celsius 1",
    "°F": "°F 1 fahrenheit 1",
    "rad": "rad 1 radian 1",
    "mph": "mph 1",
    "dozen": "dozen 1",
}.items():
    words = sizes.split()
    for word, size in zip(words[::2], words[1::2], strict=True):
        UNITS[word] = (name, Fraction(size))

FILLERS = {"of", "the", "in", "on", "at", "by", "total", "left", "altogether", "exactly", "about"}
# behind a number these make it something else: 2 pi, 3 or 4, 7 more
NO_UNITS = set(
    "pi sin cos tan log exp sqrt mod and plus minus times divided over root than more less not "
    "infinity remainder out modulo".split()
)
UNIT = re.compile(
    r"[\s·*()-]*(?P<per>/|per\b|an?\b|each\b|every\b)?\s*(?:(?P<shape>square|sq|cubic|cu)\b\.?\s*)?"
    r"(?P<word>[A-Za-z]+|° ?[CF]\b|[%°$€£¥¢])\.?(?:\^\{?(?P<power>[1-9])\}?)?[\s,)]*",
    re.IGNORECASE,
)


def read_units(text, glued=False):
    """What follows a number -> (names, scale), or None if it is something else than units.

    cm^2 -> ({"m^2"}, 1/10000)   duck eggs -> ({"duck", "egg"}, 1)   km/h -> ({"m", "/s"}, 5/18)
    glued: no space before it, as in 5cm; only known units are written so, 2xy are variables.
    """
    names = set()
    scale = Fraction(1)
    at = 0
    while at < len(text):
        match = UNIT.match(text, at)
        if not match:
            return None
        found = unit_of(match["word"], known_only=glued and at == 0)
        if found is None:
            return None
        if found:
            name, size = found
            power = int(match["power"] or {"s": 2, "c": 3, "": 1}[(match["shape"] or "")[:1].lower()])
            name = name if power == 1 else f"{name}^{power}"
            if match["per"]:
                name, size = "/" + name, 1 / size
            names.add(name)
            scale *= size**power
        at = match.end()
    return frozenset(names), scale


def unit_of(word, known_only):
    """(name, size), () for a filler, None for what is no unit."""
    word = word.replace(" ", "")
    lower = word.lower()
    for spelling in (word, word.upper(), lower, lower.removesuffix("s")):
        # "in" is an inch, but not in "5 in total"; M is no metre
        if spelling in UNITS and (len(spelling) > 2 or spelling == word):
            return UNITS[spelling]
    if lower in FILLERS:
        return ()
    is_word = len(word) > 2 and re.search("[aeiou]", lower) and lower not in NO_UNITS
    if known_only or not is_word:
        return None
    return lower.removesuffix("s"), Fraction(1)


# --------------------------------------------------------------------------------------------------
# Without LaTeX

WORDS = re.compile(r"\\(?:text|textbf|textit|mathbf|mathrm|mbox|operatorname)\{([^{}]*)\}")
FRAC = re.compile(r"\\frac\s*(?:\{([^{}]*)\}|([0-9]))\s*(?:\{([^{}]*)\}|([0-9]))")
UNICODE = str.maketrans({
    "\u2212": "-", "\u00b2": "^2", "\u00b3": "^3", "\u00bd": " 1/2", "\u00bc": " 1/4", "\u00be": " 3/4",
    "\u2044": "/", "\u00a0": " ", "\u202f": " ", "\u2009": " ", "\u00ba": "°",
})  # fmt: skip


def plain(text):
    r"""Without what LaTeX puts around numbers: 1{,}000\,\$ -> 1,000 $, \dfrac12 -> \frac{1}{2}.

    What separates two digits is replaced by a space, never by nothing: 1\text{ or }2 is not 12.
    """
    text = text.translate(UNICODE)
    # a thousands separator is one before exactly three digits
    text = re.sub(r"(?<=[0-9])(?:\{,\}|\\[,!;:]|~)(?=[0-9]{3}(?![0-9]))", ",", text)
    text = re.sub(r"\\[,!;:]|\\ |~|\\(?:left|right|displaystyle)(?![a-z])", " ", text)
    text = re.sub(r"\\([$%])", r"\1", text)
    text = re.sub(r"(?<=-)[$€£]", "", text)  # -$5
    text = re.sub(r"\$(?=-)", "", text)
    text = re.sub(r"\^ ?\{?\\circ ?\}?|\\degree(?![a-z])", "°", text)
    text = re.sub(r"(?i:degrees? )(?=(?:[CF]\b|(?i:celsius|fahrenheit)))", "°", text)
    text = re.sub(r"° ?(?i:celsius)", "°C", text)
    text = re.sub(r"° ?(?i:fahrenheit)", "°F", text)
    text = WORDS.sub(r" \1 ", text)
    text = re.sub(r"(?<! ) +(?=\^)", "", text)  # \text{cm}^2
    text = re.sub(r"\\[dt]frac", r"\\frac", text)
    text = FRAC.sub(lambda m: rf"\frac{{{m[1] or m[2] or ''}}}{{{m[3] or m[4] or ''}}}", text)
    return text


WRAPPERS = (
    re.compile(r"\$\$?([^$]+)\$\$?"),
    re.compile(r"\\\((.*)\\\)|\\\[(.*)\\\]", re.DOTALL),
    re.compile(r"\\(?:boxed|fbox|text|textbf|mathbf|mathrm|mbox)\s*\{([^{}]*(?:\{[^{}]*\}[^{}]*)*)\}"),
    re.compile(r"\*\*([^*]+)\*\*|\*([^*]+)\*"),
    re.compile(r"\{([^{}]*)\}|\(([^(),]*)\)"),
)


def unwrap(text):
    r"""An answer without what stands around it: $5$, \(5\), \boxed{5}, **5**, (5)."""
    for _ in range(8):  # wrappers inside wrappers
        text = text.strip()
        for wrapper in WRAPPERS:
            match = wrapper.fullmatch(text)
            if match:
                text = next((group for group in match.groups() if group is not None), "")
                break
        else:
            break
    return text.strip()


if __name__ == "__main__":
    compare_for_parent()
