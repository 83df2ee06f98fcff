"""Which examples a process reads in an optimizer step, and how they lie in rows.

    for batch in micro_batches(run, step):         # this process's share of one optimizer step
        nll = student(batch["ids"], batch["targets"], positions=..., attention=...)

Without packing a row is one example, padded to the longest of its forward pass. Examples of
reasoning differ tenfold in length, so half of the work can go into padding. Packed (--packing=true),
a row holds as many examples as fit. Each has positions 0, 1, 2, ... of its own, and attention stays
within an example: loss and gradients are those of the examples one by one.

`run` is a train.Run. Shapes: B rows of a forward pass, T tokens of the longest row.
Next: model.py.
"""

import bisect

import numpy as np
import torch

import diffusion
from plumbing import memory
from plumbing.parallel import rank, world_size

# -------------------------------------------------------------------------------------------------
# One optimizer step


def micro_batches(run, step):
    """This process's share of optimizer step `step` -> a list of micro-batches (dicts).

    Which examples make the step is a pure function of (cfg.seed, step), whatever the number of
    processes. Every process gets the same number of micro-batches (an empty one counts 0), since
    every forward pass of a sharded model needs all processes.

    ids          (B, T) int64
    targets      (B, T) int64, -100 where nothing is scored
    weights      (B, T) float32, each token's weight in the loss
    count        float, this micro-batch's part of the step's normaliser
    positions, attention   as Transformer.forward takes them; None: its defaults
    examples     (n,) indices of its examples, for messages
    tokens       int, tokens of its examples
    flops        memory.flops of it, without padding that no token sees
    """
    chosen = step_examples(len(run.train_set), run.cfg.batch_size, step, run.cfg.seed)
    batches = []
    for rows in shares(run, chosen):
        if run.shape.is_diffusion:
            longest = int(sizes_of(run.train_set, chosen).max())
            batches.append(masked_batch(run, rows, step, longest))
        else:
            batches.append(next_token_batch(run, rows, run.selected))
    if run.cfg.packing:
        # for the log: the slots that the same examples take when each has a row of its own
        mine = np.concatenate([batch["examples"] for batch in batches])
        sizes = sizes_of(run.train_set, mine)
        batches[0]["unpacked_slots"] = padded_slots(sizes, run.cfg.micro_batch_size)
    return batches


