"""diffusion.py: the noise as statistics, losses and confidences against loops, samplers against the authors' rules.

Oracles are written here from the formulas (LLaDA's GUIDELINES.md and generate.py, dFactory's block-diffusion training,
LLaDA2's and LLaDA2.1's generate), one sequence and one token at a time, on tiny models with random weights.
"""

import copy
import hashlib
import itertools
import math
import os
import pty
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from asking import ask
from test_model_diffusion import make_llada2

import data
import diffusion
import eval as evaluation
import model
import sample
from diffusion import corrupt_batch
from hf import families
from hf import tokenizer as tokenizer_file
from plumbing.config import InputError, read_json

ROOT = Path(__file__).parent.parent
MASK, EOS, V, BLOCK = 48, 2, 50, 4
LENGTHS = [(3, 5), (5, 8), (2, 1), (6, 12)]  # tokens of prompt and response of each example: no two rows alike


def make_student(attention, seed=0, std=0.4, **changes):
    config = families.Config(**{**dict(
        model_type={"full": "llada", "block": "llada2_moe"}[attention], vocab_size=V, hidden_size=32,
        intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        rms_norm_eps=1e-6, rope_theta=1e4, attention=attention, block_length=BLOCK, eos_token_ids=[EOS],
        pad_token_id=EOS, mask_token_id=MASK, max_position_embeddings=128), **changes})  # fmt: skip
    return model.Transformer(config).init_weights(seed, std=std).eval()


@pytest.fixture(scope="module", params=["full", "block"])
def student(request):
    return make_student(request.param)


def make_set(lengths=LENGTHS, seed=1):
    rng, spans, end = np.random.default_rng(seed), [], 0
    for prompt, response in lengths:
        spans.append((end, end + prompt, end + prompt + response))
        end += prompt + response
    tokens = rng.integers(3, MASK, end).astype(np.uint32)
    examples = [{"id": f"x{i}", "answer": None} for i in range(len(spans))]
    return data.Data("made here", tokens, np.array(spans), examples, {}, "")


SET = make_set()
ALL = np.arange(len(SET))
LONGEST = int((SET.spans[:, 2] - SET.spans[:, 0]).max())
FORCED = SET.response_mask() & (np.random.default_rng(5).random(len(SET.tokens)) < 0.4)


def batch_of(student, examples=ALL, *, seed=3, step=7, **keys):
    return corrupt_batch(student.config, keys.pop("train_set", SET), examples, seed=seed, step=step,
                         length=keys.pop("length", LONGEST), **keys)  # fmt: skip


def weighted_nll(student, batch):
    with torch.no_grad():
        nll = student(batch["ids"], batch["targets"], positions=batch["positions"], attention=batch["attention"])
    return float((nll.double() * batch["weights"]).sum())


def noise(seed, step, name, n):
    """The documented draw: Philox keyed by sha256 of "seed step id"; first the level, then one number a position."""
    key = hashlib.sha256(f"{seed} {step} {name}".encode()).digest()[:16]
    return np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little"))).random(n)


# ---------------------------------------------------------------------------------------------------------------------
# The noise


def test_noise_is_uniform_in_t_and_independent_over_tokens():
    """Statistics over 4000 rows: t, the masked share given t, neighbours; the prompt is never masked."""
    student, train_set = make_student("full"), make_set([(2, 10)] * 40)
    p, hit = [], []
    for step in range(100):
        batch = batch_of(student, range(40), step=step, train_set=train_set, length=12)
        p.append(1 / (batch["weights"][:, -1:].double() * 10))
        hit.append(batch["targets"] != -100)
        assert not hit[-1][:, :2].any() and (batch["ids"][:, :2] != MASK).all()
        assert ((batch["ids"] == MASK) == hit[-1]).all()
    p, hit = torch.cat(p).numpy(), torch.cat(hit)[:, 2:].numpy()
    rows = len(p)
    assert p.min() >= 1e-3 and p.max() <= 1
    counts = np.histogram(p, bins=10, range=(1e-3, 1))[0]
    assert ((counts - rows / 10) ** 2 / (rows / 10)).sum() < 27.9  # chi-square, 9 degrees of freedom, p = 0.001
    z = (hit - p) / np.sqrt(p * (1 - p))
    assert abs(z.sum()) / math.sqrt(z.size) < 3.3 and (np.abs(z.sum(0)) / math.sqrt(rows) < 4).all()
    for gap in (1, 2, 5):
        assert abs((z[:, :-gap] * z[:, gap:]).sum()) / math.sqrt(z[:, gap:].size) < 4
    assert abs((z[1:] * z[:-1]).sum()) / math.sqrt(z[1:].size) < 4  # other examples, other noise


def test_block_noise_has_its_range():
    student, train_set = make_student("block"), make_set([(0 + 4, 400)] * 50)
    for low, high in ((-1.0, -1.0), (0.05, 0.1)):
        batch = batch_of(student, range(50), train_set=train_set, length=404, t_min=low, t_max=high)
        share = (batch["targets"][:, 4:404] != -100).float().mean(1)
        low, high = (0.3, 0.8) if low < 0 else (low, high)
        assert share.min() > low - 0.1 and share.max() < high + 0.1
        assert share.min() < low + 0.1 * (high - low) + 0.05 and share.max() > high - 0.1 * (high - low) - 0.05


