"""From graded answers to numbers with intervals that hold: near 0 and 1, and for 30 problems.

    mean, (low, high) = accuracy(right)          # right: one list of graded answers per problem
    difference, (low, high), p = paired(a, b)    # two models on the same problems

The problem is the unit (arXiv 2411.00640): answers to one problem resemble one another, so sixteen
answers to 30 problems are worth less than 480 problems, and it is estimated how much less.
docs/EVAL.md has the coverage of these intervals. Next: eval.py.

`right` is a list of lists of bools throughout: for each problem, whether each of its answers is right.
"""

import math
from fractions import Fraction

import numpy as np

Z = 1.959964  # 95 % of a normal distribution lie within so many standard deviations


# --------------------------------------------------------------------------------------------------
# One model


def accuracy(right):
    """avg@k, the mean over problems of the share of right answers, and its 95 % interval (low, high).

    Wilson's interval, for the number of independent answers that these are worth. It has a width
    at 0 and 1 too, where the normal approximation has none.
    """
    means = np.array([np.mean(answers) for answers in right], dtype=np.float64)
    mean = float(means.mean())
    return mean, wilson(mean, effective_size(right))


def wilson(p, n):
    """Wilson's score interval (1927) of a share p among n independent answers -> (low, high)."""
    scale = 1 + Z * Z / n
    centre = (p + Z * Z / (2 * n)) / scale
    variance = p * (1 - p) / n + Z * Z / (4 * n * n)
    half = Z / scale * math.sqrt(variance)
    low = max(0.0, centre - half)
    high = min(1.0, centre + half)
    return min(p, low), max(p, high)  # p lies in its own interval, whatever rounding says


def effective_size(right):
    """How many independent answers are these worth? From one a problem to all of them.

    n answers in groups of m are worth n / (1 + (m - 1) r), where r is the correlation of answers to
    the same problem, estimated by analysis of variance. One problem that is always right and one
    that never is are added for the estimate: where almost all problems are alike, a few others may
    have been missed by chance, and without this the interval is too narrow there.
    """
    sizes = np.array([len(answers) for answers in right], dtype=np.float64)
    problems = len(right)
    if sizes.max() == 1:
        return float(problems)
    means = np.array([np.mean(answers) for answers in right], dtype=np.float64)
    means = np.append(means, [1.0, 0.0])
    sizes = np.append(sizes, [sizes.mean()] * 2)
    groups = len(sizes)
    total = sizes.sum()
    grand = (sizes * means).sum() / total
    # mean squares between and within problems, as in a one-way analysis of variance
    apart = sizes * (means - grand) ** 2
    between = apart.sum() / (groups - 1)
    inside = sizes * means * (1 - means)
    within = inside.sum() / (total - groups)
    # the size of a group, if they are of several sizes
    uneven = (sizes**2).sum() / total
    m = (total - uneven) / (groups - 1)
    r = (between - within) / (between + (m - 1) * within)
    r = min(1.0, max(0.0, r))
    return float(problems * m / (1 + (m - 1) * r))


def pass_at_k(n, correct, k):
    """Unbiased probability that one of k answers is right, given `correct` right ones of n >= k
    (arXiv 2107.03374): 1 - C(n - correct, k) / C(n, k), as a product that cannot overflow."""
    return 1.0 - math.prod(1.0 - k / i for i in range(n - correct + 1, n + 1))


def pass_at_each_k(right):
    """{k: mean over problems of pass@k}, for every k up to the fewest answers of a problem. The last
    is cov@k, coverage, where every problem has as many: the share that was solved at least once."""
    most = min(len(answers) for answers in right)
    table = {}
    for k in range(1, most + 1):
        each = [pass_at_k(len(answers), sum(answers), k) for answers in right]
        table[k] = float(np.mean(each))
    return table


def coverage(right):
    """cov@k: the share of problems with a right answer among all of theirs."""
    return float(np.mean([any(answers) for answers in right]))


def majority(votes):
    """maj@k: the share of problems whose most frequent answer is right. Ties count in part.

    votes: per problem a list of (meaning of the answer or None, is it right). An answer that cannot
    be read has no vote.
    """
    shares = []
    for answers in votes:
        counts = {}
        verdicts = {}
        for meaning, correct in answers:
            if meaning is None:
                continue
            counts[meaning] = counts.get(meaning, 0) + 1
            verdicts[meaning] = correct
        winners = [meaning for meaning, n in counts.items() if n == max(counts.values())]
        shares.append(np.mean([verdicts[meaning] for meaning in winners]) if winners else 0.0)
    return float(np.mean(shares))


