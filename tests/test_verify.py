"""verify.py: from the text of a response to right or wrong."""

import os
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import pytest

from plumbing.config import InputError
from verify import extract, grade, value

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("text, number", [
    # whole numbers as people and models write them
    ("7", 7), ("007", 7), ("+7", 7), ("-7", -7), ("\u22127", -7), ("-0", 0), ("7.", 7), ("7.0", 7), ("7.000", 7),
    ("1,234", 1234), ("1{,}234", 1234), (r"1\,234", 1234), ("12,345,678.50", Fraction(24691357, 2)),
    # fractions
    ("3/4", Fraction(3, 4)), ("6/8", Fraction(3, 4)), ("0.75", Fraction(3, 4)), (".75", Fraction(3, 4)),
    (r"\frac{3}{4}", Fraction(3, 4)), (r"\dfrac{3}{4}", Fraction(3, 4)), (r"\tfrac34", Fraction(3, 4)),
    (r"\frac 3 4", r"\frac34"), (r"-\frac{3}{4}", Fraction(-3, 4)), (r"\frac{-3}{4}", Fraction(-3, 4)),
    (r"\frac{ 3 }{ 4 }", Fraction(3, 4)), (r"1\frac{1}{2}", Fraction(3, 2)), (r"-1\frac{1}{2}", Fraction(-3, 2)),
    (r"2\dfrac12", Fraction(5, 2)), ("8/2", 4),
    # exponents of ten
    ("1e3", 1000), ("2.5E-1", Fraction(1, 4)), ("1e3/4", 250),
    # units
    ("$18", 18), (r"\$1{,}000.00", 1000), ("18 dollars", 18), (r"12 \text{ dollars}", 12), (r"18\text{cm}^2", 18),
    (r"18\ \mathrm{km}", 18), ("5%", 5), (r"5\%", 5), (r"5^\circ", 5), (r"5^{\circ}", 5), ("5°", 5), ("5 degrees", 5),
    (r"\text{12}", 12), (r"\textbf{12}", 12), (r"\mathbf{12}", 12), ("**12**", 12), (r"\left 12 \right", 12),
    ("x = 5", 5), ("n=-5", -5),
    # no numbers: compared letter by letter
    ("18x", "18x"), ("2 pi", "2pi"), (r"2\pi", r"2\pi"), ("1,23", "1,23"), ("1,2,3", "1,2,3"), ("(1, 2)", "(1,2)"),
    ("1/0", "1/0"), (r"\frac{1}{0}", r"\frac{1}{0}"), ("10^3", "10^3"), ("--5", "--5"), ("1/2/3", "1/2/3"),
    (r"3 \text{ or } 4", "3or4"), (r"\text{A}", "A"), (r"\frac{\sqrt{3}}{2}", r"\frac{\sqrt{3}}{2}"), 
    ("twelve", "twelve"), ("٣", "٣"), ("1e1000", "1e1000"), ("", ""),
])  # fmt: skip
def test_value(text, number):
    assert value(text) == number
    assert isinstance(value(text), str) == isinstance(number, str)