@pytest.mark.parametrize("objective", ["llada_pretrain", "llada", "block"])
def test_corruption_is_a_function_of_seed_step_and_example(objective):
    student = make_student("block" if objective == "block" else "full")
    whole = batch_of(student, objective=objective, forced=FORCED)
    again = batch_of(student, objective=objective, forced=FORCED)
    for key in ("ids", "targets", "weights"):
        assert torch.equal(whole[key], again[key])
    T = whole["ids"].shape[1] // (2 if objective == "block" else 1)
    for row, i in enumerate(ALL):
        alone = batch_of(student, [i], objective=objective, forced=FORCED)
        t = alone["ids"].shape[1] // (2 if objective == "block" else 1)
        for key in ("ids", "targets", "weights"):
            assert torch.equal(alone[key][0, :t], whole[key][row, :t])  # other rows change nothing
        assert (whole["targets"][row, t:T] == -100).all()
    for other in (dict(seed=4), dict(step=8)):
        assert not torch.equal(batch_of(student, objective=objective, **other)["ids"], whole["ids"])
    twice = make_set([LENGTHS[3]] * 2)
    twice.tokens[18:] = twice.tokens[:18]
    batch = batch_of(student, [0, 1], objective=objective, train_set=twice)  # the same text under another id
    assert not torch.equal(batch["ids"][0], batch["ids"][1])


# ---------------------------------------------------------------------------------------------------------------------
# Objectives


def log_probs(student, ids):
    """float64 log-probabilities (T, V) of one sequence."""
    with torch.no_grad():
        return student(torch.tensor([ids]))[0].double().log_softmax(-1)


def terms(student, clean, masked):
    """{masked position: -log p(its token)}; a block model sees its own block noisy and those before it clean."""
    noisy = [MASK if hit else token for token, hit in zip(clean, masked, strict=True)]
    if student.config.attention == "full":
        logp = log_probs(student, noisy)
        return {i: -float(logp[i, clean[i]]) for i in range(len(clean)) if masked[i]}
    found = {}
    for start in range(0, len(clean), BLOCK):
        logp = log_probs(student, clean[:start] + noisy[start : start + BLOCK])
        found |= {i: -float(logp[i, clean[i]]) for i in range(start, min(start + BLOCK, len(clean))) if masked[i]}
    return found


def step_loss(student, examples, objective, length, seed=3, step=7, forced=None, forced_weight="one", weighting="mean",
              low=None, high=None, complementary=False):  # fmt: skip
    """The loss of one step, from the formulas: (numerator, normaliser)."""
    numerator = denominator = 0.0
    for i in examples:
        start, prompt_end, end = (int(n) for n in SET.spans[i])
        clean, prompt = SET.tokens[start:end].tolist(), prompt_end - start
        if objective == "llada":
            clean = clean + [EOS] * (length - len(clean))
        if objective == "block":
            clean = clean + [EOS] * (-len(clean) % BLOCK)
        u = noise(seed, step, f"x{i}", 1 + len(clean))
        bottom, top = (0.3, 0.8) if objective == "block" else (1e-3, 1.0)
        bottom, top = bottom if low is None else low, top if high is None else high
        t = bottom + (top - bottom) * u[0]
        first = 0 if objective == "llada_pretrain" else prompt
        for second in [False, True] if complementary else [False]:
            p = 1 - t if second else t
            must = [forced is not None and at < end - start and bool(forced[start + at]) for at in range(len(clean))]
            masked = [at >= first and (u[1 + at] < t) != second or must[at] for at in range(len(clean))]
            nll = terms(student, clean, masked)
            by_p = sum(value / (1 if must[at] and forced_weight == "one" else p) for at, value in nll.items())
            if objective == "llada_pretrain":
                numerator, denominator = numerator + by_p, denominator + len(clean)
            elif objective == "llada":
                numerator, denominator = numerator + by_p / (length - prompt), denominator + 1
            elif weighting == "mean":
                numerator, denominator = numerator + sum(nll.values()), denominator + len(nll)
            else:
                numerator, denominator = numerator + by_p, denominator + len(clean) - prompt
    return numerator, denominator


VARIANTS = [
    ("llada_pretrain", {}), ("llada_pretrain", dict(complementary=True)), ("llada", {}),
    ("llada", dict(forced=FORCED)), ("llada", dict(forced=FORCED, forced_weight="t")),
    ("llada", dict(complementary=True, forced=FORCED)), ("llada", dict(low=0.2, high=0.4)),
    ("block", {}), ("block", dict(forced=FORCED)), ("block", dict(complementary=True, forced=FORCED)),
    ("block", dict(weighting="1/t", low=0.1, high=1.0)),
    ("block", dict(weighting="1/t", low=0.1, high=1.0, forced=FORCED)),
    ("block", dict(weighting="1/t", forced=FORCED, forced_weight="t", complementary=True)),
]  # fmt: skip


@pytest.mark.parametrize("objective, keys", VARIANTS)
def test_loss_equals_the_formulas(objective, keys):
    student = make_student("block" if objective == "block" else "full")
    expected = step_loss(student, ALL, objective, LONGEST, **keys)
    given = {{"low": "t_min", "high": "t_max"}.get(key, key): value for key, value in keys.items()}
    batch = batch_of(student, objective=objective, **given)
    assert batch["count"] == pytest.approx(expected[1])
    assert weighted_nll(student, batch) == pytest.approx(expected[0], rel=1e-5)
    assert batch["tokens"] == sum(a + b for a, b in LENGTHS) * (2 if keys.get("complementary") else 1)
    pieces = [batch_of(student, part, objective=objective, **given) for part in ([3], [], [1, 0], [2])]  # micro-batches
    assert sum(p["count"] for p in pieces) == pytest.approx(expected[1])
    assert sum(weighted_nll(student, p) for p in pieces) == pytest.approx(expected[0], rel=1e-5)


