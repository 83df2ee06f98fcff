"""Exercise 2: write a rule.

T3S drops every imitation anchor from the loss. This rule drops fewer: in each response only the
half of its anchors that the student was least confident of at step 0. Of an odd number of anchors
the larger half goes (of 5 anchors 3); of equally confident ones the earlier goes first.

    moved           (n,) bool, the imitation anchors, of all responses one after the other
    start           (n,) confidence at step 0, nats (log-probabilities: never above 0)
    response_spans  (examples, 2): example i has the tokens response_spans[i, 0] up to, not
                    including, response_spans[i, 1]
    rng             numpy generator, for rules that draw; this one does not

Return (n,) bool: True where a token leaves the loss. These are the arguments of every rule in
select.py, so the finished function can be pasted there.

    python workshop/check.py 2
"""

import numpy as np


def hardest_half(moved, start, response_spans, rng):
    raise NotImplementedError
