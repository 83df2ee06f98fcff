"""Sequence packing: several examples in one row, so that a batch is tokens and not padding.

Examples of reasoning differ tenfold in length; padded to the longest of a batch, half of the work can be on nothing.
Packed, a row holds as many examples as fit, each at positions 0, 1, 2, ... of its own, and attention stays within an
example: the loss and the gradients are those of the examples one by one. Used by train.py; next: diffusion.py.

Shapes: R rows, T tokens of the longest row.
"""

import bisect

import numpy as np
import torch

from data import collate


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


def collate_rows(data, rows, mask=None):
    """Rows of examples -> ids, targets, positions, segments, (R, T) int64 each; padding is segment -1.

    ids and targets are data.collate's of each example, side by side. The last token of an example has no target, so
    nothing is predicted across an edge. No rows give one row of padding.
    """
    parts = [[collate(data, [i], mask) for i in row] for row in rows]
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
    """Attention for packed rows: a token sees what comes before it in its own example. segments (R, T).

    On CUDA a BlockMask for flex_attention, which skips the blocks of the T x T square that hold nothing; elsewhere bool
    (R, 1, T, T). Padding sees padding: no row of the softmax is empty.
    """
    if segments.is_cuda:
        from torch.nn.attention.flex_attention import create_block_mask

        def visible(row, head, query, key):
            return (segments[row, query] == segments[row, key]) & (key <= query)

        R, T = segments.shape
        return create_block_mask(visible, R, None, T, T, device=segments.device)
    same = segments[:, None, :, None] == segments[:, None, None, :]
    return same & torch.ones(segments.shape[1], segments.shape[1], dtype=torch.bool, device=segments.device).tril()