@pytest.mark.parametrize("objective", ["llada_pretrain", "llada", "block"])
@pytest.mark.parametrize("complementary", [False, True])
def test_what_is_read_and_seen(objective, complementary):
    """Tokens through the blocks and pairs in sight, row by row: `llada` pads are seen, other padding is not."""
    student, read, pairs = make_student("block" if objective == "block" else "full"), 0, 0
    for size in (sum(lengths) for lengths in LENGTHS):
        size = {"llada": LONGEST, "block": math.ceil(size / BLOCK) * BLOCK}.get(objective, size)
        sees = np.ones((size, size), dtype=bool)
        if objective == "block":
            *_, sees = diffusion.noisy_and_clean(np.zeros((1, size)), np.zeros((1, size)), BLOCK)
        read, pairs = read + sees.shape[-1], pairs + sees.sum()
    batch = batch_of(student, objective=objective, complementary=complementary)
    assert (batch["read"], batch["pairs"]) == (read * (1 + complementary), pairs * (1 + complementary))
    assert batch_of(student, [], objective=objective)["pairs"] == 0


def test_default_objectives_are_the_families_own():
    for attention, objective in (("full", "llada"), ("block", "block")):
        student = make_student(attention)
        one, other = batch_of(student), batch_of(student, objective=objective)
        assert all(torch.equal(one[key], other[key]) for key in ("ids", "targets", "weights"))


def test_logits_are_made_at_masked_positions_only(monkeypatch, student):
    seen = []
    plain = model.LinearNLL.apply
    monkeypatch.setattr(model.LinearNLL, "apply", lambda rows, *rest: seen.append(len(rows)) or plain(rows, *rest))
    batch = batch_of(student, forced=FORCED)
    weighted_nll(student, batch)
    masked = batch["ids"] == MASK
    assert seen == [int(masked.sum())] and torch.equal(batch["targets"] != -100, masked)


def test_a_batch_without_examples_takes_part_and_counts_nothing():
    for attention, objective in (("full", "llada"), ("full", "llada_pretrain"), ("block", "block")):
        student = make_student(attention)
        batch = batch_of(student, [], objective=objective)
        nll = student(batch["ids"], batch["targets"], positions=batch["positions"], attention=batch["attention"])
        (nll * batch["weights"]).sum().backward()
        assert batch["count"] == 0 and batch["tokens"] == 0
        assert all(p.grad is not None and torch.equal(p.grad, torch.zeros_like(p)) for p in student.parameters())


def any_order_nll(student, clean, answer):
    """Mean over all orders of revealing the answer of the sum of -log p(token | what is revealed): the bound."""
    table = {mask: terms(student, clean, [i in mask for i in range(len(clean))])
             for n in range(1, len(answer) + 1) for mask in itertools.combinations(answer, n)}  # fmt: skip
    total = 0.0
    for order in itertools.permutations(answer):
        for k, i in enumerate(order):
            total += table[tuple(sorted(order[k:]))][i]
    return total / math.factorial(len(answer))


@pytest.mark.parametrize("objective, weighting", [("llada", ""), ("block", "1/t"), ("llada_pretrain", "")])
def test_expected_loss_is_the_bound_on_the_negative_log_likelihood(monkeypatch, objective, weighting):
    """Enumerated: every mask of four tokens, integrated over t (exactly: it is a polynomial of degree 3 in t)."""
    student = make_student("block" if objective == "block" else "full")
    first = 0 if objective == "llada_pretrain" else 4
    train_set = make_set([(4, 4)] if first else [(1, 3)])
    T = len(train_set.tokens)
    nodes, node_weights = np.polynomial.legendre.leggauss(4)
    expected = 0.0
    for x, node_weight in zip(nodes, node_weights, strict=True):
        u0 = (x + 1) / 2
        for mask in itertools.product([False, True], repeat=4):
            u = np.array([u0] + [0.5] * first + [0.0 if hit else 1 - 1e-12 for hit in mask])
            monkeypatch.setattr(diffusion, "uniforms", lambda key, name, n, u=u: u)
            batch = batch_of(student, [0], objective=objective, weighting=weighting, train_set=train_set, length=T,
                             t_min=1e-9, t_max=1.0)  # fmt: skip
            t = 1e-9 + (1 - 1e-9) * u0
            chance = t ** sum(mask) * (1 - t) ** (4 - sum(mask))
            expected += node_weight / 2 * chance * weighted_nll(student, batch) / batch["count"]
    bound = any_order_nll(student, train_set.tokens.tolist(), range(first, first + 4)) / 4  # a mean over tokens
    assert expected == pytest.approx(bound, rel=1e-6)


def test_forced_tokens_count_once_on_average_with_weight_one():
    """Over t and masks every answer token weighs 1 (over the answer's length); with weight t a forced one 6.9."""
    student, forced = make_student("full"), SET.response_mask() & (np.arange(len(SET.tokens)) % 3 == 0)
    for kind, expected in (("one", 1.0), ("t", math.log(1000) / 0.999)):
        total, n = np.zeros(2), np.zeros(2)
        for step in range(1500):
            batch = batch_of(student, [3], step=step, forced=forced, forced_weight=kind)
            weight = (batch["weights"] * (batch["targets"] != -100))[0, 6:].double().numpy() * 12
            for group in (0, 1):
                chosen = forced[SET.spans[3, 1] : SET.spans[3, 2]] == bool(group)
                total[group], n[group] = total[group] + weight[chosen].sum(), n[group] + chosen.sum()
        assert total[0] / n[0] == pytest.approx(1.0, abs=0.1)
        assert total[1] / n[1] == pytest.approx(expected, rel=1e-6 if kind == "one" else 0.25)


