"""Exercise 7: the same loss on any number of processes."""


def step_loss(batches, all_reduce):
    # after the loop: every rank enters two collectives, however many micro-batches it has
    total = all_reduce(sum((nll * weights).sum() for nll, weights in batches))
    count = all_reduce(sum(weights.sum() for _, weights in batches))
    return total / count