def step_examples(n, batch_size, step, seed):
    """Which of n examples make optimizer step `step` (from 0): a pure function of its arguments.

    Every epoch is a new permutation; a step may lie across two epochs. batch_size 0, or one that is
    not less than n, takes all examples in every step.
    """
    if batch_size <= 0 or batch_size >= n:
        return np.arange(n)
    places = np.arange(step * batch_size, (step + 1) * batch_size)
    epochs = range(places[0] // n, places[-1] // n + 1)
    permutations = [np.random.default_rng([seed, epoch]).permutation(n) for epoch in epochs]
    return np.concatenate(permutations)[places - epochs[0] * n]


def shares(run, examples):
    """Examples -> one list of rows for each forward pass of this process; a row lists examples.

    Longest first, so that rows of one pass have similar lengths, then dealt to the processes like
    cards. Processes that get fewer rows end with shorter, or empty, passes.
    """
    sizes = sizes_of(run.train_set, examples)
    if run.cfg.packing:
        packed = pack(sizes, run.cfg.max_row_tokens)
        rows = [[int(examples[i]) for i in row] for row in packed]
    else:
        longest_first = examples[np.argsort(-sizes, kind="stable")]
        rows = [[int(i)] for i in longest_first]
    mine = rows[rank() :: world_size()]
    most = -(-len(rows) // world_size())  # rows of the process that has the most
    size = run.cfg.micro_batch_size
    return [mine[i : i + size] for i in range(0, most, size)]


def sizes_of(train_set, examples):
    """Tokens of each example, prompt and response, (n,)."""
    return train_set.spans[examples, 2] - train_set.spans[examples, 0]


def flat(rows):
    """The examples of several rows, (n,) int64."""
    return np.array([i for row in rows for i in row], dtype=np.int64)


# -------------------------------------------------------------------------------------------------
# One forward pass


def next_token_batch(run, rows, selected=None):
    """The micro-batch on which an autoregressive student predicts every (selected) response token."""
    examples = flat(rows)
    sizes = sizes_of(run.train_set, examples)
    positions = None
    attention = None
    if run.cfg.packing:
        ids, targets, weights, positions, segments = collate_rows(run.train_set, rows, selected)
        positions = torch.as_tensor(positions, device=run.device)
        attention = causal_within(torch.as_tensor(segments, device=run.device))
    else:
        ids, targets, weights = collate(run.train_set, examples, selected)
    pairs = sizes * (sizes + 1) // 2  # token i sees i + 1 tokens
    scored = targets != -100
    return {
        "ids": torch.as_tensor(ids, device=run.device),
        "targets": torch.as_tensor(targets, device=run.device),
        "weights": torch.as_tensor(weights, device=run.device),
        "count": float(weights[scored].sum(dtype=np.float64)),
        "positions": positions,
        "attention": attention,
        "examples": examples,
        "tokens": int(sizes.sum()),
        "slots": ids.size,
        "flops": memory.flops(run.student, sizes.sum(), scored.sum(), pairs.sum()),
    }


def masked_batch(run, rows, step, length):
    """The micro-batch on which a diffusion student fills in masks.

    length: tokens of the longest example of the whole step, which some objectives pad to.
    """
    batch = diffusion.corrupt_batch(
        run.shape,
        run.train_set,
        flat(rows),
        run.cfg,
        seed=run.cfg.seed,
        step=step,
        length=length,
        forced=run.forced,
        kept=run.selected,
        device=run.device,
    )
    scored = (batch["targets"] != -100).sum()
    batch["flops"] = memory.flops(run.student, batch["read"], scored, batch["pairs"])
    return batch


def collate(data, indices, selected=None):
    """Examples -> ids, targets int64 and weights float32, (B, T) each, padded on the right.

    selected  (n_tokens,) bool or float32 >= 0: the weight of every token in the loss; None: all 1

    targets[:, i] is token i + 1 where that is a response token of weight > 0, else -100; its weight
    stands at weights[:, i]. Padding is id 0, target -100 and weight 0. No examples give one row
    without targets, so that a process without work can still take part.
    """
    spans = data.spans[indices]
    length = int((spans[:, 2] - spans[:, 0]).max(initial=1))
    ids = np.zeros((max(1, len(spans)), length), dtype=np.int64)
    targets = np.full_like(ids, -100)
    weights = np.zeros(ids.shape, dtype=np.float32)
    for row, (start, prompt_end, end) in enumerate(spans):
        ids[row, : end - start] = data.tokens[start:end]
        # the response, moved one to the left: position i predicts token i + 1
        ahead = slice(prompt_end - start - 1, end - start - 1)
        weights[row, ahead] = 1 if selected is None else selected[prompt_end:end]
        response = ids[row, prompt_end - start : end - start]
        targets[row, ahead] = np.where(weights[row, ahead] > 0, response, -100)
    return ids, targets, weights


# -------------------------------------------------------------------------------------------------
# Packing


def pack(lengths, limit):
    """Which examples share a row: lengths (n,) -> lists of indices, fullest row first.

    Best fit, longest first: an example goes to the row where the least room is left over. Rows hold
    at most `limit` tokens (0: the longest example's); a longer example has a row of its own.
    """
    limit = max(limit, 1) if limit else int(max(lengths, default=1))
    rows = []
    room = []  # (tokens left, row), ascending
    for i in np.argsort(-np.asarray(lengths), kind="stable"):
        size = int(lengths[i])
        at = bisect.bisect_left(room, (size, -1))  # the first row with enough room
        if at < len(room):
            left, row = room.pop(at)
        else:
            left, row = limit, len(rows)
            rows.append([])
        rows[row].append(int(i))
        bisect.insort(room, (left - size, row))
    return sorted(rows, key=lambda row: -sum(int(lengths[i]) for i in row))


def collate_rows(train_set, rows, selected=None):
    """Rows of examples -> ids, targets, weights, positions, segments, (B, T) each.

    ids, targets and weights are collate's of each example, side by side. The last token of an
    example has no target, so no prediction crosses an edge. Segments number the examples of a row;
    padding is segment -1. No rows give one row of padding.
    """
    parts = [[collate(train_set, [i], selected) for i in row] for row in rows]
    length = max((sum(ids.shape[1] for ids, _, _ in row) for row in parts), default=1)
    ids = np.zeros((max(1, len(rows)), length), dtype=np.int64)
    targets = np.full_like(ids, -100)
    weights = np.zeros(ids.shape, dtype=np.float32)
    positions = np.zeros_like(ids)
    segments = np.full_like(ids, -1)
    for r, row in enumerate(parts):
        at = 0
        for segment, (one, its_targets, its_weights) in enumerate(row):
            span = slice(at, at + one.shape[1])
            ids[r, span] = one[0]
            targets[r, span] = its_targets[0]
            weights[r, span] = its_weights[0]
            positions[r, span] = np.arange(one.shape[1])
            segments[r, span] = segment
            at = span.stop
    return ids, targets, weights, positions, segments


def causal_within(segments):
    """Attention for packed rows: a token sees what comes before it in its own example.

    segments (B, T). On CUDA a BlockMask for flex_attention, which skips the blocks of the T x T
    square that hold nothing; elsewhere bool (B, 1, T, T). Padding sees padding, so that no row of
    the softmax is empty.
    """
    if segments.is_cuda:
        from torch.nn.attention.flex_attention import create_block_mask

        def visible(row, head, query, key):
            return (segments[row, query] == segments[row, key]) & (key <= query)

        B, T = segments.shape
        return create_block_mask(visible, B, None, T, T, device=segments.device)
    T = segments.shape[1]
    same = segments[:, None, :, None] == segments[:, None, None, :]
    causal = torch.ones(T, T, dtype=torch.bool, device=segments.device).tril()
    return same & causal


def padded_slots(sizes, rows):
    """Positions that examples of these sizes take, one a row, `rows` a pass, longest first."""
    sizes = np.sort(sizes)[::-1]
    passes = [sizes[i : i + rows] for i in range(0, len(sizes), rows)]
    return int(sum(group[0] * len(group) for group in passes))
