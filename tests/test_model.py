"""model.py against transformers, on tiny random checkpoints that transformers wrote.

The diffusion families (LLaDA-8B, LLaDA2) and Ling-2 are in test_model_diffusion.py.
"""

import pytest
import torch
import torch.nn.functional as F
from twins import TWINS, Largest, close, oracle_gradients, some_ids

import model
from hf import families

# ---------------------------------------------------------------------------------------------------------------------
# The arithmetic


@pytest.mark.parametrize("attention", ["causal", "full"])
@pytest.mark.parametrize("name", TWINS)
def test_logits_nll_and_gradients_equal_transformers(twin, name, attention):
    folder, oracle = twin(name)
    tolerance = 1e-4 if "moe" in name else 1e-5
    student, ids = model.load(folder), some_ids()
    mask = None if attention == "causal" else torch.zeros(1, 1, 23, 23)
    logits = oracle(ids, attention_mask=mask, use_cache=False).logits
    close(student(ids, attention=attention), logits, tolerance)

    targets, weights = some_ids(seed=2), torch.rand(3, 23) + 0.5
    targets[torch.rand(3, 23) < 0.4] = -100
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(
        3, 23
    )
    nll = student(ids, targets=targets, attention=attention)
    assert nll.dtype == torch.float32 and (nll[targets == -100] == 0).all()
    close(nll, expected, tolerance)
    oracle.zero_grad()
    (expected * weights).sum().backward()
    (nll * weights).sum().backward()
    theirs, ours = oracle_gradients(oracle), dict(student.named_parameters())
    assert theirs.keys() == ours.keys()
    for parameter in ours:
        close(ours[parameter].grad, theirs[parameter], tolerance)


def test_gradients_through_logits(twin):
    folder, oracle = twin("qwen3-tied")
    student, ids, weights = model.load(folder), some_ids(), torch.randn(3, 23, 97)
    oracle.zero_grad()
    (oracle(ids).logits * weights).sum().backward()
    (student(ids) * weights).sum().backward()
    for name, p in student.named_parameters():
        close(p.grad, oracle.get_parameter(name).grad)


@pytest.mark.parametrize("name", ["qwen3", "llama3", "yarn"])
def test_positions_reach_rope(twin, name):
    folder, oracle = twin(name)
    ids, positions = some_ids(), torch.randint(1, 4, (3, 23)).cumsum(1)
    mask = torch.zeros(23, 23).masked_fill(torch.ones(23, 23).triu(1) > 0, -torch.inf)[None, None]
    expected = oracle(ids, position_ids=positions, attention_mask=mask, use_cache=False).logits
    close(model.load(folder)(ids, positions=positions), expected)


def test_a_bool_mask_says_who_sees_whom(twin):
    folder, oracle = twin("qwen2")
    student, ids = model.load(folder), some_ids()
    mask = (torch.rand(3, 1, 23, 23) < 0.5) | torch.eye(23, dtype=torch.bool)
    bias = torch.zeros(3, 1, 23, 23).masked_fill(~mask, torch.finfo(torch.float32).min)
    close(student(ids, attention=mask), oracle(ids, attention_mask=bias, use_cache=False).logits)
    causal = torch.ones(23, 23, dtype=torch.bool).tril()[None, None]
    close(student(ids, attention=causal), student(ids))
    cache = model.Cache(student.config, 3, 30)
    close(student(ids, attention=causal, cache=cache), student(ids))


def test_rows_picks_one_position_of_each_sequence(twin):
    student, ids = model.load(twin("qwen3")[0]), some_ids()
    rows = torch.tensor([4, 22, 0])
    close(student(ids, logits_at=rows), student(ids)[torch.arange(3), rows][:, None])


def test_only_rows_with_a_target_get_logits(twin):
    student, ids = model.load(twin("llama")[0]), some_ids(T=60)
    targets = torch.full((3, 60), -100)
    assert student(ids, targets=targets).tolist() == torch.zeros(3, 60).tolist()
    targets[1, 7], targets[2, 59] = 5, 6
    with Largest() as seen:
        student(ids, targets=targets).sum().backward()
    assert seen.numel < 3 * 60 * 97  # not even all logits of one forward pass


