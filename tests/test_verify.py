"""verify.py: from the text of a response to right or wrong."""

import os
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path

import pytest

from plumbing import algebra
from plumbing.config import InputError
from quantities import value
from verify import extract, grade, judge, opens_thoughts, same, unmatchable

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("text, number", [
    # whole numbers as people and models write them
    ("7", 7), ("007", 7), ("+7", 7), ("-7", -7), ("\u22127", -7), ("-0", 0), ("7.", 7), ("7.0", 7), ("7.000", 7),
    ("1,234", 1234), ("1{,}234", 1234), (r"1\,234", 1234), ("12,345,678.50", Fraction(24691357, 2)),
    # fractions
    ("3/4", Fraction(3, 4)), ("6/8", Fraction(3, 4)), ("0.75", Fraction(3, 4)), (".75", Fraction(3, 4)),
    (r"\frac{3}{4}", Fraction(3, 4)), (r"\dfrac{3}{4}", Fraction(3, 4)), (r"\tfrac34", Fraction(3, 4)),
    (r"\frac 3 4", Fraction(3, 4)), (r"-\frac{3}{4}", Fraction(-3, 4)), (r"\frac{-3}{4}", Fraction(-3, 4)),
    (r"\frac{ 3 }{ 4 }", Fraction(3, 4)), (r"1\frac{1}{2}", Fraction(3, 2)), (r"-1\frac{1}{2}", Fraction(-3, 2)),
    (r"2\dfrac12", Fraction(5, 2)), ("8/2", 4),
    # exponents of ten
    ("1e3", 1000), ("2.5E-1", Fraction(1, 4)), ("1e3/4", 250), ("10^3", 1000),
    # units
    ("$18", 18), (r"\$1{,}000.00", 1000), ("18 dollars", 18), (r"12 \text{ dollars}", 12), (r"18\text{cm}^2", 18),
    (r"18\ \mathrm{km}", 18), ("5%", 5), (r"5\%", 5), (r"5^\circ", 5), (r"5^{\circ}", 5), ("5°", 5), ("5 degrees", 5),
    (r"\text{12}", 12), (r"\textbf{12}", 12), (r"\mathbf{12}", 12), ("**12**", 12), (r"\left 12 \right", 12),
    ("x = 5", 5), ("n=-5", -5),
    # no numbers: compared verbatim
    ("18x", "18x"), ("2 pi", "2pi"), (r"2\pi", r"2\pi"), ("1,23", "1,23"), ("1,2,3", "1,2,3"), ("(1, 2)", "(1,2)"),
    ("1/0", "1/0"), (r"\frac{1}{0}", r"\frac{1}{0}"), ("--5", "--5"), ("1/2/3", "1/2/3"),
    (r"3 \text{ or } 4", "3or4"), (r"\text{A}", "A"), (r"\frac{\sqrt{3}}{2}", r"\frac{\sqrt{3}}{2}"), 
    ("twelve", "twelve"), ("٣", "٣"), ("1e1000", "1e1000"), ("", ""),
])  # fmt: skip
def test_numbers_are_read_exactly_and_nothing_else_is_a_number(text, number):
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
def test_boxed_takes_the_last_balanced_box(text, found):
    assert extract(text, "boxed") == found


@pytest.mark.parametrize("text, found", [
    ("so it is 18.\n#### 18", "18"), ("####18", "18"), ("#### 1,234", "1,234"), ("#### $18 eggs\nfoo", "$18 eggs"),
    ("#### 5\nno:\n#### 6", "6"), ("####\n7", "7"), ("#### ", None), ("18", None), ("### 18", None),
])  # fmt: skip
def test_gsm8k_takes_the_line_behind_the_last_hashes(text, found):
    assert extract(text, "gsm8k") == found


