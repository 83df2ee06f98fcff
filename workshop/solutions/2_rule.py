"""Exercise 2: write a rule."""

import numpy as np


def hardest_half(moved, start, response_spans, rng):
    chosen = np.zeros_like(moved)
    for a, b in response_spans:
        anchors = a + np.flatnonzero(moved[a:b])
        # stable, so that of equal ones the earlier comes first
        order = np.argsort(start[anchors], kind="stable")
        half = (len(anchors) + 1) // 2
        chosen[anchors[order[:half]]] = True
    return chosen