@torch.no_grad()
@pytest.mark.parametrize("name", ["qwen3", "llama3", "smollm2", "qwen3-moe"])
def test_cache_equals_no_cache_with_right_padded_prompts(twin, name):
    folder, oracle = twin(name)
    student, ids, lengths = model.load(folder), some_ids(T=20), torch.tensor([5, 2, 9])
    cache = model.Cache(student.config, 3, 20)

    def expected(row, position):
        return oracle(ids[row : row + 1, : position + 1]).logits[0, -1]

    prompts = torch.where(torch.arange(9) < lengths[:, None], ids[:, :9], 96)  # 96: padding
    logits = student(prompts, cache=cache, logits_at=lengths - 1)
    for row in range(3):
        close(logits[row, 0], expected(row, lengths[row] - 1), 1e-4)
    rows, at = [0, 1, 2], lengths.clone()
    for step, width in enumerate((1, 1, 3, 1, 2)):  # tokens fed at once
        if step == 3:  # the second sequence has ended
            cache.keep_rows([0, 2])
            rows, at = [0, 2], at[[0, 2]]
        positions = at[:, None] + torch.arange(width)  # (B, width)
        logits = student(
            ids[torch.tensor(rows)[:, None], positions], positions=positions, cache=cache
        )
        for i, row in enumerate(rows):
            for j in range(width):
                close(logits[i, j], expected(row, positions[i, j]), 1e-4)
        at += width


@pytest.mark.parametrize("name", ["qwen3", "qwen3-moe"])
def test_compiled_block_equals_eager(twin, name):
    """One graph without breaks, forward and backward (a compiler behind it would take half a minute here)."""
    eager, compiled = (model.load(twin(name)[0]) for _ in range(2))
    whole = name != "qwen3-moe" or hasattr(
        F, "grouped_mm"
    )  # torch 2.9's loop over the experts breaks the graph
    compiled.model.layers[0].compile(backend="aot_eager", fullgraph=whole)
    ids = some_ids()
    outputs = [student(ids, targets=ids) for student in (eager, compiled)]
    close(outputs[1], outputs[0])
    for nll in outputs:
        nll.sum().backward()
    for p, q in zip(eager.parameters(), compiled.parameters(), strict=True):
        close(q.grad, p.grad)


def test_experts_without_grouped_mm(twin, monkeypatch):
    """torch 2.9 has no F.grouped_mm."""
    student, ids = model.load(twin("qwen3-moe")[0]), some_ids()
    expected = student(ids)
    monkeypatch.delattr(F, "grouped_mm", raising=False)
    close(student(ids), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_experts_of_any_width_and_dtype(dtype):
    """Grouped products want rows of 16 bytes and no float64; what does not fit takes the loop."""
    for width in (8, 12, 13):
        x, weight = torch.randn(7, 16, dtype=dtype), torch.randn(3, width, 16, dtype=dtype)
        ends = torch.tensor([2, 2, 7], dtype=torch.int32)
        expected = torch.cat([x[:2] @ weight[0].T, x[2:] @ weight[2].T])
        atol = 0.1 if dtype == torch.bfloat16 else 1e-5
        assert torch.allclose(model.grouped_linear(x, weight, ends), expected, atol=atol)


def test_router_computes_in_float32_under_autocast(twin):
    student = model.load(twin("qwen3-moe")[0])
    router, x = student.model.layers[0].mlp.gate, torch.randn(5, 48)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = router(x)[0]
    assert inside.dtype == torch.float32 and torch.equal(inside, router(x)[0])


def test_init_weights_is_a_function_of_the_seed(twin):
    config = families.read_config(twin("qwen3-moe-mixed")[0])
    one, same, other = (model.Transformer(config).init_weights(seed) for seed in (1, 1, 2))
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), same.parameters(), strict=True))
    assert not torch.equal(one.lm_head.weight, other.lm_head.weight)
    assert (one.model.norm.weight == 1).all() and one.lm_head.weight.std().item() == pytest.approx(
        0.02, rel=0.1
    )
    assert one(some_ids()).isfinite().all()


@pytest.mark.parametrize("bias", [None, torch.randn(513, generator=torch.Generator().manual_seed(1))])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_a_product_turned_round_for_decoding_is_the_same_product(bias, dtype, tolerance):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(513, 512, generator=generator).to(dtype)
    bias = None if bias is None else bias.to(dtype)
    for B, T in ((1, 1), (3, 1), (3, 2)):
        x = torch.randn(B, T, 512, generator=generator).to(dtype)
        exact = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
        with torch.no_grad():
            y = model.linear(x, weight, bias)
        assert y.shape == (B, T, 513) and y.dtype == dtype
        close(y, exact, tolerance)
        # turned only where it pays: its columns lie side by side then
        assert (y.stride(-1) != 1) == (B > 1 and T == 1)
        assert model.linear(x, weight, bias).stride(-1) == 1  # with gradients: as ever


