"""diffusion.py: the noise as statistics, losses and confidences against loops.

Oracles are written here from the formulas (LLaDA's GUIDELINES.md, dFactory's block-diffusion training), one sequence
and one token at a time, on tiny models with random weights.
"""

import hashlib
import itertools
import math
import warnings

import numpy as np
import pytest
import torch

import data
import diffusion
import model
import two_copies
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
KEPT = SET.response_mask() & (np.random.default_rng(6).random(len(SET.tokens)) < 0.6)
HEAVY = (KEPT * np.random.default_rng(7).random(len(SET.tokens)) * 3).astype(np.float32)  # weights, 0 for some


def batch_of(student, examples=ALL, *, seed=3, step=7, train_set=SET, length=LONGEST, **keys):
    masks = {name: keys.pop(name, None) for name in ("forced", "kept")}
    return corrupt_batch(student.config, train_set, examples, Corruption(**keys), seed=seed, step=step, length=length,
                         **masks)  # fmt: skip


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
    student, train_set = make_student("block", max_position_embeddings=404), make_set([(4, 400)] * 50)
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


def soft_chance(t, selected, maskable, w, budget):
    """Masking probability of every position: the selected at w times the odds of the others, found by bisection."""

    def chances(q):
        odds = q / (1 - q) if q < 1 else math.inf
        return [w * odds / (1 + w * odds) if odds < math.inf and hit else q for hit in selected]

    low, high = 0.0, 1.0
    wanted = t * sum(maskable)
    for _ in range(200):
        middle = (low + high) / 2
        expected = sum(p for p, may in zip(chances(middle), maskable, strict=True) if may)
        low, high = (middle, high) if expected < wanted else (low, middle)
    return chances(t if budget == "more" else (low + high) / 2)


def step_loss(student, examples, objective, length, seed=3, step=7, forced=None, forced_weight="one", weighting="mean",
              low=None, high=None, complementary=False, kept=None, anchors="visible", forced_odds=0.0,
              forced_budget="same", forced_below=1.0):  # fmt: skip
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
        response = range(prompt, end - start)
        w = [0.0 if at < first else 1.0 for at in range(len(clean))]
        for at in response:
            w[at] = 1.0 if kept is None else float(kept[start + at])
            if forced is not None and forced[start + at] > 0:
                w[at] *= float(forced[start + at])
        may = [at >= first and (anchors == "unscored" or w[at] > 0) for at in range(len(clean))]
        chosen = [forced is not None and at in response and forced[start + at] > 0 and w[at] > 0
                  for at in range(len(clean))]  # fmt: skip
        p = [t] * len(clean)
        if forced_odds and t < forced_below:
            p = soft_chance(t, [a and b for a, b in zip(chosen, may, strict=True)], may, forced_odds, forced_budget)
        for second in [False, True] if complementary else [False]:
            level = 1 - t if second else t
            must = [hit and not forced_odds and level < forced_below for hit in chosen]
            masked = [may[at] and (u[1 + at] < p[at]) != second or must[at] for at in range(len(clean))]
            chance = [1.0 if must[at] else 1 - p[at] if second else p[at] for at in range(len(clean))]
            nll = {at: value for at, value in terms(student, clean, masked).items() if w[at] > 0}
            by_p = sum(w[at] * value / (level if chosen[at] and forced_weight == "t" else chance[at])
                       for at, value in nll.items())  # fmt: skip
            total = sum(w)
            if objective == "llada":
                numerator += by_p / total if total else 0.0
                denominator += total > 0
            elif objective == "block" and weighting == "mean":
                numerator += sum(w[at] * value for at, value in nll.items())
                denominator += sum(w[at] for at in nll)
            else:
                numerator, denominator = numerator + by_p, denominator + total
    return numerator, denominator


