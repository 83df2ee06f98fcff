"""Which examples a process reads in an optimizer step, and how they lie in rows: micro-batches, packing.

Without packing a row is an example, padded to the longest of its forward pass. Examples of reasoning differ tenfold in
length, so half of the work can be on padding. Packed (--packing=true), a row holds as many examples as fit, each at
positions 0, 1, 2, ... of its own, and attention stays within an example: loss and gradients are those of the examples
one by one. Used by train.py and trajectory.py, which pass their train.Run; next: trajectory.py.

Shapes: B rows of a forward pass, T tokens of the longest.
"""

import bisect

import numpy as np
import torch

import diffusion
from plumbing import memory
from plumbing.parallel import rank, world_size


def micro_batches(run, step):
    """This process's share of optimizer step `step`, cut into forward passes of rows of similar length.

    Which examples make the step is a pure function of (cfg.seed, step), whatever the number of processes. Every
    process gets the same number of micro-batches (an empty one counts 0), since every forward pass is collective.
    A micro-batch is a dict:

    examples   (n,) which ones, for messages               tokens  int, those of its examples
    ids        (B, T) int64                                 count   float, its part of the step's normaliser
    targets    (B, T) int64, -100 where nothing is scored   weights (B, T) float32 on the NLL; None: all 1
    positions, attention   as Transformer.forward takes them; None: its defaults
    flops      memory.flops of it, padding that nothing is to see left out
    """
    cfg, train_set = run.cfg, run.train_set
    chosen = step_examples(len(train_set), cfg.batch_size, step, cfg.seed)
    length = train_set.spans[chosen, 2] - train_set.spans[chosen, 0]
    batches = []
    for rows in shares(run, chosen):
        if run.shape.is_diffusion:
            batch = diffusion.corrupt_batch(
                run.shape,
                train_set,
                np.array([i for row in rows for i in row], dtype=np.int64),
                cfg,
                seed=cfg.seed,
                step=step,
                length=int(length.max()),
                forced=run.selected,
                device=run.device,
            )
            scored = (batch["targets"] != -100).sum()
            batch["flops"] = memory.flops(run.student, batch["read"], scored, batch["pairs"])
        else:
            batch = next_token_batch(run, rows, run.selected)
        batches.append(batch)
    if cfg.packing:
        mine = np.concatenate([batch["examples"] for batch in batches])
        size = train_set.spans[mine, 2] - train_set.spans[mine, 0]
        batches[0]["unpacked_slots"] = padded_slots(size, cfg.micro_batch_size)
    return batches


