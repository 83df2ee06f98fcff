"""batches.py: rows that hold what fits, and a loss that does not know of it."""

import json
from pathlib import Path

import faults
import numpy as np
import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask

import batches
import data
import model
import train


def log(run):
    return [json.loads(line) for line in Path(f"runs/{run}/log.jsonl").read_text().splitlines()]


def test_rows_by_hand():
    assert batches.pack([5, 3, 2, 7], 0) == [[3], [0, 2]] + [[1]]  # limit 7: 7 | 5 + 2 | 3
    assert batches.pack([5, 3, 2, 7], 10) == [[3, 1], [0, 2]]  # 3 goes where nothing is left over
    assert batches.pack([9, 4, 4], 8) == [[0], [1, 2]]  # too long for a row: one of its own
    assert batches.pack([], 8) == []


def test_rows_hold_everything_once_and_nearly_nothing_else():
    length = np.random.default_rng(0).integers(1, 1000, size=3000)
    rows = batches.pack(length, 4096)
    assert sorted(i for row in rows for i in row) == list(range(3000))
    assert max(length[row].sum() for row in rows) <= 4096
    assert length.sum() / (len(rows) * 4096) > 0.99


@pytest.mark.parametrize("student, dtype, off", [("data/toy-1/untrained", torch.float64, 1e-6),
                                                 ("qwen3_moe", torch.float32, 1e-5)])  # fmt: skip
@pytest.mark.parametrize("checkpointed", [False, True])
def test_packed_is_one_by_one(here, student, dtype, off, checkpointed):
    """NLL of every token and gradients: packed rows against one unpadded example at a time."""
    train_set = data.load("data/toy-1/teacher")
    packed, alone = (model.load(student, dtype=dtype) for _ in range(2))
    for block in packed.model.layers:
        block.checkpoint_activations = checkpointed
    size = np.diff(train_set.spans[:, ::2])[:, 0]
    rows = batches.pack(size, 100)
    assert 1 < len(rows) < len(size) and max(map(len, rows)) > 2
    ids, targets, _, positions, segments = map(torch.tensor, batches.collate_rows(train_set, rows))
    nll = packed(ids, targets, positions=positions, attention=batches.causal_within(segments))
    nll.sum().backward()
    for row, examples in enumerate(rows):
        at = 0
        for i in examples:
            one, its_targets, _ = map(torch.tensor, batches.collate(train_set, [i]))
            expected = alone(one, its_targets)
            expected.sum().backward()
            assert torch.allclose(nll[row, at : at + size[i]], expected[0], atol=off, rtol=off)  # float32 in any case
            at += size[i]
        assert not nll[row, at:].any()
    for (name, p), q in zip(packed.named_parameters(), alone.parameters(), strict=True):
        assert torch.allclose(p.grad, q.grad, atol=off, rtol=off), name


def test_a_block_mask_is_the_bool_mask(here):
    """What CUDA runs, forward, on the CPU: flex_attention with the BlockMask of the same segments."""
    train_set = data.load("data/toy-1/teacher")
    student = model.load("data/toy-1/untrained")
    parts = map(torch.tensor, batches.collate_rows(train_set, [[0, 8, 3], [7, 1]]))
    ids, targets, _, positions, segments = parts
    T = ids.shape[1]

    def visible(row, head, query, key):
        return (segments[row, query] == segments[row, key]) & (key <= query)

    blocks = create_block_mask(visible, 2, None, T, T, device="cpu")
    with torch.no_grad():
        a = student(ids, targets, positions=positions, attention=batches.causal_within(segments))
        b = student(ids, targets, positions=positions, attention=blocks)
    assert torch.allclose(a, b, atol=1e-5) and (a > 0).any()


def test_training_and_recording_packed_change_nothing_but_padding(here):
    keys = faults.KEYS | dict(steps=3, record_every=3, batch_size=0, micro_batch_size=4)
    train.main(run="plain", **keys)
    train.main(run="packed", **keys | dict(packing=True))
    plain, packed = (log(run) for run in ("plain", "packed"))
    for a, b in zip(plain, packed, strict=True):
        if "loss" in a:
            assert b["loss"] == pytest.approx(a["loss"], rel=1e-6)
            assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-5)
            assert b["tokens"] == a["tokens"] and 0 <= b["padding"] < a["padding"]
    for step in (0, 3):
        a, b = (np.load(f"runs/{run}/trajectory/{step:06d}.npz")["logprob"] for run in ("plain", "packed"))
        assert np.allclose(a, b, atol=1e-5, equal_nan=True)


