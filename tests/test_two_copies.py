"""two_copies.py: the rule against loops; in stretches and in tiles what the square gives."""

import numpy as np
import pytest
import torch
from test_diffusion import SET, make_student
from torch.nn.attention.flex_attention import flex_attention
from twins import Largest

import two_copies
from diffusion import Corruption, corrupt_batch


def in_float64(q, k, v, mask):
    """softmax(q k^T / sqrt(D)) v by hand, query head h reading key head h // (H / K)."""
    q, k, v = (x.double() for x in (q, k, v))
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    scores = (q @ k.transpose(2, 3)) / q.shape[3] ** 0.5
    return scores.masked_fill(~mask, -torch.inf).softmax(-1) @ v


def random_heads(T, H=4, K=2, D=8, B=2):
    generator = torch.Generator().manual_seed(T)
    shapes = ((B, H, 2 * T, D), (B, K, 2 * T, D), (B, K, 2 * T, D))
    return [torch.randn(shape, generator=generator, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize("T, block", [(8, 4), (6, 2), (5, 1), (4, 4)])
def test_the_square_equals_the_loops(T, block):
    square = two_copies.square(T, block)
    for i in range(2 * T):
        for j in range(2 * T):
            a, b = i % T // block, j % T // block
            rule = {(True, True): a == b, (True, False): b < a, (False, False): b <= a, (False, True): False}
            assert square[i, j] == rule[i < T, j < T]


@pytest.mark.parametrize("T, block, stretch", [(24, 4, 8), (24, 4, 10), (24, 8, 3), (20, 4, 100), (640, 32, 512)])
def test_stretches_give_what_the_square_gives_and_its_gradients(monkeypatch, T, block, stretch):
    monkeypatch.setattr(two_copies, "STRETCH", stretch)
    ours, exact = random_heads(T), random_heads(T)
    weight = torch.randn(ours[0].shape, generator=torch.Generator().manual_seed(1))
    y = two_copies.in_stretches(*ours, block=block)
    z = in_float64(*exact, two_copies.square(T, block))
    assert (y - z).abs().max() < 1e-5
    (y * weight).sum().backward()
    (z * weight).sum().backward()
    for a, b in zip(ours, exact, strict=True):
        assert (a.grad - b.grad).abs().max() < 1e-4


def test_no_stretch_makes_the_square():
    T = 4096
    q, k, v = (torch.zeros(1, 1, 2 * T, 1) for _ in range(3))
    with Largest() as largest:
        two_copies.in_stretches(q, k, v, block=32)
    assert largest.numel <= (T + two_copies.STRETCH) * two_copies.STRETCH < (2 * T) ** 2 / 25


@pytest.mark.parametrize("T, block", [(320, 32), (384, 128), (288, 8), (128, 32)])
def test_tiles_hold_every_pair_that_is_seen_and_full_ones_no_other(T, block):
    """The copies meet inside of a tile where T is no multiple of 128."""
    mask = two_copies.tiles(T, block, torch.device("cpu"))
    square = two_copies.square(T, block)
    n = -(-2 * T // 128)
    partial, full = np.zeros((n, n), dtype=bool), np.zeros((n, n), dtype=bool)
    for i in range(n):
        partial[i, mask.kv_indices[0, 0, i, : mask.kv_num_blocks[0, 0, i]]] = True
        full[i, mask.full_kv_indices[0, 0, i, : mask.full_kv_num_blocks[0, 0, i]]] = True
    for i in range(n):
        for j in range(n):
            part = square[i * 128 : i * 128 + 128, j * 128 : j * 128 + 128]
            assert part.any() == (partial[i, j] or full[i, j])
            assert bool(part.all() and part.shape == (128, 128)) == full[i, j]
    assert not (partial & full).any()
    q, k, v = (x.detach() for x in random_heads(T, H=1, K=1, D=16))
    with torch.no_grad():
        y = flex_attention(q, k, v, block_mask=mask)
        assert (y - in_float64(q, k, v, square)).abs().max() < 1e-5


def test_a_step_of_training_does_not_depend_on_the_form(monkeypatch):
    student = make_student("block")
    found = []
    for short in (1024, 0):
        monkeypatch.setattr(two_copies, "SHORT", short)
        monkeypatch.setattr(two_copies, "STRETCH", 8)
        length = int((SET.spans[:, 2] - SET.spans[:, 0]).max())
        batch = corrupt_batch(student.config, SET, [0, 1, 2], Corruption(), seed=0, step=3, length=length)
        assert callable(batch["attention"]) == (short == 0)
        nll = student(batch["ids"], batch["targets"], positions=batch["positions"], attention=batch["attention"])
        (nll * batch["weights"]).sum().backward()
        found.append([nll.detach(), *(p.grad for p in student.parameters() if p.grad is not None)])
        student.zero_grad(set_to_none=True)
    assert len(found[0]) > 5
    for a, b in zip(*found, strict=True):
        assert (a - b).abs().max() < 1e-4 * max(1.0, float(b.abs().max()))
