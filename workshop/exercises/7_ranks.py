"""Exercise 7: the same loss on any number of processes.

FSDP runs one process (a rank) per GPU. Each holds a part of every weight and reads its own part of
the batch. Nothing else is shared: what a rank must know of the others comes through a collective,
an operation that every rank enters, or those that did wait for ever. One of them:

    all_reduce(x)   every rank gives a number, every rank gets the sum

The loss of an optimizer step is the weighted mean of the NLL over all tokens of the step: of all
micro-batches of all ranks. This function runs once on every rank.

    batches      this rank's micro-batches, a list of (nll, weights), (B, T) each; T differs from
                 one to the next, the number of micro-batches from rank to rank, and a rank may have
                 none. Padding has weight 0
    all_reduce   as above

Return the loss, the same number on every rank.

    python workshop/check.py 7
"""


def step_loss(batches, all_reduce):
    raise NotImplementedError
