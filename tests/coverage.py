"""How often do the 95 % intervals of intervals.py hold the truth? The table of docs/EVAL.md.

    python tests/coverage.py --draws=4000        # half a minute on one core

Problems are equally hard, or their shares of right answers follow a beta distribution with mean p
and a + b = 2 or 0.5 (most problems then are almost always right or almost always wrong).
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import intervals  # noqa: E402
from plumbing.config import command  # noqa: E402


@dataclass
class Config:
    draws: int = 4000  # simulated evaluations in each cell
    seed: int = 1  # of the simulation


def bounds(counts, m):
    """The intervals of intervals.accuracy for many evaluations at once. counts (draws, problems):
    how many of m answers are right -> low, high (draws,)."""
    draws, n = counts.shape
    p = counts.mean(1) / m
    size = np.full(draws, float(n))
    if m > 1:
        means = np.concatenate([counts / m, np.ones((draws, 1)), np.zeros((draws, 1))], axis=1)
        groups = n + 2
        between = m * ((means - means.mean(1, keepdims=True)) ** 2).sum(1) / (groups - 1)
        within = m * (means * (1 - means)).sum(1) / (groups * (m - 1))
        r = np.clip((between - within) / (between + (m - 1) * within), 0, 1)
        size = n * m / (1 + (m - 1) * r)
    z = intervals.Z
    centre = (p + z * z / (2 * size)) / (1 + z * z / size)
    half = z / (1 + z * z / size) * np.sqrt(p * (1 - p) / size + z * z / (4 * size**2))
    return np.minimum(p, np.maximum(0, centre - half)), np.maximum(p, np.minimum(1, centre + half))


def covered(rng, draws, n, m, p, spread):
    """The share of simulated evaluations whose interval holds p, and the mean width."""
    of_problem = np.full((draws, n), p)
    if spread:
        of_problem = rng.beta(p * spread, (1 - p) * spread, (draws, n))
    low, high = bounds(rng.binomial(m, of_problem), m)
    return float(((low <= p) & (p <= high)).mean()), float((high - low).mean())


def main(**given):
    """Print the table -> {(spread, p, problems, samples): coverage}."""
    cfg = Config(**given)
    rng = np.random.default_rng(cfg.seed)
    table = {}
    columns = [(n, m) for n in (30, 100, 300) for m in (1, 4, 16)]
    print("| problems differ | p | " + " | ".join(f"{n} x {m}" for n, m in columns) + " |")
    print("|---" * (len(columns) + 2) + "|")
    for spread, name in ((0, "not at all"), (2.0, "much"), (0.5, "very much")):
        for p in (0.5, 0.1, 0.98, 0.01):
            cells = []
            for n, m in columns:
                table[spread, p, n, m], _ = covered(rng, cfg.draws, n, m, p, spread)
                cells.append(f"{table[spread, p, n, m]:.3f}")
            print(f"| {name} | {p} | " + " | ".join(cells) + " |", flush=True)
    return table


if __name__ == "__main__":
    command(main, Config)
