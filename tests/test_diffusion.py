"""diffusion.py: the noise as statistics, losses and confidences against loops.

Oracles are written here from the formulas (LLaDA's GUIDELINES.md, dFactory's block-diffusion training), one sequence
and one token at a time, on tiny models with random weights.
"""

import hashlib
import itertools
import math

import numpy as np
import pytest
import torch

import data
import diffusion
import model
from diffusion import Corruption, corrupt_batch
from hf import families

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


def batch_of(student, examples=ALL, *, seed=3, step=7, train_set=SET, length=LONGEST, forced=None, **keys):
    return corrupt_batch(student.config, train_set, examples, Corruption(**keys), seed=seed, step=step, length=length,
                         forced=forced)  # fmt: skip


def weighted_nll(student, batch):
    with torch.no_grad():
        nll = student(batch["ids"], batch["targets"], positions=batch["positions"], attention=batch["attention"])
    return float((nll.double() * batch["weights"]).sum())


def noise(seed, step, name, n):
    """The documented draw: Philox keyed by sha256 of "seed step id"; first the level, then one number a position."""
    key = hashlib.sha256(f"{seed} {step} {name}".encode()).digest()[:16]
    return np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little"))).random(n)


# --------------------------------------------------------------------------------------------------
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


# --------------------------------------------------------------------------------------------------
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


# --------------------------------------------------------------------------------------------------
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
