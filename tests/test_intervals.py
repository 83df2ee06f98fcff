"""intervals.py: numbers with intervals that hold, against enumeration and simulation."""

import itertools
import math

import numpy as np
import pytest

import intervals


def test_pass_at_k_is_the_mean_over_all_subsets():
    for n in range(1, 7):
        for correct in range(n + 1):
            answers = [1] * correct + [0] * (n - correct)
            for k in range(1, n + 1):
                subsets = list(itertools.combinations(answers, k))
                expected = sum(any(s) for s in subsets) / len(subsets)
                assert intervals.pass_at_k(n, correct, k) == pytest.approx(expected, abs=1e-12)


def test_pass_at_1_is_the_accuracy_and_at_all_samples_the_coverage():
    right = np.random.default_rng(0).random((20, 5)) < 0.3
    table = intervals.pass_at_each_k(right.tolist())
    assert list(table) == [1, 2, 3, 4, 5]
    assert table[1] == pytest.approx(right.mean())
    assert table[5] == pytest.approx(right.any(1).mean()) == intervals.coverage(right.tolist())


def test_the_majority_is_the_most_frequent_answer_and_ties_count_in_part():
    votes = [
        [("5", True), ("5", True), ("6", False)],
        [("5", True), ("6", False), ("6", False)],
        [("5", True), ("6", False)],  # half
        [(None, False), (None, False), ("7", True)],  # no vote for what cannot be read
        [(None, False)],
    ]
    assert intervals.majority(votes) == pytest.approx((1 + 0 + 0.5 + 1 + 0) / 5)


def test_wilson_solves_its_equation():
    """The ends of the score interval are where |p - q| is 1.96 standard errors of q itself."""
    for p, n in ((0.3, 30), (0.0, 10), (1.0, 7), (0.5, 200)):
        for q in intervals.wilson(p, n):
            if 0 < q < 1:
                assert abs(p - q) == pytest.approx(1.959964 * math.sqrt(q * (1 - q) / n))


def test_an_interval_has_a_width_where_all_or_none_are_right():
    for right in ([[True] * 4] * 30, [[False]] * 30):
        mean, (low, high) = intervals.accuracy(right)
        assert low <= mean <= high and 0.01 < high - low < 0.2


def test_sixteen_equal_answers_are_worth_one():
    rng = np.random.default_rng(0)
    alike = (rng.random((50, 1)) < 0.5).repeat(16, 1)  # each problem always right or never
    apart = rng.random((50, 16)) < 0.5
    assert intervals.effective_size(alike.tolist()) == pytest.approx(50, rel=0.02)
    assert intervals.effective_size(apart.tolist()) > 300


@pytest.mark.parametrize("spread", [None, 2.0, 0.5])
@pytest.mark.parametrize("p", [0.5, 0.1, 0.98, 0.01])
def test_95_percent_intervals_cover_the_truth(p, spread):
    """30 problems with 4 answers each, all equally hard or of a beta distribution; docs/EVAL.md has more."""
    rng = np.random.default_rng(1)
    covered = 0
    draws = 300
    for _ in range(draws):
        of_problem = np.full(30, p) if spread is None else rng.beta(p * spread, (1 - p) * spread, 30)
        right = rng.random((30, 4)) < of_problem[:, None]
        _, (low, high) = intervals.accuracy(right.tolist())
        covered += low <= p <= high
    assert covered / draws > 0.9


def test_an_interval_of_numbers_is_1_96_standard_errors():
    values = [0.0, 1.0, 0.5, 1.0, 0.25]
    mean = sum(values) / 5
    error = math.sqrt(sum((v - mean) ** 2 for v in values) / 4 / 5)
    assert intervals.mean_interval(values) == pytest.approx((mean, 1.959964 * error), abs=1e-12)
    mean, interval = intervals.mean_interval([0.5])
    assert mean == 0.5 and math.isnan(interval)


# --------------------------------------------------------------------------------------------------
# Two models


def all_signs(differences):
    total = abs(sum(differences))
    sums = [abs(sum(s * d for s, d in zip(signs, differences, strict=True)))
            for signs in itertools.product((1, -1), repeat=len(differences))]  # fmt: skip
    return sum(value >= total - 1e-12 for value in sums) / len(sums)


def test_the_p_value_is_that_of_all_signs():
    rng = np.random.default_rng(3)
    for samples in (1, 3, 4):
        one = rng.random((9, samples)) < 0.4
        other = rng.random((9, samples)) < 0.7
        _, _, p = intervals.paired(one.tolist(), other.tolist())
        assert p == pytest.approx(all_signs(list(other.mean(1) - one.mean(1))))


def test_of_single_answers_the_p_value_is_mcnemars():
    gained, lost = 9, 2
    one = [[False]] * gained + [[True]] * lost + [[True]] * 19
    other = [[True]] * gained + [[False]] * lost + [[True]] * 19
    binomial = 2 * sum(math.comb(11, k) for k in range(lost + 1)) / 2**11
    difference, (low, high), p = intervals.paired(one, other)
    assert p == pytest.approx(binomial) and difference == pytest.approx(7 / 30)
    # Bonett and Price (2012)
    a, b, n = (gained + 1) / 32, (lost + 1) / 32, 32
    half = 1.959964 * math.sqrt((a + b - (a - b) ** 2) / n)
    assert (low, high) == pytest.approx((a - b - half, a - b + half))


def test_random_signs_where_all_would_be_too_many():
    rng = np.random.default_rng(0)
    sizes = rng.random(12)
    exact = all_signs(list(sizes * np.array([1, 1, 1, -1] * 3)))
    seen = abs((sizes * np.array([1, 1, 1, -1] * 3)).sum())
    assert intervals.sampled_p(sizes, seen) == pytest.approx(exact, abs=0.02)


def test_models_that_never_differ_have_an_interval_around_0_and_p_1():
    difference, (low, high), p = intervals.paired([[True]] * 30, [[True]] * 30)
    assert difference == 0 and p == 1 and low < 0 < high < 0.2