def test_padding_shares_by_hand(here, capsys):
    """Examples of 5, 3, 2, 7 tokens, two rows at a time: 7 + 5 | 3 + 2 takes 14 + 6 positions for 17 tokens."""
    assert batches.padded_slots(np.array([5, 3, 2, 7]), 2) == 20
    assert batches.padded_slots(np.array([7, 7, 3]), 2) == 17  # their rows when packed
    train.main(run="one", **faults.KEYS | dict(steps=1, record_every=0, batch_size=0, packing=True, micro_batch_size=3))
    size = np.diff(data.load("data/toy-1/teacher").spans[:, ::2])[:, 0]
    rows = np.array([size[row].sum() for row in batches.pack(size, 0)])
    slots = [sum(s[i] * len(s[i : i + 3]) for i in range(0, len(s), 3)) for s in (-np.sort(-size), rows)]
    before, after = (1 - size.sum() / n for n in slots)
    expected = f"packing: 9 examples in {len(rows)} rows; padding {before:.1%} of all positions without it, {after:.1%}"
    assert expected in capsys.readouterr().out and after < before
    assert log("one")[0]["padding"] == pytest.approx(after, abs=1e-4)
    assert log("one")[0]["padding_unpacked"] == pytest.approx(before, abs=1e-4)


def test_operations_of_a_diffusion_step(here):
    """A full model reads and sees all of its rows: against torch's own counter, forward and backward."""
    from torch.utils.flop_counter import FlopCounterMode

    keys = faults.KEYS | dict(model="llada", batch_size=0, micro_batch_size=4, complementary=True)
    run = train.read_inputs(train.resolve(dict(run="one", **keys)))
    run.student = model.load("llada")
    for batch in batches.micro_batches(run, 0):
        with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(
            torch.nn.attention.SDPBackend.MATH):  # fmt: skip
            run.student(batch["ids"], batch["targets"], attention=batch["attention"]).sum().backward()
        assert batch["flops"] == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_a_row_of_padding_has_no_target():
    ids, targets, weights, positions, segments = batches.collate_rows(None, [])
    assert ids.shape == (1, 1) and (targets == -100).all() and (segments == -1).all()
    assert not weights.any()
    assert batches.causal_within(torch.tensor([[0, 0, 1, -1]]))[0, 0].tolist() == [
        [True, False, False, False], [True, True, False, False], [False, False, True, False], [False] * 3 + [True]]


# ---------------------------------------------------------------------------------------------------------------------
# Padded batches, and which examples make a step


def random_data(seed, n=9):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 7, size=(n, 2))
    edges = np.concatenate([[0], lengths.ravel().cumsum()])
    spans = np.stack([edges[0:-1:2], edges[1::2], edges[2::2]], axis=1)
    return data.Data("", rng.integers(1, 1000, edges[-1]).astype("<u4"), spans, [{}] * n, {}, "")


@pytest.mark.parametrize("seed", range(20))
def test_collate_against_loops(seed):
    made, rng = random_data(seed), np.random.default_rng(seed)
    indices = rng.permutation(len(made))[: rng.integers(1, 10)]
    n = len(made.tokens)
    kept = rng.random(n) < 0.5
    some_weights = (kept * rng.random(n)).astype(np.float32)
    for selected in (None, kept, some_weights):
        ids, targets, weights = batches.collate(made, indices, selected)
        T = max(made.spans[i, 2] - made.spans[i, 0] for i in indices)
        assert ids.shape == targets.shape == weights.shape == (len(indices), T)
        assert ids.dtype == targets.dtype == np.int64 and weights.dtype == np.float32
        for row, i in enumerate(indices):
            start, prompt_end, end = made.spans[i]
            for t in range(T):
                here, ahead = start + t, start + t + 1
                assert ids[row, t] == (made.tokens[here] if here < end else 0)
                weight = 0
                if prompt_end <= ahead < end:
                    weight = 1 if selected is None else selected[ahead]
                assert weights[row, t] == weight
                assert targets[row, t] == (made.tokens[ahead] if weight else -100)


def test_collate_of_nothing():
    ids, targets, weights = batches.collate(random_data(0), np.arange(0))
    assert ids.tolist() == [[0]] and targets.tolist() == [[-100]] and weights.tolist() == [[0]]


@pytest.mark.parametrize("n, batch_size", [(7, 1), (7, 3), (7, 6), (12, 4), (5, 4)])
def test_steps_walk_through_one_permutation_after_another(n, batch_size):
    stream = np.concatenate([batches.step_examples(n, batch_size, step, seed=3) for step in range(4 * n)])
    epochs = stream[: len(stream) // n * n].reshape(-1, n)
    assert all(sorted(epoch) == list(range(n)) for epoch in epochs) and len({tuple(e) for e in epochs}) > 1
    for step in reversed(range(4 * n)):  # a pure function: no order of calls, nothing remembered
        chosen = batches.step_examples(n, batch_size, step, seed=3)
        assert chosen.tolist() == stream[step * batch_size : (step + 1) * batch_size].tolist()
    other = np.concatenate([batches.step_examples(n, batch_size, step, seed=4) for step in range(4 * n)])
    assert (other != stream).any()


@pytest.mark.parametrize("batch_size", [0, 5, 9])
def test_a_batch_of_all_is_all_in_order(batch_size):
    for step in (0, 3):
        assert batches.step_examples(5, batch_size, step, 0).tolist() == [0, 1, 2, 3, 4]