def test_complementary_rows_cover_the_answer_once():
    student = make_student("full")
    batch = batch_of(student, complementary=True, forced=FORCED)
    masked, pads = batch["targets"] != -100, np.zeros(LONGEST, dtype=bool)
    for row, (start, prompt_end, end) in enumerate(SET.spans):
        pads[: end - start] = FORCED[start:end]
        pads[end - start :] = False
        one, other = masked[2 * row].numpy(), masked[2 * row + 1].numpy()
        assert np.array_equal(one & other, pads)  # forced: in both
        assert (one | other)[prompt_end - start :].all() and not (one | other)[: prompt_end - start].any()


@pytest.mark.parametrize("T, block", [(8, 4), (6, 2), (5, 1), (4, 4)])
def test_block_mask_equals_the_loops(T, block):
    ids, positions, sees = diffusion.noisy_and_clean(np.full((2, T), 7), np.full((2, T), 9), block)
    assert ids.tolist() == [[7] * T + [9] * T] * 2 and positions.tolist() == [[*range(T), *range(T)]]
    for i in range(2 * T):
        for j in range(2 * T):
            a, b = i % T // block, j % T // block
            rule = {(True, True): a == b, (True, False): b < a, (False, False): b <= a, (False, True): False}
            assert sees[0, 0, i, j] == rule[i < T, j < T]


@pytest.mark.parametrize("attention, keys, message", [
    ("full", dict(objective="block"), "not for llada"), ("block", dict(objective="llada"), "not for llada2_moe"),
    ("full", dict(objective="mdlm"), "must be one of llada_pretrain, llada, block"),
    ("full", dict(weighting="mean"), "only block objectives"), ("block", dict(weighting="t"), "must be mean or 1/t"),
    ("full", dict(forced_weight="2"), "must be one or t"), ("full", dict(t_min=0.0), "t_min"),
    ("block", dict(t_min=0.9), "t_min"), ("block", dict(t_max=1.5), "t_max"), ("block", dict(t_max=-3.0), "t_max"),
    ("full", dict(length=3), "length 3 is less than the 18 tokens"),
])  # fmt: skip
def test_objectives_that_cannot_be(attention, keys, message):
    with pytest.raises(InputError, match=message):
        batch_of(make_student(attention), **keys)


def test_models_that_cannot_be_trained_like_this():
    for changes, message in ((dict(mask_token_id=V), "50 ids"), (dict(mask_token_id=None), "mask_token_id None"),
                             (dict(attention="causal"), "no masked-diffusion model"),
                             (dict(pad_token_id=None, eos_token_ids=[]), "cannot be padded")):  # fmt: skip
        with pytest.raises(InputError, match=message):
            config = replace(make_student("full").config, **changes)
            corrupt_batch(config, SET, ALL, seed=0, step=0, length=LONGEST)


# ---------------------------------------------------------------------------------------------------------------------
# Confidence


def clean_answer(student, i):
    start, prompt_end, end = (int(n) for n in SET.spans[i])
    clean = SET.tokens[start:end].tolist()
    return clean + [EOS] * (-len(clean) % BLOCK if student.config.attention == "block" else 0), prompt_end - start


def test_confidence_in_one_pass(student):
    found = diffusion.confidence(student, SET, ALL)
    for i, ours in zip(ALL, found, strict=True):
        clean, prompt = clean_answer(student, i)
        nll = terms(student, clean, [at >= prompt for at in range(len(clean))])
        assert ours.shape == (LENGTHS[i][1],) and ours.dtype == np.float32
        assert ours == pytest.approx([-nll[prompt + k] for k in range(len(ours))], rel=1e-5, abs=1e-5)


def test_confidence_by_draws(student):
    """Every response token once per draw: by a mask or by its complement."""
    found = diffusion.confidence(student, SET, [3, 0], draws=3, seed=11)
    for i, ours in zip([3, 0], found, strict=True):
        clean, prompt = clean_answer(student, i)
        mean = np.zeros(LENGTHS[i][1])
        for k in range(3):
            u = noise(11, f"draw {k}", f"x{i}", 1 + len(clean))
            hit = u[1:] < (k + u[0]) / 3
            answer = np.arange(len(clean)) >= prompt
            for masked in (hit & answer, ~hit & answer):
                for at, value in terms(student, clean, masked.tolist()).items():
                    if at - prompt < len(mean):
                        mean[at - prompt] -= value / 3
        assert ours == pytest.approx(mean, rel=1e-5, abs=1e-5)


def test_confidence_asks_for_as_many_passes_whatever_there_is_to_do(monkeypatch, student):
    passes, plain = [], model.Transformer.forward
    monkeypatch.setattr(model.Transformer, "forward", lambda *a, **k: passes.append(1) or plain(*a, **k))
    for draws, n in ((0, 1), (2, 4)):
        for examples in ([], [1, 2]):
            passes.clear()
            assert len(diffusion.confidence(student, SET, examples, draws)) == len(examples)
            assert len(passes) == n


# ---------------------------------------------------------------------------------------------------------------------
# Samplers

PROMPTS = [[5, 6, 7], [9, 8, 9, 9, 11, 3, 9, 30, 31], [4, MASK, 12], [40]]  # a mask in a prompt is prompt


def trajectory(student, prompt, n, **keys):
    """[(canvas, positions written), ...] of one prompt; nothing ends it unless asked."""
    return [(canvas[0].tolist(), new[0].nonzero().flatten().tolist())
            for canvas, new in ask(sample.generate, student, [prompt], n, **{"eos_ids": (), **keys})]  # fmt: skip