VARIANTS = [
    ("llada_pretrain", {}), ("llada_pretrain", dict(complementary=True)), ("llada", {}),
    ("llada", dict(forced=FORCED)), ("llada", dict(forced=FORCED, forced_weight="t")),
    ("llada", dict(complementary=True, forced=FORCED)), ("llada", dict(low=0.2, high=0.4)),
    ("block", {}), ("block", dict(forced=FORCED)), ("block", dict(complementary=True, forced=FORCED)),
    ("block", dict(weighting="1/t", low=0.1, high=1.0)),
    ("block", dict(weighting="1/t", low=0.1, high=1.0, forced=FORCED)),
    ("block", dict(weighting="1/t", forced=FORCED, forced_weight="t", complementary=True)),
    # selections that keep: anchors visible or unscored; weights; beside forced tokens
    ("llada", dict(kept=KEPT)), ("llada", dict(kept=KEPT, anchors="unscored")), ("llada", dict(kept=HEAVY)),
    ("llada_pretrain", dict(kept=HEAVY, complementary=True)), ("llada_pretrain", dict(kept=KEPT, anchors="unscored")),
    ("llada", dict(kept=KEPT, forced=FORCED, complementary=True)),
    ("block", dict(kept=KEPT)), ("block", dict(kept=KEPT, anchors="unscored")),
    ("block", dict(kept=HEAVY, anchors="unscored", complementary=True)),
    ("block", dict(kept=KEPT, forced=FORCED)), ("block", dict(kept=HEAVY, forced=FORCED, anchors="unscored")),
    ("block", dict(kept=KEPT, weighting="1/t", low=0.1, high=1.0, complementary=True)),
    ("block", dict(kept=HEAVY, forced=HEAVY, weighting="1/t", low=0.1, high=1.0)),
    # softer forcing
    ("llada", dict(forced=FORCED, forced_odds=2.0)),
    ("llada", dict(forced=FORCED, forced_odds=5.0, complementary=True)),
    ("llada", dict(forced=FORCED, forced_odds=3.0, forced_weight="t")),
    ("llada_pretrain", dict(forced=FORCED, forced_odds=1e5)),
    ("block", dict(forced=FORCED, forced_odds=2.0)), ("block", dict(forced=FORCED, forced_odds=1.0)),
    ("block", dict(forced=FORCED, forced_odds=40.0, complementary=True)),
    ("block", dict(forced=FORCED, forced_odds=2.0, forced_budget="more")),
    ("block", dict(forced=FORCED, forced_odds=2.0, kept=HEAVY, weighting="1/t", low=0.1, high=1.0)),
    ("block", dict(forced=FORCED, forced_below=0.5)),
    ("block", dict(forced=FORCED, forced_below=0.5, complementary=True)),
    ("llada", dict(forced=FORCED, forced_below=0.4, forced_odds=4.0, complementary=True)),
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
            sees = two_copies.square(size, BLOCK).numpy()
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


def masked_at(batch, T):
    return (batch["ids"][:, :T] == MASK).numpy()


@pytest.mark.parametrize("objective", ["llada_pretrain", "llada", "block"])
def test_keeping_every_token_changes_no_bit(objective):
    """All True, and all 1.0, are the loss without a selection; a weight of 2 on all is it too, but for llada's 1/L'."""
    student = make_student("block" if objective == "block" else "full")
    plain = batch_of(student, objective=objective, complementary=True)
    for everything in (SET.response_mask(), SET.response_mask().astype(np.float32)):
        for anchors in ("visible", "unscored"):
            batch = batch_of(student, objective=objective, complementary=True, kept=everything, anchors=anchors)
            assert all(torch.equal(batch[key], plain[key]) for key in ("ids", "targets", "weights"))
            assert batch["count"] == plain["count"]


@pytest.mark.parametrize("attention", ["full", "block"])
def test_anchors_are_never_masked_or_masked_as_ever(attention):
    """visible: an anchor is in no mask; unscored: the masks are those without a selection. In neither is it scored."""
    student = make_student(attention)
    anchors, T = SET.response_mask() & ~KEPT, 20
    lay = np.zeros((len(SET), T), dtype=bool)
    for row, (start, _, end) in enumerate(SET.spans):
        lay[row, : end - start] = anchors[start:end]
    for step in range(30):
        plain = batch_of(student, step=step)
        T = plain["ids"].shape[1] // (2 if attention == "block" else 1)
        hidden = masked_at(plain, T)
        visible = batch_of(student, step=step, kept=KEPT)
        unscored = batch_of(student, step=step, kept=KEPT, anchors="unscored")
        at = lay[:, :T]
        assert np.array_equal(masked_at(visible, T), hidden & ~at)
        assert np.array_equal(masked_at(unscored, T), hidden)
        for batch in (visible, unscored):
            assert np.array_equal((batch["targets"][:, :T] != -100).numpy(), hidden & ~at)


def test_forcing_softly_keeps_the_budget_and_the_odds():
    """w times the odds, as many masks on average as without; w = 1 is plain, a great w masks the forced first."""
    rng = np.random.default_rng(0)
    rows = diffusion.lay_out(make_student("full").config, SET, ALL, np.full(4, 30), "key")
    rows.forced = rows.maskable & (rng.random(rows.maskable.shape) < 0.4)
    n, f = rows.maskable.sum(1), rows.forced.sum(1)
    for t in (0.01, 0.2, 0.5, 0.9, 0.999):
        level = np.full((4, 1), t)
        for w in (1.0, 1.5, 2.0, 10.0, 1e3, 1e6):
            p = diffusion.tilt(level, rows, w, "same")
            assert (p * rows.maskable).sum(1) == pytest.approx(t * n, rel=1e-6)
            for row in range(4):
                forced, other = p[row][rows.forced[row]][0], p[row][rows.maskable[row] & ~rows.forced[row]][0]
                assert forced / (1 - forced) == pytest.approx(w * other / (1 - other), rel=1e-4)
        assert diffusion.tilt(level, rows, 1.0, "same") == pytest.approx(np.full(p.shape, t))
        for row in range(4):  # w -> infinity: the forced ones first
            forced = p[row][rows.forced[row]][0]
            assert forced == pytest.approx(min(1.0, t * n[row] / f[row]), abs=2e-3)
        assert (diffusion.tilt(level, rows, 1e6, "more")[rows.forced] > 1 - 2e-4).all()
        assert diffusion.tilt(level, rows, 1e6, "more")[~rows.forced] == pytest.approx(t)


def test_forced_at_great_odds_on_top_of_the_budget_is_the_papers_union():
    for attention in ("full", "block"):
        student = make_student(attention)
        for step in range(10):
            union = batch_of(student, step=step, forced=FORCED, t_min=0.2, t_max=0.8)
            soft = batch_of(student, step=step, forced=FORCED, t_min=0.2, t_max=0.8, forced_odds=1e6,
                            forced_budget="more")  # fmt: skip
            assert torch.equal(union["ids"], soft["ids"]) and torch.equal(union["targets"], soft["targets"])
            one = batch_of(student, step=step, forced=FORCED, t_min=0.2, t_max=0.8, forced_odds=1.0)
            assert torch.equal(one["ids"], batch_of(student, step=step, t_min=0.2, t_max=0.8)["ids"])


def test_complementary_rows_cover_the_answer_once_whatever_the_odds():
    for odds in (1.0, 2.0, 100.0):
        batch = batch_of(make_student("full"), complementary=True, forced=FORCED, forced_odds=odds)
        masked = (batch["targets"] != -100).numpy()
        assert not (masked[::2] & masked[1::2]).any()
        for row, (start, prompt_end, _) in enumerate(SET.spans):
            assert (masked[2 * row] | masked[2 * row + 1])[prompt_end - start :].all()


def test_nothing_is_forced_above_the_level():
    """Rows of a level below forced_below are the union, the others what they are without forcing."""
    student, seen = make_student("full"), set()
    for step in range(20):
        plain, union, partly = (masked_at(batch_of(student, step=step, **keys), LONGEST) for keys in (
            {}, dict(forced=FORCED), dict(forced=FORCED, forced_below=0.5)))  # fmt: skip
        for row, i in enumerate(ALL):
            below = 1e-3 + 0.999 * noise(3, step, f"x{i}", 1)[0] < 0.5
            assert np.array_equal(partly[row], union[row] if below else plain[row])
            seen.add((bool(below), bool((union[row] != plain[row]).any())))
    assert {(True, True), (False, True)} <= seen


def test_rows_are_as_long_as_the_longest_example_of_the_step():
    """Of full attention, however short: LLaDA's rows have no floor. A step of examples of 8 tokens reads 8."""
    for length in (LONGEST, 3):
        examples = [2] if length == 3 else ALL
        batch = batch_of(make_student("full"), examples, length=length)
        assert batch["ids"].shape[1] == length and batch["attention"] == "full"
    assert batch_of(make_student("full"), [2], objective="llada_pretrain")["ids"].shape == (1, 3)


def test_arrays_reach_torch_without_a_warning():
    """forced_weight=t once passed an array that must not be written to."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for weight in ("one", "t"):
            batch_of(make_student("full"), forced=FORCED, forced_weight=weight)


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