def shares(run, examples):
    """Examples -> one list of rows for each forward pass of this process; a row is a list of examples.

    Longest first, so that rows of a pass are of similar length, and dealt out to the processes like cards.
    """
    size = run.train_set.spans[examples, 2] - run.train_set.spans[examples, 0]
    if run.cfg.packing:
        rows = [[int(examples[i]) for i in row] for row in pack(size, run.cfg.max_row_tokens)]
    else:
        rows = [[int(i)] for i in examples[np.argsort(-size, kind="stable")]]
    most, mine = -(-len(rows) // world_size()), rows[rank() :: world_size()]
    return [mine[i : i + run.cfg.micro_batch_size] for i in range(0, most, run.cfg.micro_batch_size)]


def next_token_batch(run, rows, keep=None):
    """Rows -> the micro-batch on which an autoregressive student predicts each (kept) response token."""
    examples = np.array([i for row in rows for i in row], dtype=np.int64)
    size = run.train_set.spans[examples, 2] - run.train_set.spans[examples, 0]
    positions, attention = None, None
    if run.cfg.packing:
        ids, targets, positions, segments = collate_rows(run.train_set, rows, keep)  # (B, T) each
        positions = torch.as_tensor(positions, device=run.device)
        attention = causal_within(torch.as_tensor(segments, device=run.device))
    else:
        ids, targets = collate(run.train_set, examples, keep)  # (B, T) each
    return {
        "examples": examples, "weights": None, "positions": positions, "attention": attention,
        "ids": torch.as_tensor(ids, device=run.device), "targets": torch.as_tensor(targets, device=run.device),
        "tokens": int(size.sum()), "count": float((targets != -100).sum()),
        "slots": ids.size,
        "flops": memory.flops(run.student, size.sum(), (targets != -100).sum(), (size * (size + 1) // 2).sum()),
    }  # fmt: skip


def padded_slots(size, rows):
    """Positions of a forward pass that examples of these sizes take, one a row, `rows` at a time, longest first."""
    size = np.sort(size)[::-1]
    return int(sum(size[i] * len(size[i : i + rows]) for i in range(0, len(size), rows)))


# ---------------------------------------------------------------------------------------------------------------------
# Packing


def pack(lengths, limit):
    """Which examples share a row: lengths (n,) -> lists of indices, each of at most `limit` tokens, fullest first.

    Best fit, longest first: an example goes to the row where the least room is left over. limit 0: the longest
    example's length; a longer example than `limit` has a row of its own.
    """
    limit = max(limit, 1) if limit else int(max(lengths, default=1))
    rows, room = [], []  # room: (tokens left, row), ascending
    for i in np.argsort(-np.asarray(lengths), kind="stable"):
        at = bisect.bisect_left(room, (int(lengths[i]), -1))
        left, row = room.pop(at) if at < len(room) else (limit, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(int(i))
        bisect.insort(room, (left - int(lengths[i]), row))
    return sorted(rows, key=lambda row: -sum(int(lengths[i]) for i in row))


def collate_rows(train_set, rows, mask=None):
    """Rows of examples -> ids, targets, positions, segments, (B, T) int64 each; padding is segment -1.

    ids and targets are data.collate's of each example, side by side. The last token of an example has no target, so
    nothing is predicted across an edge. No rows give one row of padding.
    """
    parts = [[collate(train_set, [i], mask) for i in row] for row in rows]
    length = max((sum(ids.shape[1] for ids, _ in row) for row in parts), default=1)
    ids = np.zeros((max(1, len(rows)), length), dtype=np.int64)
    targets, positions, segments = np.full_like(ids, -100), np.zeros_like(ids), np.full_like(ids, -1)
    for r, row in enumerate(parts):
        at = 0
        for segment, (one, its_targets) in enumerate(row):
            span = slice(at, at + one.shape[1])
            ids[r, span], targets[r, span] = one[0], its_targets[0]
            positions[r, span], segments[r, span] = np.arange(one.shape[1]), segment
            at = span.stop
    return ids, targets, positions, segments


def causal_within(segments):
    """Attention for packed rows: a token sees what comes before it in its own example. segments (B, T).

    On CUDA a BlockMask for flex_attention, which skips the blocks of the T x T square that hold nothing; elsewhere bool
    (B, 1, T, T). Padding sees padding: no row of the softmax is empty.
    """
    if segments.is_cuda:
        from torch.nn.attention.flex_attention import create_block_mask

        def visible(row, head, query, key):
            return (segments[row, query] == segments[row, key]) & (key <= query)

        B, T = segments.shape
        return create_block_mask(visible, B, None, T, T, device=segments.device)
    same = segments[:, None, :, None] == segments[:, None, None, :]
    return same & torch.ones(segments.shape[1], segments.shape[1], dtype=torch.bool, device=segments.device).tril()


def step_examples(n, batch_size, step, seed):
    """Which of n examples make optimizer step `step` (from 0): a pure function of its arguments.

    Every epoch is a permutation of its own; a step may lie across two. batch_size 0, or n or more: all, every step.
    """
    if batch_size <= 0 or batch_size >= n:
        return np.arange(n)
    places = np.arange(step * batch_size, (step + 1) * batch_size)
    epochs = range(places[0] // n, places[-1] // n + 1)
    order = np.concatenate([np.random.default_rng([seed, epoch]).permutation(n) for epoch in epochs])
    return order[places - epochs[0] * n]


def collate(data, indices, mask=None):
    """Examples -> ids and targets, (B, T) int64 each, padded on the right with id 0 and target -100.

    targets[:, i] is token i + 1 where that belongs to a response (and `mask`, bool (n_tokens,), keeps it), else -100.
    No examples give one row without targets, so that a process without work can still take part.
    """
    spans = data.spans[indices]
    length = int((spans[:, 2] - spans[:, 0]).max(initial=1))
    ids = np.zeros((max(1, len(spans)), length), dtype=np.int64)
    targets = np.full_like(ids, -100)
    for row, (start, prompt_end, end) in enumerate(spans):
        ids[row, : end - start] = data.tokens[start:end]
        response = ids[row, prompt_end - start : end - start]
        kept = response if mask is None else np.where(mask[prompt_end:end], response, -100)
        targets[row, prompt_end - start - 1 : end - start - 1] = kept
    return ids, targets