@pytest.mark.parametrize("text, found", [
    ("The answer is 5-3=2", "2"), ("It costs $1,234.50.", "1,234.50"), ("between 5-7", "7"), ("it is -7", "-7"),
    ("(-7)", "-7"), ("8 - 3", "3"), ("3 + 4 = 7 apples", "7"), ("x2 is 5, x3 is not", "5"), ("5 cm^2", "5"),
    ("5 cm^{2}", "5"), ("5 m^{-2}", "5"), ("5 m^-2", "5"), ("1e3", "1e3"), ("**18**", "18"),
    ("1, 2, 3", "3"), ("12 of 3/4", "3/4"), (r"\(\frac{1}{2}\)", r"\frac{1}{2}"), ("wait...5", "5"), ("it is .5", ".5"),
    ("5%", "5"), ("no number at all", None), ("GPT4", None), ("", None),
])  # fmt: skip
def test_integer_takes_the_last_number(text, found):
    assert extract(text, "integer") == found


@pytest.mark.parametrize("text, found", [
    ("3+5=8; 8*2=6; >6", "6"), ("3+5=8; > 6<|end|>", "6"), (">5; >6", "6"), (">66", "66"), ("3+5=8", None), ("", None),
    (">", None), ("> so 3", None),
])  # fmt: skip
def test_toy_takes_the_last_number_behind_an_arrow(text, found):
    assert extract(text, "toy") == found


@pytest.mark.parametrize("text, found", [
    (r"\boxed{5} #### 6 7", "5"), ("#### 6 7", "6 7"), ("it is 7", "7"), (r"7 \boxed{", None), ("#### 5</think>7", "7"),
    ("#### 18\nI checked it 3 times.", "18"), ("#### Final answer\nThe answer is 18.", "18"),
    ("#### Step 1\n3+4=7\n#### Final Answer\n**7**", "7"), ("#### Final answer: 18", "Final answer: 18"),
    ("It costs 5 million.", "5 million"),
    ("That is 3\\times10^5 now", "3\\times10^5"), ("so x = - 5", "- 5"), ("3 1/2 cups", "3 1/2"),
])  # fmt: skip
def test_auto_prefers_box_then_hashes_then_the_last_number(text, found):
    assert extract(text, "auto") == found


def test_an_answer_is_right_if_it_means_the_same():
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
resource.setrlimit(resource.RLIMIT_CPU, (40, 40))
from plumbing import algebra
from verify import grade
algebra.TIME_LIMIT = 2
M = 60_000
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
    "<think>" * M, "**" * M, "**a" * M, r"\(" * M, r"\(()" * M, "$a" * M, "1 " * M, "1 1/" * M, "3 million " * M,
    "= - " * M, r"\frac " * M, r"\frac1" * M, "\xb0" * M, "degrees " * M, "1{,}" * M, "10^{-" * M, " ^" * M,
    "1 x 10^" * M, r"\boxed{" + "9" * 500 + "^999}", r"\boxed{" + "a" * 999 + "}", r"\boxed{" + "cm " * 330 + "}",
]
for text in texts:
    for verifier in ("boxed", "gsm8k", "integer", "toy", "auto"):
        assert not grade(text, "5.5", verifier), (text[:40], verifier)
