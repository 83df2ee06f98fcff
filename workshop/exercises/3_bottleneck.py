"""Exercise 3: move the bottleneck.

What if another step were the bottleneck? `trajectory` is what train.py recorded,

    trajectory[step]["logprob"]   (n_tokens,) confidence in every token of the data, nats; nan at
                                  the tokens of prompts, which nobody predicts

and `response` is (n_tokens,) bool, True at response tokens. A token is an imitation anchor of a
step if its confidence there is more than `tau` above that of step 0. Return two numbers:

    share      of the response tokens, how many are anchors if `other` is the bottleneck, 0 to 1
    overlap    of the anchors of `step`, how many are anchors of `other` as well, 0 to 1

    python workshop/check.py 3
"""

import numpy as np


def move(trajectory, step, other, response, tau):
    raise NotImplementedError