@pytest.mark.parametrize("text, found", [
    (r"so \boxed{5}.", "5"),
    (r"first \boxed{5}, no: \boxed{6}", "6"),
    (r"\boxed{\frac{3}{4}}", r"\frac{3}{4}"),
    (r"\boxed{\frac{\sqrt{3}}{\sqrt{2}}} and {more}", r"\frac{\sqrt{3}}{\sqrt{2}}"),
    (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
    (r"\boxed{\text{a } b}", r"\text{a } b"),
    (r"\boxed {7}", "7"),
    ("\\boxed{\n7\n}", "7"),
    (r"\\boxed{7}", "7"),  # escaped once too often
    (r"\\\boxed{7}", "7"),  # behind LaTeX's new line
    (r"{ \boxed{7}", "7"),
    (r"} \boxed{7}", "7"),
    (r"\boxed{\boxed{7}}", "7"),
    (r"\boxed{5} and then \boxed{6", "5"),  # the last balanced one
    (r"\boxed{5", None),
    (r"\boxed{}", None),
    (r"\boxed{ }", None),
    (r"\boxed 5", None),
    ("the answer is 5", None),
    (r"\boxed{5}</think> I cannot say", None),
    (r"\boxed{5}</think>\boxed{6}", "6"),
    (r"<think>\boxed{5}", None),  # cut off in its thoughts
    (r"<think>\boxed{5}</think>\boxed{6}", "6"),
    ("", None),
])  # fmt: skip
def test_last_balanced_box(text, found):
    assert extract(text, "boxed") == found


@pytest.mark.parametrize("text, found", [
    ("so it is 18.\n#### 18", "18"), ("####18", "18"), ("#### 1,234", "1,234"), ("#### $18 eggs\nfoo", "$18 eggs"),
    ("#### 5\nno:\n#### 6", "6"), ("####\n7", "7"), ("#### ", None), ("18", None), ("### 18", None),
])  # fmt: skip
def test_gsm8k(text, found):
    assert extract(text, "gsm8k") == found


@pytest.mark.parametrize("text, found", [
    ("The answer is 5-3=2", "2"), ("It costs $1,234.50.", "1,234.50"), ("between 5-7", "7"), ("it is -7", "-7"),
    ("(-7)", "-7"), ("8 - 3", "3"), ("3 + 4 = 7 apples", "7"), ("x2 is 5, x3 is not", "5"), ("5 cm^2", "5"),
    ("5 cm^{2}", "5"), ("5 m^{-2}", "5"), ("5 m^-2", "5"), ("1e3", "1e3"), ("10^3", "10^3"), ("**18**", "18"),
    ("1, 2, 3", "3"), ("12 of 3/4", "3/4"), (r"\(\frac{1}{2}\)", r"\frac{1}{2}"), ("wait...5", "5"), ("it is .5", ".5"),
    ("5%", "5"), ("no number at all", None), ("GPT4", None), ("", None),
])  # fmt: skip
def test_last_number(text, found):
    assert extract(text, "integer") == found


@pytest.mark.parametrize("text, found", [
    ("3+5=8; 8*2=6; >6", "6"), ("3+5=8; > 6<|end|>", "6"), (">5; >6", "6"), (">66", "66"), ("3+5=8", None), ("", None),
    (">", None), ("> so 3", None),
])  # fmt: skip
def test_toy(text, found):
    assert extract(text, "toy") == found


@pytest.mark.parametrize("text, found", [
    (r"\boxed{5} #### 6 7", "5"), ("#### 6 7", "6 7"), ("it is 7", "7"), (r"7 \boxed{", None), ("#### 5</think>7", "7"),
])  # fmt: skip
def test_auto_prefers_box_then_hashes_then_the_last_number(text, found):
    assert extract(text, "auto") == found


def test_grades():
    assert grade(r"\boxed{025}", "25", "boxed")  # AIME
    assert grade(r"\boxed{25}", "025", "boxed") and grade(r"\boxed{27}", 27.0, "boxed")
    assert grade("#### 1,234", "1234", "gsm8k") and not grade("#### 1,235", "1234", "gsm8k")
    assert grade(r"thus \boxed{\dfrac{3}{4}}", "0.75", "auto") and not grade(r"\boxed{0.7500001}", "3/4", "auto")
    assert not grade(r"\boxed{10^3}", "10", "auto") and not grade("it is 10^3", "10", "auto")
    assert grade(r"\boxed{(a, b)}", "(a,b)", "boxed") and not grade(r"\boxed{(b, a)}", "(a,b)", "boxed")
    assert not grade("None", "None", "integer") and not grade("", "", "integer") and not grade(r"\boxed{}", "", "boxed")
    assert grade(">7", "7", "toy") and not grade(">77", "7", "toy") and not grade("7", "7", "toy")

def test_an_unknown_verifier_is_refused():
    with pytest.raises(InputError, match="unknown verifier 'sympy'"):
        extract("5", "sympy")

HOSTILE = r"""
import resource
resource.setrlimit(resource.RLIMIT_CPU, (60, 60))
from verify import grade
M = 150_000
texts = [
    "9" * 10**6, "#### " + "9" * M, "-" * M, "1," * M, "1,000" * M, ",000" * M + "x", "1/" * M, "1e" * M, "9^" * M,
    "1e999999999", "#### 1e999999999", r"\boxed{1e999999999}", "9**9**9**9", r"\boxed{9**9**9**9}",
    r"\boxed{9^{9^{9^{9^{9}}}}}", "__import__('os').system('touch hacked')",
    r"\boxed{__import__('os').system('touch hacked')}", r"\boxed{" * M, r"\boxed{" + "{" * M + "}" * M + "}",
    "{" * M, "}" * M, r"\boxed{" + "a" * M, r"\boxed{" + "a" * M + "}", r"\boxed" + " " * M, r"\boxed  " * M,
    r"\frac{" * M, r"\frac{1}{" * M, r"1\frac{1" * M, r"\text{" * M, " " * M, "\n" * M, "####" * M, ">" * M, "> " * M,
    ">" + " " * M, "> -" * M, "\\" * M, "\udcff" * M, "</think>" * M,
    r"\boxed{5" + " " * 990 + "!}", "5" + " " * M + "!", "^{-" * M,
    "^ " * M, "_1" * M, "\0" * M, ". " * M, "." * M, "$" * M, r"\boxed{1/" + "9" * 900 + "}", r"\left" * M,
]
for text in texts:
    for verifier in ("boxed", "gsm8k", "integer", "toy"):
        assert not grade(text, "5.5", verifier), (text[:40], verifier)
assert not grade("5", "9" * M, "integer") and not grade("5", "1" + " " * 1000 + "!", "integer")  # a hostile answer
"""


def test_hostile_texts_are_wrong_in_bounded_time(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", HOSTILE], cwd=tmp_path, env=environment, capture_output=True,
                          timeout=200)  # fmt: skip
    assert done.returncode == 0, done.stderr[-500:]
    assert not any(tmp_path.iterdir())