def nll_and_gradients(N, chunk, dtype, C=12, V=50):
    """LinearNLL and float64 cross_entropy on the same numbers: two triples (nll, d hidden, d weight)."""
    torch.manual_seed(N)
    hidden, weight = torch.randn(N, C).to(dtype), torch.randn(V, C).to(dtype)
    targets, scale = torch.randint(0, V, (N,)), torch.randn(N)
    found = []
    for exact in (False, True):
        h, w = (t.double() if exact else t.clone() for t in (hidden, weight))
        h.requires_grad_(), w.requires_grad_()
        nll = (
            F.cross_entropy(h @ w.T, targets, reduction="none")
            if exact
            else model.LinearNLL.apply(h, w, targets, chunk)
        )
        (nll * scale).sum().backward()
        found.append((nll, h.grad, w.grad))
    return found


@pytest.mark.parametrize("N, chunk", [(1, 1), (7, 1), (7, 7), (7, 100), (20, 7), (28, 7), (29, 7), (40, 7)])
def test_linear_nll_equals_float64_cross_entropy(N, chunk):
    ours, exact = nll_and_gradients(N, chunk, torch.float32)
    assert ours[0].dtype == torch.float32
    for a, b in zip(ours, exact, strict=True):
        close(a, b, 1e-6)


def test_linear_nll_in_bfloat16():
    ours, exact = nll_and_gradients(20, 7, torch.bfloat16)
    assert ours[0].dtype == torch.float32 and ours[1].dtype == ours[2].dtype == torch.bfloat16
    for a, b in zip(ours, exact, strict=True):
        close(a, b, 1e-2)


def test_linear_nll_of_no_rows_is_nothing():
    """A micro-batch without supervised tokens: gradients of zero, not None and not nan."""
    ours, _ = nll_and_gradients(0, 7, torch.float32)
    assert ours[0].shape == (0,) and ours[1].shape == (0, 12)
    assert torch.equal(ours[2], torch.zeros(50, 12))


def test_linear_nll_memory_does_not_grow_with_rows():
    C, V, chunk, seen = 2, 1000, 16, []
    for N in (32, 4096):
        hidden, weight = (
            torch.randn(N, C, requires_grad=True),
            torch.randn(V, C, requires_grad=True),
        )
        with Largest() as largest:
            model.LinearNLL.apply(
                hidden, weight, torch.zeros(N, dtype=torch.long), chunk
            ).sum().backward()
        seen.append(largest.numel)
    assert seen == [chunk * V, chunk * V]


@pytest.mark.parametrize("chunk", [3, 100])
def test_entropy_equals_float64_and_leaves_the_nll_as_it_is(chunk):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(20, 16, generator=generator)
    weight = torch.randn(50, 16, generator=generator) * 2
    hidden[0] *= 30  # as good as certain: p log p of what is impossible must be 0, not nan
    targets = torch.randint(50, (20,), generator=generator)
    nll, entropy = model.nll_and_entropy(hidden, weight, targets, chunk)
    assert torch.equal(nll, model.LinearNLL.apply(hidden, weight, targets, chunk))
    p = (hidden.double() @ weight.double().T).softmax(-1)
    exact = -torch.xlogy(p, p).sum(-1)
    assert (entropy.double() - exact).abs().max() < 2e-4 and entropy[0].abs() < 1e-4


def test_a_forward_pass_gives_entropy_beside_the_nll(twin):
    student = model.load(twin("qwen3")[0])
    ids, targets = torch.randint(0, 50, (2, 9)), torch.randint(0, 50, (2, 9))
    targets[0, 3:] = -100
    nll, entropy = student(ids, targets, entropy=True)
    logp = student(ids).double().log_softmax(-1)
    exact = -(logp.exp() * logp).sum(-1)
    assert torch.equal(nll, student(ids, targets))
    assert (entropy - exact)[targets != -100].abs().max() < 1e-5
    assert (entropy[targets == -100] == 0).all() and not entropy.requires_grad
