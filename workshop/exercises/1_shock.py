"""Exercise 1: find the shock.

`lines` is runs/<run>/log.jsonl, a dict per line. Two kinds of lines stand in it:

    {"step": 9, "loss": 0.68, "grad_norm": 0.89, ...}                  an update was made
    {"step": 8, "event": "record", "nll": 0.67, "accuracy": 0.65,      a checkpoint was recorded
     "eval_accuracy": 0.64, ...}

The bottleneck is the recorded step with the lowest train accuracy ("accuracy"); if several are
equally low, the earliest. Return three numbers:

    step            the bottleneck
    change          its train accuracy minus that of step 0
    nll_change      its "nll" minus that of step 0

    python workshop/check.py 1
"""


def shock(lines):
    raise NotImplementedError
