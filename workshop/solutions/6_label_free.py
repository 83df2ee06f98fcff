"""Exercise 6: find the bottleneck without answers."""

import numpy as np


def fall(confidence):
    change = confidence - confidence[0]
    # a mean of all changes would hide the fall: anchors rise by more than the others fall
    return np.minimum(0, change).mean(1)


def turn(steps, curve):
    lowest = int(np.argmin(curve))
    nothing_fell = curve[lowest] >= 0
    still_falling = lowest == len(curve) - 1
    return None if nothing_fell or still_falling else steps[lowest]