assert not grade("5", "9" * M, "integer") and not grade("5", "1" + " " * 1000 + "!", "integer")  # a hostile answer
"""


def test_hostile_texts_are_wrong_in_bounded_time(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", HOSTILE], cwd=tmp_path, env=environment, capture_output=True,
                          timeout=200)  # fmt: skip
    assert done.returncode == 0, done.stderr[-500:]
    assert not any(tmp_path.iterdir())


# --------------------------------------------------------------------------------------------------
# The hard list: pairs that graders are known to get wrong; the last of EQUAL need math-verify

EQUAL = [
    ("- 5", "-5"), ("−5", "-5"), ("+5", "5"), ("5.", "5"), ("05", "5"), ("1{,}000", "1000"),
    (r"1\,000", "1000"), ("1 000 000", "1000000"), ("1,000.50", "1000.5"), ("(5)", "5"),
    ("{5}", "5"), ("$5$", "5"), (r"\(5\)", "5"), (r"\[5\]", "5"), (r"\boxed{5}", "5"),
    ("**5**", "5"), (r"\text{5}", "5"), ("x = -5", "-5"), ("x=-5", "-5"), ("x_1 = 3", "3"),
    ("Area = 12", "12"), ("The answer is 18", "18"), ("Final answer: 18", "18"),
    (r"\frac7{12}", "7/12"), (r"\frac{7}8", "7/8"), (r"\frac 7 8", "7/8"), ("3 1/2", "7/2"),
    (r"3\frac12", "3.5"), (r"3 \frac{1}{2}", "7/2"), ("-3 1/2", "-3.5"), ("½", "1/2"),
    ("3½", "3.5"), (r"-\frac{1}{2}", r"\frac{-1}{2}"), (r"\frac{1}{-2}", "-0.5"),
    (r"\frac{1,000}{3}", "1000/3"), (r"\dfrac{9}{3}", "3"), ("10^3", "1000"), ("10^{3}", "1000"),
    ("2^{10}", "1024"), ("10^{-2}", "0.01"), (r"3\times10^5", "300000"),
    (r"3 \times 10^{5}", "300000"), ("3 x 10^5", "300000"), ("3×10^5", "3e5"),
    (r"1.5 \cdot 10^{-3}", "0.0015"), ("10³", "1000"), ("5 cm^2", "5"), ("5 cm²", "5"),
    (r"5\text{ cm}^2", "5"), (r"5 \mathrm{cm}^{2}", "5"), ("37°C", "37"), (r"37^\circ C", "37"),
    (r"37^{\circ}", "37"), ("37 degrees", "37"), ("€5", "5"), ("£5", "5"), ("$5", "5"),
    ("-$5", "-5"), ("$-5", "-5"), ("5$", "5"), ("5 USD", "5"), ("5 million", "5000000"),
    ("5 million dollars", "5000000"), ("$5 million", "5,000,000"), ("5 square meters", "5 m^2"),
    ("1 km", "1000 m"), ("50 cents", "$0.50"), ("5 percent", "5%"), ("18 dollars per hour", "18"),
    ("60 km/h", "60"), ("18 eggs", "18"), ("2 hours", "120 minutes"), (r"5\%", "5"),
    ("5 m/s^2", "5"), ("(B)", "B"), (r"\text{(B)}", "B"), ("Yes", "yes"), (r"\text{Even}", "even"),
    ("B.", "B"), ("(1,2)", "( 1, 2 )"), (r"\dfrac{\pi}{2}", r"\frac{\pi}{2}"),
    (r"\left(1,2\right)", "(1,2)"), (r"(-\infty, 3]", r"\left(-\infty,3\right]"), ("2^{-1}", "1/2"),
    (r"0.\overline{3}", r"\frac13"), (r"\frac{10}{4}", r"\frac{5}{2}"),
]  # fmt: skip
EQUAL_BY_ALGEBRA = [
    (r"\sqrt{4}", "2"), ("x^2-1", "(x-1)(x+1)"), (r"\frac{\sqrt{3}}{2}", r"\frac{1}{2}\sqrt{3}"),
    (r"2\pi", r"\pi\cdot 2"), (r"\{1,2\}", r"\{2,1\}"), (r"\frac{x}{2}", r"\frac12 x"),
    ("y=2x+1", "y = 1+2x"), (r"\sqrt{12}", r"2\sqrt{3}"), (r"\binom{5}{2}", "10"), ("5!", "120"),
    (r"\log_2 8", "3"), ("1+i", "i+1"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{bmatrix}1\\2\end{bmatrix}"), ("2*3", "6"),
    ("3+4", "7"), (r"x \in [1,2]", "[1,2]"), (r"x=5 \text{ or } x=3", "3, 5"), ("e^{2}", "e^2"),
    (r"\frac{3\pi}{4}", r"\frac34\pi"), ("3x+2", "2+3x"),
]  # fmt: skip
DIFFERENT = [
    (r"1\text{ or }2", "12"), (r"2\text{ ft }6\text{ in}", "26"), ("5 million", "5"),
    ("2xy", "2ab"), ("2xy", "2"), ("2x", "2"), ("18x", "18"), ("2 pi", "2"), (r"2\pi", "2"),
    ("10^3", "10"), ("10^3", "103"), ("10^{-3}", "1000"), ("-5", "5"), ("5 - 3", "-3"),
    ("5-3", "53"), (r"1\;2", "12"), (r"1\,2", "12"), ("1 2", "12"), ("5$10", "510"),
    ("50%5", "505"), ("1,2", "12"), ("1,23", "123"), ("(1,234)", "1234"), ("3 1/2", "31/2"),
    ("3 1/2", "1.5"), ("5 km", "5 m"), ("5 cm", "5 cm^2"), ("$5", "€5"), ("$5", "5 cents"),
    ("37°C", "37°F"), ("50%", "0.5"), ("5 apples", "5 oranges"), ("x = 5", "y = 5"),
    ("2x = 5", "5"), ("x^2 = 5", "5"), ("3:4", "34"), ("12:30", "1230"), ("1.2.3", "1.23"),
    ("5 or 6", "5"), ("5 and 6", "56"), ("5, 6", "56"), ("5, 6", "5"), ("0.333", "1/3"),
    ("0.7500001", "3/4"), ("3.14", r"\pi"), ("3.1416", r"\pi"), ("1e3", "13"), ("5e", "5"),
    ("5!", "5"), (r"\sqrt{5}", "5"), (r"5\sqrt{2}", "52"), (r"5\sqrt{2}", "5"), ("5^2", "52"),
    ("5_2", "52"), ("101_2", "101"), ("a", "b"), ("A", "B"), ("A", "a"), ("yes", "no"),
    ("(a, b)", "(b, a)"), (r"\{1,2\}", r"\{1,3\}"), ("[1,2)", "[1,2]"), ("(1,2)", "[1,2]"),
    ("x+1", "x-1"), ("x^2", "2x"), ("x>5", "x<5"), (r"x \geq 5", "x > 5"), (r"\frac{1}{2}", "12"),
    (r"\frac{a}{b}", r"\frac{b}{a}"), ("12345678901234567890", "12345678901234567891"),
    ("1.0000001", "1"), ("5 dozen", "5 hundred"), (r"\sin x", r"\cos x"), ("n", "5"),
    ("five", "5 apples"), ("1,000", "1"), ("1.000,50", "1000.5"), ("5i", "5"), ("i", "1"),
    (r"\infty", r"-\infty"), ("7 remainder 2", "7"), ("5 to 6", "5"), ("more than 5", "5"),
    ("5+", "5"), ("±5", "5"), (r"\pm 5", "5"), ("5 less", "5"), ("100", "1e3"), ("none", "0"),
    ("0", "-"),
]  # fmt: skip


@pytest.fixture
def no_math_verify(monkeypatch):
    monkeypatch.setattr(algebra, "HAS_MATH_VERIFY", False)
    algebra.algebra.cache_clear()
    yield
    algebra.algebra.cache_clear()


@pytest.mark.parametrize("one, other", EQUAL)
def test_equal_answers_are_equal_without_math_verify(no_math_verify, one, other):
    assert same(one, other) is True
    assert same(other, one) is True


@pytest.mark.parametrize("one, other", EQUAL_BY_ALGEBRA)
def test_equal_formulas_are_equal_by_math_verify(one, other):
    assert same(one, other) is True
    assert same(other, one) is True


@pytest.mark.parametrize("one, other", DIFFERENT)
def test_different_answers_are_different(one, other):
    assert same(one, other) is False
    assert same(other, one) is False


def test_what_only_math_verify_could_compare_is_undecided_without_it(no_math_verify):
    row = judge(r"\boxed{(x-1)(x+1)}", "x^2-1", "auto")
    assert row["undecided"] and not row["correct"]
    assert same("x^2-1", "x^2-1") is True
    for found in ("7", "no", "18 eggs"):  # no algebra is needed to see that these are wrong
        assert "undecided" not in judge(rf"\boxed{{{found}}}", "5", "auto")


def test_math_verify_agrees_about_the_answers_of_gsm8k_as_people_write_them():
    """math-verify itself is the oracle: every form of a number against that and another number."""
    from math_verify import parse
    from math_verify import verify as check

    forms = ["{}", "{}.00", "{:,}", r"\frac{{{}}}{{1}}", "{} \\text{{ dollars}}", r"{}\%", "${}$", "x={}"]
    for number in (0, 7, 18, -3, 540, 1200, 70000):
        for form in forms[: len(forms) if number >= 0 else 5]:  # it reads -3% as another number than -3
            text = form.format(number)
            for reference in (number, number + 1, -number or 5):
                theirs = check(parse(f"${reference}$"), parse(rf"\boxed{{{text}}}"))
                assert grade(rf"\boxed{{{text}}}", str(reference), "auto") == theirs, (text, reference)


def test_a_formula_that_takes_too_long_is_wrong(monkeypatch):
    monkeypatch.setattr(algebra, "TIME_LIMIT", 0.5)
    algebra.algebra.cache_clear()
    assert same("x+1", "1+x") is True  # the child has started
    started = time.time()
    assert same("9^{9^{9^{9^{9}}}}+x", "5+x") is False
    assert time.time() - started < 10
    monkeypatch.setattr(algebra, "TIME_LIMIT", 10)
    assert same("x+2", "2+x") is True  # by a new child


def test_a_child_that_dies_is_replaced():
    assert same("x+3", "3+x") is True
    algebra.CHILD.process.kill()
    algebra.CHILD.process.wait()
    assert same("x+4", "4+x") is True


# --------------------------------------------------------------------------------------------------
# Thoughts


@pytest.mark.parametrize(
    "text, thinking, kind, correct",
    [
        ("<think>3+4=7</think>7", False, "valid", True),
        ("3+4=7</think>7", True, "valid", True),
        ("3+4=7</think>7", False, "valid", True),  # the template's <think> went unseen
        ("<think>\n\n</think>\n7", False, "empty", True),
        ("</think>7", True, "empty", True),
        ("<think>3+4=7", False, "unclosed", False),
        ("3+4=7", True, "unclosed", False),  # cut off, and <think> stands in the prompt
        ("3+4=7</think>7<think>or 7", True, "unclosed", False),
        ("3+4=7", False, "missing", True),
    ],
)
def test_thoughts_are_named_and_hold_no_answer(text, thinking, kind, correct):
    row = judge(text, "7", "auto", thinking)
    assert (row["thoughts"], row["correct"]) == (kind, correct)


def test_a_prompt_that_ends_in_an_open_thought_is_known():
    assert opens_thoughts("<|im_start|>assistant\n<think>\n")
    assert not opens_thoughts("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert not opens_thoughts("What does <think> mean?\n<|im_start|>assistant\n")


# --------------------------------------------------------------------------------------------------
# References


@pytest.mark.parametrize("answer", [r"\boxed{5}", r"\( 5 \)", "$5$", " 5 ", r"\boxed{\frac{10}{2}}", "5 dollars"])
def test_a_reference_in_a_wrapper_is_matched(answer):
    assert grade("so it is 5", answer, "auto") and unmatchable(answer, "integer") is None


@pytest.mark.parametrize(
    "answer, verifier, why",
    [
        ("", "auto", "empty"),
        (" ", "boxed", "empty"),
        (r"\boxed{}", "auto", "empty"),
        (r"\( \)", "auto", "empty"),
        ("7 + 11 = 18\n#### 18", "auto", "####"),
        ("x" * 1001, "auto", "1000"),
        ("x+1", "integer", "not a number"),
        ("twelve", "toy", "not a number"),
    ],
)
def test_a_reference_that_nothing_can_match_is_known(answer, verifier, why):
    assert why in unmatchable(answer, verifier)
    assert not grade(answer, answer, verifier) or verifier == "auto"


@pytest.mark.parametrize(
    "text, reference",
    [
        ("**Tuesday**", "Tuesday"),
        (r"Factoring, we get $(x-1)(x+1)$.", "x^2-1"),
        (r"so \(f(x) = x+1\) at last", "x+1"),
        ("The answer is **7**.", "7"),
        ("**Step 2:** it is 7", "7"),
    ],
)
def test_auto_reads_bold_and_formulas_where_the_reference_is_no_number(text, reference):
    assert grade(text, reference, "auto")
