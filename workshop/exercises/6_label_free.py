"""Exercise 6: find the bottleneck without answers.

Train accuracy needs answers, a verifier and sampling. The recorded confidences are there in any
case. In two functions:

fall(confidence)
    confidence   (recorded steps, n) of every response token, nats; the first row is step 0
    Return (recorded steps,): how far the tokens below their start have fallen, the mean over all
    n response tokens (those that are not below their start count 0). Nowhere above 0.

turn(steps, curve)
    steps        (recorded steps,) their numbers, ascending
    curve        (recorded steps,) what fall returned
    Return the step at which the curve is lowest, the earliest of equally low ones; None if there is
    no such thing as a bottleneck: if nothing ever fell, or if the curve still fell at the end.

    python workshop/check.py 6
"""

import numpy as np


def fall(confidence):
    raise NotImplementedError


def turn(steps, curve):
    raise NotImplementedError