def grades_by_problem(rows, twins=None):
    """{problem id: is each of its answers right}. twins: {id: the id of an equal problem}, whose
    answers count as answers to one problem."""
    right = {}
    for row in rows:
        name = (twins or {}).get(row["id"], row["id"])
        right.setdefault(name, []).append(bool(row["correct"]))
    return right


def by_problem(rows, key="correct"):
    """{problem id: mean of `key` over its samples}"""
    values = {}
    for row in rows:
        values.setdefault(row["id"], []).append(float(row[key]))
    return {problem: float(np.mean(several)) for problem, several in values.items()}


def mean_interval(values):
    """Mean and half the width of its 95 % interval, of numbers that are no shares (nats): 1.96
    standard errors; nan for one value."""
    values = np.asarray(values, dtype=np.float64)
    error = math.nan
    if len(values) > 1:
        error = values.std(ddof=1) / math.sqrt(len(values))
    return float(values.mean()), float(Z * error)


# 97.5 % points of Student's t with 1, 2, ... degrees of freedom; beyond, a close approximation
T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179)


def few(values):
    """Mean and half its 95 % interval, of values from a few students or trainings.

    They are few, so it is Student's t: the interval of three is wide, as it should be; nan for one.
    """
    values = np.asarray(values, dtype=np.float64)
    n = len(values)
    if n == 1:
        return float(values[0]), math.nan
    t = T_975[n - 2] if n - 2 < len(T_975) else 1.96 + 2.4 / (n - 1)
    return float(values.mean()), float(t * values.std(ddof=1) / math.sqrt(n))


# --------------------------------------------------------------------------------------------------
# Two models on the same problems: that cancels how hard the problems are


def paired(first, second):
    """How much better is the second? -> (difference, (low, high), p-value).

    The interval is Bonett and Price's (2012), one problem gained and one lost added to what was
    seen, each as large as the difference of a single answer; it has a width even if the models
    never differ. The p-value is exact: were both models alike, each problem's difference might as
    well have the other sign.
    """
    differences = []
    answers = 0
    for one, other in zip(first, second, strict=True):
        change = Fraction(sum(other), len(other)) - Fraction(sum(one), len(one))
        differences.append(change)
        answers += 2 / (1 / len(one) + 1 / len(other))
    values = np.array([float(change) for change in differences])
    n = len(values)
    step = 1 / math.sqrt(answers / n)
    mean = values.sum() / (n + 2)
    squares = (values**2).sum() + 2 * step**2
    spread = squares / (n + 2) - mean**2
    half = Z * math.sqrt(spread / (n + 2))
    difference = float(values.mean())
    # the difference lies in its own interval, and no share differs by more than 1
    low = min(difference, mean - half)
    high = max(difference, mean + half)
    return difference, (max(-1.0, low), min(1.0, high)), sign_flip_p(differences)


def sign_flip_p(differences):
    """Two-sided p-value of a sum of differences (Fractions) if each might have the other sign.

    Exact: the distribution of the sum over all signs, one difference after the other. If the
    differences have no common step that leaves few enough sums, 20,000 random signs instead.
    """
    total = sum(differences)
    sizes = [abs(change) for change in differences if change]
    if not sizes:
        return 1.0
    unit = math.lcm(*(change.denominator for change in sizes))
    steps = [int(change * unit) for change in sizes]
    reach = sum(steps)
    if reach > 200_000:
        return sampled_p([float(change) for change in sizes], abs(float(total)))
    chance = np.zeros(2 * reach + 1)  # of every sum from -reach to reach
    chance[reach] = 1.0
    for step in steps:
        # steps only ever add up to `reach`, so nothing is rolled over the edge
        up = np.roll(chance, step)
        down = np.roll(chance, -step)
        chance = (up + down) / 2
    seen = abs(int(total * unit))
    below = chance[: reach - seen + 1].sum()
    above = chance[reach + seen :].sum()
    return float(min(1.0, below + above))


def sampled_p(sizes, seen, draws=20_000):
    signs = np.random.default_rng(0).integers(0, 2, (draws, len(sizes)), dtype=np.int8) * 2 - 1
    sums = np.abs(signs @ np.array(sizes))
    return float((1 + (sums >= seen - 1e-12).sum()) / (draws + 1))
