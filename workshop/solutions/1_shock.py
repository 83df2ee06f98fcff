"""Exercise 1: find the shock."""


def shock(lines):
    recorded = {}
    for line in lines:
        if line.get("event") == "record":
            recorded[line["step"]] = line
    # min keeps the first of equals, and the log is in the order of steps
    step = min(recorded, key=lambda step: recorded[step]["accuracy"])
    start, low = recorded[0], recorded[step]
    return step, low["accuracy"] - start["accuracy"], low["nll"] - start["nll"]