def llada_by_the_rules(student, prompt, n, block, steps, cfg=0.0, threshold=None, no_eos=False, eos_last=(),
                       temperature=0.0, random=False):  # fmt: skip
    """LLaDA's generate.py, one sequence; the documented uniforms (seed 0, example 0) where it draws."""
    x, P, found = prompt + [MASK] * n, len(prompt), []
    per = steps // (n // block)
    for b in range(n // block):
        low, high = P + b * block, P + (b + 1) * block
        for step in range(per):
            with torch.no_grad():
                logits = student(torch.tensor([x]))[0]
                if cfg:
                    free = student(torch.tensor([[MASK] * P + x[P:]]))[0]
                    logits = free + (cfg + 1) * (logits - free)
            logits = logits.double()
            if no_eos:
                logits[:, EOS] = -torch.inf
            p = logits.softmax(-1)
            logits[:, MASK] = -torch.inf
            proposed = logits.argmax(-1).tolist()
            u = noise(f"0 {b}", step, 0, 2 * block)
            if temperature:
                cdf = (logits[low:high] / temperature).softmax(-1).cumsum(-1)
                proposed[low:high] = [int((row > u[i] * row[-1]).nonzero()[0]) for i, row in enumerate(cdf)]
            sure = {i: float(u[block + i - low] if random else p[i, proposed[i]])
                    for i in range(low, high) if x[i] == MASK}  # fmt: skip
            count = block // per + (step < block % per)
            order = sorted(sure, key=lambda i: (proposed[i] in eos_last, -sure[i], i))
            chosen = order[:count]
            if threshold is not None:
                above = [i for i in order if sure[i] > threshold and proposed[i] not in eos_last]
                chosen = above if len(above) >= count else chosen
            if not chosen:
                break
            for i in chosen:
                x[i] = proposed[i]
            found.append((list(x), sorted(chosen)))
    return found


@pytest.mark.parametrize("block, steps", [(8, 24), (8, 6), (4, 18), (24, 9), (24, 24), (8, 3), (1, 24)])
@pytest.mark.parametrize("cfg", [0.0, 1.5])
def test_llada_sampler_equals_the_rules_at_temperature_0(block, steps, cfg):
    for seed in range(2):
        student = make_student("full", seed=seed)
        for prompt in PROMPTS[:2]:
            expected = llada_by_the_rules(student, prompt, 24, block, steps, cfg)
            assert len(expected) == steps
            ours = trajectory(student, prompt, 24, block_length=block, denoising_steps=steps, cfg_scale=cfg)
            assert ours == expected


@pytest.mark.parametrize("keys", [dict(temperature=0.8), dict(temperature=1.5), dict(remasking="random"),
                                  dict(temperature=1.0, remasking="random")], ids=str)  # fmt: skip
def test_what_is_drawn_is_a_function_of_seed_example_block_pass_and_position(keys):
    student = make_student("full")
    expected = llada_by_the_rules(student, PROMPTS[1], 24, 8, 12, temperature=keys.get("temperature", 0.0),
                                  random="remasking" in keys)  # fmt: skip
    assert trajectory(student, PROMPTS[1], 24, block_length=8, denoising_steps=12, **keys) == expected


@pytest.mark.parametrize("threshold", [0.05, 0.3, 0.9])
def test_threshold_writes_all_that_is_sure_and_at_least_one(threshold):
    lengths = []
    for seed in range(3):
        student = make_student("full", seed=seed)
        expected = llada_by_the_rules(student, PROMPTS[1], 24, 8, 24, threshold=threshold)
        assert trajectory(student, PROMPTS[1], 24, block_length=8, threshold=threshold) == expected
        lengths.append(len(expected))
    assert min(lengths) < 24 if threshold < 0.9 else max(lengths) > 12


def with_an_end(student, prompt, n, block):
    """A student that writes EOS into the first block: where it was surest of a token it now is surer of EOS."""
    student = copy.deepcopy(student)
    canvas, (at, *_) = trajectory(student, prompt, n, block_length=block, threshold=1.0)[0]
    with torch.no_grad():
        student.lm_head.weight[EOS] = 1.5 * student.lm_head.weight[canvas[at]]
    return student, canvas[at]


def test_eos_rules():
    """never: LLaDA's logits_eos_inf; last: its confidence_eos_eot_inf as it was meant (LLaDA#137)."""
    later = 0
    for seed in range(4):
        student, eot = with_an_end(make_student("full", seed=seed), PROMPTS[0], 16, 16)
        free = trajectory(student, PROMPTS[0], 16, block_length=16)
        never = trajectory(student, PROMPTS[0], 16, block_length=8, eos_rule="never", eos_ids={EOS})
        assert never == llada_by_the_rules(student, PROMPTS[0], 16, 8, 16, no_eos=True)
        assert EOS in free[-1][0] and EOS not in never[-1][0]
        for threshold in (0.0, 0.2):
            last = trajectory(student, PROMPTS[0], 16, block_length=16, eos_rule="last", eos_ids={EOS, eot},
                              threshold=threshold)  # fmt: skip
            assert last == llada_by_the_rules(student, PROMPTS[0], 16, 16, 16, threshold=threshold or None,
                                              eos_last=(EOS, eot))  # fmt: skip
        passes = [sum(EOS not in canvas for canvas, _ in run) / len(run) for run in (free, last)]
        later += passes[1] > passes[0]
    assert later >= 3


def llada2_by_the_rules(student, prompt, n, threshold=0.95, steps=None, edit=None):
    """LLaDA2's and (with edit) LLaDA2.1's generate at temperature 0: no cache, one sequence."""
    c = student.config
    block, P, found = c.block_length, len(prompt), []
    total = math.ceil((P + n) / block) * block
    x, count = prompt + [c.mask_token_id] * (total - P), block // (steps or block)
    for low in range(P // block * block, total, block):
        span, post = range(max(low, P), low + block), 0
        while True:
            masked = [i for i in span if x[i] == c.mask_token_id]
            if not masked:
                post += 1
                if edit is None or post > 16:
                    break
            with torch.no_grad():
                logits = student(torch.tensor([x[: low + block]]))[0].double()
            p = logits.softmax(-1)
            logits[:, c.mask_token_id] = -torch.inf
            proposed = logits.argmax(-1).tolist()
            above = [i for i in masked if p[i, proposed[i]] > threshold]
            order = sorted(masked, key=lambda i: (-float(p[i, proposed[i]]), i))
            chosen = above if len(above) >= count else order[:count]
            edits = [i for i in span if edit is not None and i not in masked and proposed[i] != x[i]
                     and p[i, proposed[i]] > edit]  # fmt: skip
            for i in chosen + edits:
                x[i] = proposed[i]
            found.append((list(x), sorted(chosen + edits)))
            if not masked and not edits:
                break
        if any(i in c.eos_token_ids for i in x[P : low + block]):
            break
    return found


@pytest.fixture(scope="module")
def mini(tmp_path_factory):
    """A LLaDA2 with experts, blocks of 4."""
    folder = tmp_path_factory.mktemp("llada2")
    make_llada2(folder)
    return model.load(folder)


MINI_PROMPTS = [[5, 60, 7], [9, 8, 9, 9, 11, 3, 9, 30, 31], [4, 6, 4, 12], [40]]


@pytest.mark.parametrize("keys", [
    {}, dict(threshold=0.2), dict(denoising_steps=10, threshold=1.0), dict(edit_threshold=0.3),
    dict(edit_threshold=0.0, threshold=0.1),
], ids=str)  # fmt: skip
def test_llada2_sampler_equals_the_rules_with_and_without_cache(mini, keys):
    steps = keys.get("denoising_steps")
    for prompt in MINI_PROMPTS[: 2 if "edit_threshold" in keys else 4]:
        expected = llada2_by_the_rules(mini, prompt, 18, keys.get("threshold", 0.95), steps and steps // 5,
                                       keys.get("edit_threshold"))  # fmt: skip
        for use_cache in (True, False):
            ours = trajectory(mini, prompt, 18, eos_ids={2}, use_cache=use_cache, **keys)
            assert ours == expected


def test_editing_changes_something_and_ends(mini):
    plain = trajectory(mini, MINI_PROMPTS[1], 18)
    edited = trajectory(mini, MINI_PROMPTS[1], 18, edit_threshold=0.0)
    assert plain[-1][0] != edited[-1][0]
    blocks = math.ceil((9 + 18) / 4) - 2
    assert len(plain) < len(edited) <= blocks * (4 + diffusion.MAX_POST_STEPS)


def test_the_cache_holds_what_a_clean_pass_would_write(mini, monkeypatch):
    """And a pass reads one block, never more, whatever lies before it."""
    made, fed, plain = [], [], model.Transformer.forward

    def forward(self, ids, *args, cache=None, **keys):
        made.append(cache)
        fed.append(ids.shape[1])
        return plain(self, ids, *args, cache=cache, **keys)

    monkeypatch.setattr(model.Transformer, "forward", forward)
    *_, (canvas, _) = ask(sample.generate, mini, [MINI_PROMPTS[1]], 23, eos_ids=())
    assert fed[0] == 8 and set(fed[1:]) == {4} and canvas.shape[1] == 32
    clean = model.Cache(mini.config, 1, 32)
    with torch.no_grad():
        plain(mini, canvas[:, :28], cache=clean)  # the last block is not needed any more
    for ours, theirs in ((made[0].k, clean.k), (made[0].v, clean.v)):
        for a, b in zip(ours, theirs, strict=True):
            assert torch.allclose(a[:, :, :28], b[:, :, :28], atol=1e-5)


SETTINGS = [
    {}, dict(temperature=1.0), dict(temperature=0.7, top_k=8, top_p=0.9), dict(remasking="random"),
    dict(temperature=1.0, threshold=0.2), dict(temperature=1.0, edit_threshold=0.1), dict(eos_rule="last"),
]  # fmt: skip


@pytest.mark.parametrize("keys", SETTINGS, ids=str)
def test_answers_do_not_depend_on_batch_or_order(student, keys):
    def answers(order, **more):
        found = ask(sample.sample, student, [PROMPTS[i] for i in order], 20, seed=3, example_ids=[f"x{i}" for i in order], eos_ids={EOS},
            **{"temperature": 0, "block_length": 4, **keys, **more})  # fmt: skip
        return dict(zip(order, found, strict=True))

    together = answers([0, 1, 2, 3])
    assert answers([3, 1, 0, 2]) == answers([0, 1, 2, 3], batch_size=3) == together
    assert {i: answers([i])[i] for i in range(4)} == together
    if keys.get("temperature") or "remasking" in keys:
        other = ask(sample.sample, student, PROMPTS, 20, **{"temperature": 0, **keys, "block_length": 4, "seed": 4},
                                  example_ids=[f"x{i}" for i in range(4)], eos_ids={EOS})  # fmt: skip
        assert other != list(together.values())
    if student.config.attention == "block":
        uncached = ask(sample.write_in_blocks, student, PROMPTS, 20, seed=3, example_ids=[f"x{i}" for i in range(4)],
                                    eos_ids={EOS}, use_cache=False, **keys)  # fmt: skip
        assert uncached == list(together.values())


def test_tokens_are_drawn_from_the_softmax(student):
    """One token, 4000 times: the counts against softmax(logits / temperature), chi-square over the likely ones."""
    with torch.no_grad():
        logits = student(torch.tensor([[5, 6, 7, MASK]]))[0, 3].double()
    logits[MASK] = -torch.inf
    expected = 4000 * (logits / 0.8).softmax(-1).numpy()
    drawn = ask(sample.write_in_blocks, student, [[5, 6, 7]] * 4000, 1, temperature=0.8, eos_ids=())
    counts = np.bincount([answer[0] for answer in drawn], minlength=V)
    likely = expected > 10
    assert likely.sum() > 4 and counts[MASK] == 0
    chi = ((counts - expected)[likely] ** 2 / expected[likely]).sum()
    assert chi < likely.sum() + 4 * math.sqrt(2 * likely.sum())


def test_random_order_is_random():
    """LLaDA's remasking = random: which of 8 masks is filled first is uniform, whatever the model is sure of."""
    first = np.zeros(8)
    steps = ask(sample.generate, make_student("full"), [[5, 6, 7]] * 2000, 8, remasking="random")
    _, new = next(steps)
    assert (new.sum(1) == 1).all()
    first = new[:, 3:].sum(0).numpy()
    assert ((first - 250) ** 2 / 250).sum() < 24.3  # 7 degrees of freedom, p = 0.001


def test_neither_the_mask_nor_ids_beyond_the_tokenizer_come_out(student):
    raw = student(torch.tensor([PROMPTS[1] + [MASK] * 3]))[0].softmax(-1)
    assert raw[:, MASK].max() > 1e-4 and raw[:, 40:].sum(-1).max() > 1e-2  # they could
    answers = ask(sample.write_in_blocks, student, [PROMPTS[1]] * 50, 32, temperature=1.5, vocab_size=40, eos_ids=())
    assert {len(a) for a in answers} == {32} and max(max(a) for a in answers) < 40
    answers = ask(sample.write_in_blocks, student, [PROMPTS[1]] * 50, 32, temperature=1.5, eos_ids=())
    assert not any(MASK in a for a in answers) and max(max(a) for a in answers) > 40


def test_confidence_is_the_probability_among_all_ids():
    """LLaDA's: the mask and ids beyond the tokenizer are never proposed, but keep their share; in float64."""
    config, logits = make_student("full").config, torch.zeros(1, V)
    logits[0, [MASK, 44]], logits[0, 7] = 3.0, 1.0
    total = 2 * math.exp(3.0) + math.e + V - 3
    for eos_rule, rest in (("free", 0.0), ("never", 1.0)):
        rule = sample.Decoding(eos_rule=eos_rule, eos_ids=[EOS], vocab_size=40)
        for temperature, u in ((0.0, None), (1e-9, torch.full((1,), 0.5, dtype=torch.float64))):
            token, sure = sample.propose(logits.clone(), u, replace(rule, temperature=temperature), config)
            assert token.tolist() == [7] and sure.dtype == torch.float64
            assert sure.item() == pytest.approx(math.e / (total - rest), rel=1e-14)


def test_two_tokens_that_float32_cannot_tell_apart_are_drawn_by_float64_probabilities():
    """1 + 1e-12 over 1e-12: the second has odds exp(1), in float32 they would be even."""
    config, logits = make_student("full").config, torch.full((1, V), -1e9, dtype=torch.float64)
    logits[0, 5], logits[0, 6] = 1.0, 1.0 + 1e-12
    rule = sample.Decoding(temperature=1e-12, eos_ids=[], vocab_size=V)
    for u, expected in ((0.26, 5), (0.28, 6)):  # 1 / (1 + e) = 0.269
        token, _ = sample.propose(logits.clone(), torch.tensor([u], dtype=torch.float64), rule, config)
        assert token.tolist() == [expected]


def test_decoding_stops_after_the_block_with_the_end(student):
    ended = 0
    for prompt in PROMPTS:
        likely, _ = with_an_end(student, prompt, 60, 4)
        *_, (canvas, _) = ask(sample.generate, likely, [prompt], 60, block_length=4, eos_ids={EOS})
        row = canvas[0].tolist()
        end, start = row.index(EOS, len(prompt)), len(prompt) if likely.config.attention == "full" else 0
        stop = start + (end - start) // 4 * 4 + 4
        assert MASK not in row[len(prompt) : stop] and set(row[stop:]) == {MASK}  # that block is whole, none behind it
        ended += stop < len(row) - 8
        *_, (default, _) = ask(sample.generate, likely, [prompt], 60, block_length=4)  # the model's own ids
        assert torch.equal(default, canvas)
        assert ask(sample.write_in_blocks, likely, [prompt], 60, block_length=4) == [row[len(prompt) : end]]
        answers = ask(sample.sample, likely, PROMPTS, 60, temperature=0, block_length=4, eos_ids={EOS})
        assert answers[PROMPTS.index(prompt)] == row[len(prompt) : end]
    assert ended >= 3


@pytest.mark.parametrize("attention, keys, message", [
    ("full", dict(block_length=7), "block_length = 7 does not divide max_new_tokens = 24"),
    ("full", dict(block_length=8, denoising_steps=2), "denoising_steps = 2: must be a multiple of the 3 blocks"),
    ("full", dict(block_length=8, denoising_steps=10), "denoising_steps = 10"),
    ("block", dict(denoising_steps=5), "denoising_steps = 5: must be a multiple of the 6 blocks"),
    ("block", dict(block_length=8), "trained for 4"), ("block", dict(cfg_scale=1.0), "only for LLaDA"),
    ("full", dict(remasking="random", threshold=0.5), "exclude each other"),
    ("full", dict(remasking="high"), "remasking = high"), ("full", dict(threshold=1.5), "threshold = 1.5"),
    ("full", dict(temperature=-1.0), "temperature = -1.0"), ("full", dict(eos_rule="first"), "eos_rule = first"),
    ("full", dict(max_new_tokens=128), "3 tokens and max_new_tokens = 128 are longer than the model's context of 128"),
    ("full", dict(max_new_tokens=0), "max_new_tokens = 0"),
])  # fmt: skip
def test_decoding_that_cannot_be(attention, keys, message):
    with pytest.raises(InputError, match=message):
        next(ask(sample.generate, make_student(attention), [PROMPTS[0]], **{"max_new_tokens": 24, **keys}))


def test_prompts_that_cannot_be():
    student = make_student("full")
    for prompt in ([], [V], [-1]):
        with pytest.raises(InputError, match="prompt 1 is empty or has an id outside"):
            next(ask(sample.generate, student, [[3], prompt], 8, block_length=8))
    with pytest.raises(InputError, match="prompt 0 of 130 tokens .* context of 128"):
        ask(sample.sample, student, [[5] * 130], 8, block_length=8)
    student.config = replace(student.config, mask_token_id=V)
    with pytest.raises(InputError, match="mask_token_id 50 is not one of"):
        next(ask(sample.generate, student, [[3]], 8))
    with torch.no_grad():
        student = make_student("full")
        student.lm_head.weight[7] = torch.nan
    with pytest.raises(InputError, match="not finite"):
        next(ask(sample.generate, student, [[3]], 8))


# ---------------------------------------------------------------------------------------------------------------------
# The same commands


WORLD = dict(teacher=3, students=("llada",))


def test_eval_samples_from_a_diffusion_student(world, monkeypatch, capsys):
    monkeypatch.chdir(world)
    results = evaluation.main(model="llada", data="data/toy-1/unseen", temperature=0.0, max_new_tokens=16,
                              samples=2, block_length=8, device="cpu")  # fmt: skip
    rows, summary = results["llada"][1], read_json("runs/llada/eval/unseen.json")
    problems, student = data.load("data/toy-1/unseen"), model.load("llada")
    tokenizer = tokenizer_file.load_tokenizer(Path("llada"))
    for row in rows:
        i = [e["id"] for e in problems.examples].index(row["id"])
        ids = ask(sample.write_in_blocks, student, [problems.prompt(i).tolist()], 16, block_length=8, eos_ids={0},
                               vocab_size=tokenizer.vocab_size)[0]  # fmt: skip
        assert row["response"] == tokenizer.decode(ids) and "<|mask|>" not in row["response"]
    assert len(rows) == 6 and summary["block_length"] == 8 and summary["problems"] == 3
    capsys.readouterr()


COMMAND = [sys.executable, str(ROOT / "sample.py"), "--model=llada", "--prompt=3+5*2-7+4?", "--max_new_tokens=16",
           "--block_length=8", "--device=cpu"]  # fmt: skip


def test_into_a_pipe_goes_the_answer_alone(world):
    done = subprocess.run([*COMMAND, "--denoising_steps=4"], cwd=world, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0 and not done.stderr, done.stderr
    student, tokenizer = model.load(world / "llada"), tokenizer_file.load_tokenizer(world / "llada")
    prompt = tokenizer.encode_prompt([{"role": "user", "content": "3+5*2-7+4?"}])
    [ids] = ask(sample.sample, student, [prompt], 16, block_length=8, denoising_steps=4, eos_ids={0},
                vocab_size=tokenizer.vocab_size)  # fmt: skip
    assert done.stdout == tokenizer.decode(ids) + "\n"



def test_the_command_draws_on_a_terminal(world):
    ours, theirs = pty.openpty()
    process = subprocess.Popen(COMMAND, cwd=world, stdout=theirs, stderr=theirs, close_fds=True)
    os.close(theirs)
    seen = b""
    try:
        while piece := os.read(ours, 4096):
            seen += piece
    except OSError:  # how Linux ends a terminal
        pass
    assert process.wait(timeout=100) == 0
    text = seen.decode()
    assert text.startswith("\x1b[?1049h\x1b[H\x1b[J") and text.count("\x1b[J") == text.count("pass ")
    assert "\x1b[32m" in text and "░" in text
    end = text.rpartition("\x1b[?1049l")[2]
    assert "░" not in end and end.strip().endswith("forward passes)")


@pytest.mark.parametrize("argument, message", [
    ("--prompt=", "--prompt is missing"), ("--block_length=5", "does not divide"), ("--model=nowhere", "nowhere"),
    ("--device=foo", "--device=foo: not on"),
    ("--dtype=float16", "float32 or bfloat16"), ("--max_new_tokens=1000", "context of 256"),
    ("--model=data/toy-1", "config.json"),
])  # fmt: skip
def test_the_command_refuses_in_one_line(world, monkeypatch, argument, message):
    monkeypatch.chdir(world)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    given = dict(word[2:].split("=", 1) for word in [*COMMAND[2:5], COMMAND[6], "--block_length=8", argument])
    typed = {k: int(v) if k in ("max_new_tokens", "block_length") else v for k, v in given.items()}
    with pytest.raises(InputError, match=message) as error:
        sample.main(**typed)
    assert "\n" not in str(error.value)
