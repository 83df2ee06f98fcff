"""How often does a pilot of online.py end too early, and how late does it end? A table from simulated curves.

    python tests/false_alarms.py --draws=1000        # a minute on one core
    python tests/false_alarms.py --looks=1 --errors=1.5   # another rule

A simulated pilot looks ten times. At each look every problem is answered once, right with its own
probability: those of a step have the mean that the curve says, and spread over the problems as a beta
distribution does (a + b = 2; some problems are hard and stay so). The rule is asked after each look.

    flat        0.70 throughout: whatever ends it is a false alarm
    falling     0.70 down to 0.25, for ever: as well
    plateau     0.70, 0.30 from the fifth look on: it has a lowest look, but nothing comes behind it
    two dips    0.55 at the third look, back to 0.65, then 0.30 at the eighth: the first dip is not the bottleneck
    shallow     0.70, 0.62 at the fifth look, 0.70 again from the eighth on
    turning     0.70, 0.30 at the sixth look, 0.65 at the last: the demo's SFT

    ended       share of the pilots that the rule ended; early: before the bottleneck, or where there is none behind
    looks       from the bottleneck's look to the end, mean over those that ended behind it (2 is the least)
    off by      looks between the bottleneck that was named and the true one, mean over the same
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import online  # noqa: E402
from plumbing.config import command  # noqa: E402

# name -> (look, mean accuracy) of its corners, straight lines between; the bottleneck's look, if there is one
CURVES = {
    "flat": ([(0, 0.7), (9, 0.7)], None),
    "falling": ([(0, 0.7), (9, 0.25)], None),
    "plateau": ([(0, 0.7), (4, 0.3), (9, 0.3)], None),
    "two dips": ([(0, 0.7), (2, 0.55), (4, 0.65), (7, 0.3), (9, 0.5)], 7),
    "shallow": ([(0, 0.7), (4, 0.62), (7, 0.7), (9, 0.7)], 4),
    "turning": ([(0, 0.7), (2, 0.66), (5, 0.3), (6, 0.36), (9, 0.65)], 5),
}
PROBLEMS = (50, 100, 200, 400)
SPREAD = 2.0  # a + b of the beta distribution


@dataclass
class Config:
    draws: int = 1000  # simulated pilots in each cell
    seed: int = 1  # of the simulation
    looks: int = online.LOOKS  # the rule's two constants
    errors: float = online.ERRORS


def pilot(rng, corners, n):
    """One simulated pilot -> {look: (n,) 0 or 1}."""
    looks, means = zip(*corners, strict=True)
    level = np.interp(range(10), looks, means)
    # each problem keeps its place among the others: hard ones are hard at every look
    place = rng.random(n)
    return {i: (rng.random(n) < quantiles(level[i])[(place * 1000).astype(int)]).astype(float) for i in range(10)}


def quantiles(mean, known={}):  # noqa: B006 (a cache)
    """A thousand quantiles of the beta distribution with that mean."""
    if mean not in known:
        drawn = np.random.default_rng(0).beta(mean * SPREAD, (1 - mean) * SPREAD, 100_000)
        known[mean] = np.quantile(drawn, (np.arange(1000) + 0.5) / 1000)
    return known[mean]


def ends(watched):
    """Look by look, as online.is_over asks -> (the look at which it ended, the bottleneck it named) or None."""
    for last in range(1, 10):
        lowest = online.passed_bottleneck({i: watched[i] for i in range(last + 1)})
        if lowest is not None:
            return last, lowest
    return None


def cell(rng, name, n, draws):
    """-> {"ended", "early": shares; "looks", "off": means, nan if none ended}."""
    corners, bottleneck = CURVES[name]
    found = [ends(pilot(rng, corners, n)) for _ in range(draws)]
    ended = [one for one in found if one is not None]
    true = 10 if bottleneck is None else bottleneck
    behind = [(last, lowest) for last, lowest in ended if last > true]
    return {
        "ended": len(ended) / draws,
        "early": (len(ended) - len(behind)) / draws,
        "looks": float(np.mean([last - true for last, _ in behind])) if behind else float("nan"),
        "off": float(np.mean([abs(lowest - true) for _, lowest in behind])) if behind else float("nan"),
    }


def main(**given):
    """Print the table -> {(curve, problems): cell}."""
    cfg = Config(**given)
    before = online.LOOKS, online.ERRORS
    online.LOOKS, online.ERRORS = cfg.looks, cfg.errors
    rng = np.random.default_rng(cfg.seed)
    table = {(name, n): cell(rng, name, n, cfg.draws) for name in CURVES for n in PROBLEMS}
    online.LOOKS, online.ERRORS = before
    print("| curve | problems | ended | early | looks | off by |\n|---|---|---|---|---|---|")
    for (name, n), found in table.items():
        text = [f"{found[key]:.3f}" for key in ("ended", "early")]
        text += ["-" if found[key] != found[key] else f"{found[key]:.1f}" for key in ("looks", "off")]
        print(f"| {name} | {n} | {' | '.join(text)} |")
    return table


if __name__ == "__main__":
    command(main, Config)
