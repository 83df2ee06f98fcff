r"""The exact reader: an answer as a plain number with or without units. No model, no torch.

    read(r"3\frac12 km")      Quantity: 7/2, {"m"}, 1000 of them; None for what is no plain number
    value("1,000.0")          Fraction(1000, 1): what an answer means, to be compared with another

Numbers are Fractions, so that nothing is lost; nothing is evaluated, and no pattern can backtrack
far: a hostile text costs time linear in its length.
Next: intervals.py.
"""

import re
from fractions import Fraction

# characters of an answer; a longer one is no answer (and Python's int() refuses 4300 digits)
LONGEST = 1000


class Quantity:
    """number (Fraction), units (frozenset of names), scale (Fraction: 1 of these in base units),
    variable (the x of x = 5, or "")."""

    def __init__(self, number, units=frozenset(), scale=Fraction(1), variable=""):
        self.number = number
        self.units = units
        self.scale = scale
        self.variable = variable


def value(answer):
    r"""What an answer means: a Fraction if it is a number (1{,}000.0, 1\frac{1}{2}, 018, $18 dollars,
    x = 3), else its letters without spaces. A percent sign is a unit: 50% is 50, never 1/2."""
    quantity = read(answer)
    if quantity:
        return quantity.number
    text = re.sub(r"[\s$%]", "", plain(unwrap(answer)))
    text = text.rstrip(".") or text
    return text.lower() if text.isalpha() and len(text) > 1 else text


def is_number(answer):
    return read(answer) is not None


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


# --------------------------------------------------------------------------------------------------
# Numbers

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
REPEATING = re.compile(r"(-?)([0-9]*)\.([0-9]*)\\(?:overline|bar|dot) ?\{?([0-9]+)\}?")
# what may stand before a number: "The final answer is", "x =", "x_1 =", "Area ="
LABEL = re.compile(
    r"\s*(?:(?:the )?(?:final )?answer\b(?: is)?[:=]? *)?"
    r"(?:(?P<variable>[A-Za-z](?:_\{?[A-Za-z0-9]{1,9}\}?)?|(?=[a-z]*[aeiou])[a-z]{3,}) ?= ?)?",
    re.IGNORECASE,
)


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


def repeating(match):
    r"""A match of REPEATING, 0.1\overline{6} -> Quantity."""
    sign, whole, fixed, period = match.groups()
    digits = Fraction(int(whole + fixed or 0)) + Fraction(int(period), 10 ** len(period) - 1)
    number = digits / 10 ** len(fixed)
    return Quantity(-number if sign else number)


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
            power = int(
                match["power"] or {"s": 2, "c": 3, "": 1}[(match["shape"] or "")[:1].lower()]
            )
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
    re.compile(
        r"\\(?:boxed|fbox|text|textbf|mathbf|mathrm|mbox)\s*\{([^{}]*(?:\{[^{}]*\}[^{}]*)*)\}"
    ),
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
