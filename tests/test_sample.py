"""sample.py: greedy ids and probabilities against transformers, the authors' samplers, the command on a terminal.

Oracles of the masked-diffusion samplers are written here from the rules (LLaDA's generate.py, LLaDA2's and LLaDA2.1's
generate), one sequence and one token at a time, on tiny models with random weights.
"""

import contextlib
import copy
import functools
import io
import itertools
import math
import os
import pty
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from asking import ask
from test_diffusion import EOS, MASK, V, make_student, noise
from test_model_diffusion import make_llada2
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.generation.logits_process import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

import data
import denoise
import eval as evaluation
import model
import sample
from hf import tokenizer as tokenizer_file
from plumbing.config import read_json
from plumbing.parallel import pick_dtype
from sampling import Sampling, next_token, smallest_kept

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module", params=["full", "block"])
def student(request):
    return make_student(request.param)


# --------------------------------------------------------------------------------------------------
# Autoregressive students: greedy ids against transformers

SHAPE = dict(vocab_size=97, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=128, pad_token_id=0)  # fmt: skip
TWINS = {  # several ends of text, so that random weights reach one
    "qwen3": ("qwen3", dict(head_dim=16, tie_word_embeddings=True, eos_token_id=[5, 6, 7, 8, 9])),
    "qwen2": ("qwen2", dict(tie_word_embeddings=False, eos_token_id=[7, 8, 9, 10])),
    "llama": ("llama", dict(tie_word_embeddings=False, eos_token_id=[3, 11, 20, 21, 22])),
}
LENGTHS = (5, 1, 17, 9, 3, 12, 2, 8)


@pytest.fixture(scope="module")
def twin(tmp_path_factory):
    """name -> (our model, transformers' model) of the same random weights."""

    @functools.cache
    def make(name):
        family, more = TWINS[name]
        torch.manual_seed(0)
        oracle = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SHAPE | more)).eval()
        with torch.no_grad():
            for parameter in oracle.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.3)
        folder = tmp_path_factory.mktemp(name)
        oracle.save_pretrained(folder)
        return model.load(folder), oracle

    return make


def some_prompts(lengths=LENGTHS, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(30, 97, n).tolist() for n in lengths]


def without_end(ids, eos_ids):
    return list(itertools.takewhile(lambda i: i not in eos_ids, ids))


@pytest.mark.parametrize("name", TWINS)
def test_greedy_ids_equal_transformers(twin, name):
    """Uneven prompts: each alone, and as one batch padded on the left, as transformers wants it."""
    ours, oracle = twin(name)
    eos = ours.config.eos_token_ids
    prompts, new = some_prompts(), 24
    answers = ask(sample.sample, ours, prompts, new, temperature=0)  # ends with the model's own ids

    longest = max(LENGTHS)
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    batch = oracle.generate(ids, attention_mask=mask, max_new_tokens=new, do_sample=False)[:, longest:].tolist()
    for prompt, row, answer in zip(prompts, batch, answers, strict=True):
        alone = oracle.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), max_new_tokens=new,
                                do_sample=False)[0, len(prompt) :].tolist()  # fmt: skip
        assert answer == without_end(alone, eos) == without_end(row, eos)
    ended = [len(answer) < new for answer in answers]
    assert any(ended) and len({len(answer) for answer in answers}) > 2  # rows left the batch at different times


def test_batch_size_and_order_change_no_answer(twin):
    ours, _ = twin("llama")
    prompts, eos = some_prompts(), ours.config.eos_token_ids
    names = [f"problem {i}" for i in range(len(prompts))]

    def answers(order, batch_size, temperature):
        found = ask(sample.sample, ours, [prompts[i] for i in order], 24, temperature, seed=4, eos_ids=eos,
                                  example_ids=[names[i] for i in order], batch_size=batch_size)  # fmt: skip
        return {names[i]: ids for i, ids in zip(order, found, strict=True)}

    for temperature in (0, 1.0):
        expected = answers(range(8), 1, temperature)
        assert len({tuple(ids) for ids in expected.values()}) > 4
        for batch_size in (2, 3, 8, 100):
            assert answers([5, 2, 7, 0, 1, 6, 3, 4], batch_size, temperature) == expected
    assert answers([6], 1, 1.0) == {names[6]: answers(range(8), 8, 1.0)[names[6]]}


def test_from_twelve_rows_on_the_kernels_see_shapes_that_depend_on_no_other_row(twin, monkeypatch):
    """Twelve rows or more, keys and prompts in whole tiles of 16, four rows for the head: shapes for which a CPU's
    products and attention give a row the same bits (docs/LOG.md). Below, and on a GPU, no row is added."""
    ours, _ = twin("llama")
    shapes = []

    def seen(ids, **keys):
        at = keys.get("logits_at")
        logits = model.Transformer.forward(ours, ids, **keys)
        shapes.append((*ids.shape, None if at is None else at.shape[1], keys["cache"].end))
        return logits

    monkeypatch.setattr(ours, "forward", seen)
    prompts = [[40] * length for length in (33, 18, 17, 16, 3)]
    ask(sample.sample, ours, prompts, 5, 1.0, eos_ids=(), batch_size=12)
    assert shapes[:3] == [(1, 48, 4, 48), (2, 32, 4, 32), (2, 16, 4, 16)]
    assert shapes[3:] == [(12, 1, None, 48)] * 4
    shapes.clear()
    ask(sample.sample, ours, prompts, 5, 1.0, eos_ids=(), batch_size=11)
    assert shapes[3:] == [(5, 1, None, 48)] * 4


def test_more_tokens_continue_the_same_answer(twin):
    ours, _ = twin("qwen3")
    short, long = (ask(sample.sample, ours, some_prompts(), n, 1.0, seed=1, eos_ids=()) for n in (6, 20))
    assert [ids[:6] for ids in long] == short and {len(ids) for ids in long} == {20}


def test_seeds_and_example_ids_change_the_answer(twin):
    ours, _ = twin("qwen3")
    prompts = [[40, 41]] * 2
    one, other = ask(sample.sample, ours, prompts, 12, 1.0, seed=1)
    assert one != other  # the same prompt, asked twice
    assert ask(sample.sample, ours, prompts, 12, 1.0, seed=2)[0] != one
    assert ask(sample.sample, ours, prompts[:1], 12, 1.0, seed=1, example_ids=[1]) == [other]


def test_the_end_is_not_part_of_the_answer(twin):
    ours, _ = twin("qwen3")
    free = ask(sample.sample, ours, some_prompts(), 20, temperature=0, eos_ids=())
    for n in (0, 3, 11):
        end = free[2][n]
        stopped = ask(sample.sample, ours, some_prompts(), 20, temperature=0, eos_ids=[end])
        assert stopped == [without_end(ids, [end]) for ids in free] and end not in sum(stopped, [])


def test_rows_that_pad_the_embedding_never_come_out(twin):
    ours, _ = twin("qwen3")
    for temperature in (0, 1.0, 50.0):
        ids = sum(ask(sample.sample, ours, some_prompts(), 30, temperature, vocab_size=60), [])
        assert max(ids) < 60
    assert max(sum(ask(sample.sample, ours, some_prompts(), 30, 50.0), [])) >= 60


# --------------------------------------------------------------------------------------------------
# Autoregressive students: probabilities against transformers' processors, by sweeping the uniforms


@pytest.mark.parametrize("temperature, top_k, top_p", [
    (1.0, 0, 1.0), (0.6, 0, 1.0), (2.5, 0, 1.0), (1.0, 1, 1.0), (1.0, 7, 1.0), (1.0, 10**6, 1.0), (1.0, 0, 0.9),
    (1.0, 0, 1e-6), (0.7, 20, 0.8), (1.5, 3, 0.5),
])  # fmt: skip
def test_probabilities_equal_transformers(temperature, top_k, top_p):
    torch.manual_seed(2)
    logits = torch.randn(3, 50) * 3
    n = 20000
    u = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    keys = Sampling(temperature=temperature, top_p=top_p, top_k=top_k)
    drawn = []
    for row in logits:
        ids = next_token(row.expand(n, 50), u, keys)
        drawn.append(torch.bincount(ids, minlength=50) / n)
    drawn = torch.stack(drawn)
    scores = TemperatureLogitsWarper(temperature)(None, logits)
    scores = TopKLogitsWarper(min(top_k, 50))(None, scores) if top_k else scores
    scores = TopPLogitsWarper(top_p)(None, scores) if top_p < 1 else scores
    expected = torch.softmax(scores, -1)
    assert (drawn - expected).abs().max() < 2 / n
    assert (drawn[expected == 0] == 0).all()


def test_ids_of_probability_zero_are_never_drawn():
    logits = torch.tensor([[-200.0, 0.0, -200.0, 0.0, -200.0]])
    for u, expected in ((0.0, 1), (0.4999, 1), (0.5001, 3), (1 - 2**-53, 3)):
        u = torch.tensor([u], dtype=torch.float64)
        assert next_token(logits, u, Sampling()).item() == expected


def test_top_p_where_the_1024_likeliest_do_not_hold_it():
    """next_token sorts the whole vocabulary only then; the other row of the batch must not notice."""
    logits = torch.stack([torch.zeros(5000), torch.linspace(0, -40, 5000)])
    p = torch.softmax(logits, -1)
    kept = p >= smallest_kept(p, top_p=0.9, top_k=0)
    expected = [TopPLogitsWarper(0.9)(None, row[None]).isfinite().sum().item() for row in logits[1:]]
    assert kept[0].all() and kept[1].sum().item() == expected[0]


# --------------------------------------------------------------------------------------------------
# Masked-diffusion students: the canvas against the authors' rules

PROMPTS = [[5, 6, 7], [9, 8, 9, 9, 11, 3, 9, 30, 31], [4, MASK, 12], [40]]


def trajectory(student, prompt, n, **keys):
    """[(canvas, positions written), ...] of one prompt; nothing ends it unless asked."""
    return [(canvas[0].tolist(), new[0].nonzero().flatten().tolist())
            for canvas, new in ask(denoise.generate, student, [prompt], n, **{"eos_ids": (), **keys})]  # fmt: skip


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
            if eos_last:  # the ends leave the softmax of the confidence
                rest = logits.clone()
                rest[:, list(eos_last)] = -torch.inf
                p = rest.softmax(-1)
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


def test_ends_leave_the_softmax_of_the_confidence():
    """A: x 0.40, end-of-text 0.39; B: y 0.50. Ranked last only, B is written first; by LLaDA's rule A: 0.40 / 0.61."""
    config = make_student("full").config
    p = torch.full((2, V), 1e-9, dtype=torch.float64)
    p[0, [5, EOS, 7]] = torch.tensor([0.40, 0.39, 0.21], dtype=torch.float64)
    p[1, [6, 8]] = torch.tensor([0.50, 0.50 - 1e-6], dtype=torch.float64)
    for rule, expected in (("free", [0.40, 0.50]), ("last", [0.40 / 0.61, 0.50])):
        keys = denoise.Decoding(eos_rule=rule, eos_ids=[EOS, 9], vocab_size=V, temperature=0.0)
        token, sure = denoise.propose(p.log(), None, keys, config)
        assert token.tolist() == [5, 6] and sure.tolist() == pytest.approx(expected, rel=1e-5)
    p[0, 5], p[0, EOS] = 0.30, 0.49  # an end may still be proposed, with confidence 0
    token, sure = denoise.propose(p.log(), None, keys, config)
    assert token.tolist() == [EOS, 6] and sure[0] == 0


def test_never_forbids_the_end_of_the_text_and_not_the_end_of_a_turn():
    """logits_eos_inf: without an end-of-turn no answer would ever end. Here the likeliest token is an end-of-turn."""
    student, eot = with_an_end(make_student("full"), PROMPTS[0], 16, 16)
    # EOS is likeliest where eot was: forbidden, it leaves eot in its place
    ended = ask(sample.sample, student, [PROMPTS[0]], 16, block_length=16, eos_rule="never", eos_ids={EOS, eot})
    free = ask(sample.sample, student, [PROMPTS[0]], 16, block_length=16, eos_rule="never", eos_ids={EOS})
    assert len(ended[0]) < 16 == len(free[0]) and eot in free[0] and EOS not in free[0]
    for config, eos_ids, expected in (
        (student.config, [EOS, eot], [EOS]),
        (replace(student.config, eos_token_ids=[EOS, eot]), [EOS, eot], [EOS]),  # LLaDA2.2's generation_config
        (replace(student.config, pad_token_id=9, eos_token_ids=[11]), [11, eot], [11]),
        (student.config, [], []),
    ):
        assert denoise.end_of_text(config, eos_ids) == expected


@pytest.mark.parametrize("attention", ["full", "block"])
def test_left_to_right_writes_in_the_order_of_reading(attention):
    student = make_student(attention)
    steps = trajectory(student, PROMPTS[1], 16, block_length=4, remasking="left_to_right", temperature=1.0)
    assert [written for _, written in steps] == [[i] for i in range(9, 9 + len(steps))]


@pytest.mark.parametrize("attention", ["full", "block", "causal"])
def test_no_prompts_have_no_answers(attention):
    student = make_student("full" if attention == "causal" else attention)
    student.config = replace(student.config, attention=attention)
    assert ask(sample.sample, student, [], 8) == []
    if attention == "causal":
        assert ask(sample.write_left_to_right, student, [], 8, example_ids=[], eos_ids=()) == []
    else:
        assert ask(denoise.write_in_blocks, student, [], 8) == []
        assert list(ask(denoise.generate, student, [], 8)) == []
        assert ask(denoise.fill_gaps, student, [], 8) == []


def gaps_by_the_rules(student, text, block, per):
    """Fill a text's masks at temperature 0, `per` a pass, no cache: blocks from the first mask on, or from 0."""
    whole = student.config.attention == "block"
    first = text.index(MASK)
    low = first // block * block if whole else first
    x = text + [EOS] * (-len(text) % block if whole else 0)
    gaps = [i for i, token in enumerate(x) if token == MASK]
    while low < len(x):
        while masked := [i for i in gaps if low <= i < low + block and x[i] == MASK]:
            with torch.no_grad():
                logits = student(torch.tensor([x[: low + block] if whole else x]))[0].double()
            p = logits.softmax(-1)
            logits[:, MASK] = -torch.inf
            proposed = logits.argmax(-1).tolist()
            for i in sorted(masked, key=lambda i: (-float(p[i, proposed[i]]), i))[:per]:
                x[i] = proposed[i]
        low += block
    return x[: len(text)]


@pytest.mark.parametrize("attention", ["full", "block"])
def test_masks_in_a_text_are_filled(attention):
    """Gaps in several blocks, at the ends, none at all; each text as alone, and as the rules say."""
    texts = [[5, MASK, 7, 9, 8, MASK, MASK, 12, 30, 31, 4, MASK, 6], [MASK, 3], [5, 6, 7], [9, 8, 11, 3, MASK]]
    for seed in range(3):
        student = make_student(attention, seed=seed)
        keys = dict(block_length=4, denoising_steps=16, threshold=1.0)
        together = ask(denoise.fill_gaps, student, texts, 16, eos_ids=[EOS], **keys)
        for text, filled in zip(texts, together, strict=True):
            assert len(filled) == len(text) and MASK not in filled
            assert all(new == old for new, old in zip(filled, text, strict=True) if old != MASK)
            if MASK in text:
                assert filled == gaps_by_the_rules(student, text, 4, 1)
                assert ask(denoise.fill_gaps, student, [text], 16, eos_ids=[EOS], **keys) == [filled]


def test_masks_in_a_prompt_are_filled_before_it_is_answered(student):
    prompt = [4, MASK, 12, 9, 9, MASK, 3]
    keys = dict(block_length=4, threshold=1.0)
    for use_cache in (True, False):
        *_, (canvas, _) = ask(denoise.generate, student, [prompt, [5, 6]], 8, eos_ids=(), use_cache=use_cache, **keys)
        row = canvas[0, :15].tolist()
        assert MASK not in row and [row[i] for i in (0, 2, 3, 4, 6)] == [4, 12, 9, 9, 3]
        if use_cache:
            first = row
    assert row == first  # with the cache of a block model as without


def test_another_block_length_is_used_with_a_warning(mini, capsys):
    """As if the model had been trained for it; said once, and not on standard output."""
    other = copy.copy(mini)
    other.config = replace(mini.config, block_length=8)
    denoise.warn.cache_clear()
    for prompt in MINI_PROMPTS:
        expected = llada2_by_the_rules(other, prompt, 18)
        for use_cache in (True, False):
            ours = trajectory(mini, prompt, 18, eos_ids={2}, use_cache=use_cache, block_length=8)
            assert ours == expected
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err == "warning: --block_length=8, but this model was trained for 4\n"
    assert trajectory(mini, MINI_PROMPTS[0], 18, block_length=4) == trajectory(mini, MINI_PROMPTS[0], 18)


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


MINI_PROMPTS = [[5, 59, 7], [9, 8, 9, 9, 11, 3, 9, 30, 31], [4, 6, 4, 12], [40]]


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
    assert len(plain) < len(edited) <= blocks * (4 + denoise.MAX_POST_STEPS)


def test_the_cache_holds_what_a_clean_pass_would_write(mini, monkeypatch):
    """And a pass reads one block, never more, whatever lies before it."""
    made, fed, plain = [], [], model.Transformer.forward

    def forward(self, ids, *args, cache=None, **keys):
        made.append(cache)
        fed.append(ids.shape[1])
        return plain(self, ids, *args, cache=cache, **keys)

    monkeypatch.setattr(model.Transformer, "forward", forward)
    *_, (canvas, _) = ask(denoise.generate, mini, [MINI_PROMPTS[1]], 23, eos_ids=())
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
        names = [f"x{i}" for i in order]
        how = {"temperature": 0, "block_length": 4, **keys, **more}
        found = ask(sample.sample, student, [PROMPTS[i] for i in order], 20, seed=3, example_ids=names, eos_ids={EOS},
                    **how)  # fmt: skip
        return dict(zip(order, found, strict=True))

    together = answers([0, 1, 2, 3])
    assert answers([3, 1, 0, 2]) == answers([0, 1, 2, 3], batch_size=3) == together
    assert {i: answers([i])[i] for i in range(4)} == together
    if keys.get("temperature") or "remasking" in keys:
        other = ask(sample.sample, student, PROMPTS, 20, **{"temperature": 0, **keys, "block_length": 4, "seed": 4},
                                  example_ids=[f"x{i}" for i in range(4)], eos_ids={EOS})  # fmt: skip
        assert other != list(together.values())
    if student.config.attention == "block":
        uncached = ask(denoise.write_in_blocks, student, PROMPTS, 20, seed=3, example_ids=[f"x{i}" for i in range(4)],
                                    eos_ids={EOS}, use_cache=False, **keys)  # fmt: skip
        assert uncached == list(together.values())


def test_tokens_are_drawn_from_the_softmax(student):
    """One token, 4000 times: the counts against softmax(logits / temperature), chi-square over the likely ones."""
    with torch.no_grad():
        logits = student(torch.tensor([[5, 6, 7, MASK]]))[0, 3].double()
    logits[MASK] = -torch.inf
    expected = 4000 * (logits / 0.8).softmax(-1).numpy()
    drawn = ask(denoise.write_in_blocks, student, [[5, 6, 7]] * 4000, 1, temperature=0.8, eos_ids=())
    counts = np.bincount([answer[0] for answer in drawn], minlength=V)
    likely = expected > 10
    assert likely.sum() > 4 and counts[MASK] == 0
    chi = ((counts - expected)[likely] ** 2 / expected[likely]).sum()
    assert chi < likely.sum() + 4 * math.sqrt(2 * likely.sum())


def test_random_order_is_random():
    """LLaDA's remasking = random: which of 8 masks is filled first is uniform, whatever the model is sure of."""
    first = np.zeros(8)
    steps = ask(denoise.generate, make_student("full"), [[5, 6, 7]] * 2000, 8, remasking="random")
    _, new = next(steps)
    assert (new.sum(1) == 1).all()
    first = new[:, 3:].sum(0).numpy()
    assert ((first - 250) ** 2 / 250).sum() < 24.3  # 7 degrees of freedom, p = 0.001


def test_neither_the_mask_nor_ids_beyond_the_tokenizer_come_out(student):
    raw = student(torch.tensor([PROMPTS[1] + [MASK] * 3]))[0].softmax(-1)
    assert raw[:, MASK].max() > 1e-4 and raw[:, 40:].sum(-1).max() > 1e-2  # they could
    answers = ask(denoise.write_in_blocks, student, [PROMPTS[1]] * 50, 32, temperature=1.5, vocab_size=40, eos_ids=())
    assert {len(a) for a in answers} == {32} and max(max(a) for a in answers) < 40
    answers = ask(denoise.write_in_blocks, student, [PROMPTS[1]] * 50, 32, temperature=1.5, eos_ids=())
    assert not any(MASK in a for a in answers) and max(max(a) for a in answers) > 40


def test_confidence_is_the_probability_among_all_ids():
    """LLaDA's: the mask and ids beyond the tokenizer are never proposed, but keep their share; in float64."""
    config, logits = make_student("full").config, torch.zeros(1, V)
    logits[0, [MASK, 44]], logits[0, 7] = 3.0, 1.0
    total = 2 * math.exp(3.0) + math.e + V - 3
    for eos_rule, rest in (("free", 0.0), ("never", 1.0)):
        rule = denoise.Decoding(eos_rule=eos_rule, eos_ids=[EOS], vocab_size=40)
        for temperature, u in ((0.0, None), (1e-9, torch.full((1,), 0.5, dtype=torch.float64))):
            token, sure = denoise.propose(logits.clone(), u, replace(rule, temperature=temperature), config)
            assert token.tolist() == [7] and sure.dtype == torch.float64
            assert sure.item() == pytest.approx(math.e / (total - rest), rel=1e-14)


def test_two_tokens_that_float32_cannot_tell_apart_are_drawn_by_float64_probabilities():
    """1 + 1e-12 over 1e-12: the second has odds exp(1), in float32 they would be even."""
    config, logits = make_student("full").config, torch.full((1, V), -1e9, dtype=torch.float64)
    logits[0, 5], logits[0, 6] = 1.0, 1.0 + 1e-12
    rule = denoise.Decoding(temperature=1e-12, eos_ids=[], vocab_size=V)
    for u, expected in ((0.26, 5), (0.28, 6)):  # 1 / (1 + e) = 0.269
        token, _ = denoise.propose(logits.clone(), torch.tensor([u], dtype=torch.float64), rule, config)
        assert token.tolist() == [expected]


def test_decoding_stops_after_the_block_with_the_end(student):
    ended = 0
    for prompt in PROMPTS:
        likely, _ = with_an_end(student, prompt, 60, 4)
        *_, (canvas, _) = ask(denoise.generate, likely, [prompt], 60, block_length=4, eos_ids={EOS})
        row = canvas[0].tolist()
        end, start = row.index(EOS, len(prompt)), 0
        if likely.config.attention == "full":  # its blocks begin behind the prompt, or with a mask inside
            start = prompt.index(MASK) if MASK in prompt else len(prompt)
        stop = start + (end - start) // 4 * 4 + 4
        assert MASK not in row[len(prompt) : stop] and set(row[stop:]) == {MASK}  # that block is whole, none behind it
        ended += stop < len(row) - 8
        *_, (default, _) = ask(denoise.generate, likely, [prompt], 60, block_length=4)  # the model's own ids
        assert torch.equal(default, canvas)
        assert ask(denoise.write_in_blocks, likely, [prompt], 60, block_length=4) == [row[len(prompt) : end]]
        answers = ask(sample.sample, likely, PROMPTS, 60, temperature=0, block_length=4, eos_ids={EOS})
        assert answers[PROMPTS.index(prompt)] == row[len(prompt) : end]
    assert ended >= 3


# --------------------------------------------------------------------------------------------------
# The commands

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
        ids = ask(denoise.write_in_blocks, student, [problems.prompt(i).tolist()], 16, block_length=8, eos_ids={0},
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


def on_a_terminal(words, cwd, typed=(), interrupt_after=""):
    """Run a command on a terminal of its own -> (all that appears there, exit code).

    typed: lines, each typed when a new "> " waits for it; at last Ctrl-D. interrupt_after: Ctrl-C once this was seen.
    """
    ours, theirs = pty.openpty()
    process = subprocess.Popen(words, cwd=cwd, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True)
    os.close(theirs)
    seen, asked, typed = b"", 0, [*typed, "\x04"]
    with contextlib.suppress(OSError):  # how Linux ends a terminal
        while piece := os.read(ours, 4096):
            seen += piece
            if interrupt_after and interrupt_after.encode() in seen:
                process.send_signal(signal.SIGINT)
                interrupt_after = ""
            if typed and seen.count(b"\n> ") + seen.startswith(b"> ") > asked:
                line = typed.pop(0)
                os.write(ours, line.encode() if line == "\x04" else f"{line}\n".encode())
                asked += 1
    os.close(ours)
    return seen.decode().replace("\r\n", "\n"), process.wait(timeout=100)


def test_a_masked_diffusion_answer_is_drawn_on_a_terminal(world):
    text, code = on_a_terminal(COMMAND, world)
    assert code == 0
    assert text.startswith("\x1b[?1049h\x1b[H\x1b[J") and text.count("\x1b[J") == text.count("pass ")
    assert "\x1b[32m" in text and "░" in text
    end = text.rpartition("\x1b[?1049l")[2]
    assert "░" not in end and end.strip().endswith("forward passes)")


def test_the_command_fills_gaps(world, monkeypatch, capsys):
    """A mask word stands for one token; the text goes to the model as it is, special tokens and all."""
    monkeypatch.chdir(world)
    student, tokenizer = model.load("llada"), tokenizer_file.load_tokenizer(Path("llada"))
    keys = dict(model="llada", device="cpu", block_length=8, max_new_tokens=16)
    for word in ("░", "<gap>"):
        text = sample.main(prompt=f"<|user|>3+5{word}2?<|assistant|>3+5={word}{word}", mask_word=word, **keys)
        ids = [*tokenizer.encode("<|user|>3+5"), 3, *tokenizer.encode("2?<|assistant|>3+5="), 3, 3]
        [filled] = ask(denoise.fill_gaps, student, [ids], 16, block_length=8, eos_ids={0},
                       vocab_size=tokenizer.vocab_size)  # fmt: skip
        assert text == tokenizer.decode(filled) and capsys.readouterr() == (f"{text}\n", "")
        assert text.startswith("<|user|>3+5") and "2?<|assistant|>3+5=" in text and word not in text
    text, code = on_a_terminal([*COMMAND[:3], "--prompt=3+░=8", *COMMAND[4:]], world)
    end = text.rpartition("\x1b[?1049l")[2]
    assert code == 0 and end.startswith("3+") and end.strip().endswith("(1 tokens, 1 forward passes)")


def test_on_a_gpu_float32_is_only_for_who_asks():
    assert pick_dtype("", torch.device("cpu")) == torch.float32
    assert pick_dtype("", torch.device("cuda")) == torch.bfloat16
    assert pick_dtype("float32", torch.device("cuda")) == torch.float32
    assert pick_dtype("bfloat16", torch.device("cpu")) == torch.bfloat16


AUTOREGRESSIVE = [sys.executable, str(ROOT / "sample.py"), f"--model={ROOT / 'students/toy-1'}", "--device=cpu"]


def answers_of_a_chat(folder, questions, n, **keys):
    """Every turn sees the questions and answers before it."""
    student, tokenizer = model.load(folder), tokenizer_file.load_tokenizer(Path(folder))
    turns, answers = [], []
    for question in questions:
        turns.append({"role": "user", "content": question})
        [ids] = ask(sample.sample, student, [tokenizer.encode_prompt(turns)], n, eos_ids={0},
                    vocab_size=tokenizer.vocab_size, **keys)  # fmt: skip
        answers.append(tokenizer.decode(ids))
        turns.append({"role": "assistant", "content": answers[-1]})
    return answers


def test_a_chat_on_a_terminal_streams_every_turn(tmp_path):
    questions = ["3+5*2-7+4?", "1+1-1+1-1?"]
    text, code = on_a_terminal([*AUTOREGRESSIVE, "--chat=true", "--max_new_tokens=30"], tmp_path, questions)
    first, second = answers_of_a_chat(ROOT / "students/toy-1", questions, 30)
    shown = re.sub(r"\x1b\[\?2004[hl]", "", text).replace("\r", "")  # readline's brackets around what is pasted
    assert code == 0 and "Traceback" not in text
    assert shown.startswith(f"> {questions[0]}\n{first}\n> {questions[1]}\n{second}\n> ")
    assert first.startswith("3+5=8; ") or "3+5=8; " in first


@pytest.mark.parametrize("name", ["llada", str(ROOT / "students/toy-1")])
def test_a_chat_through_a_pipe_is_an_answer_a_line(world, monkeypatch, capsys, name):
    """Questions are lines, empty ones are passed over, --prompt is the first; no arrow and no colour in the answers."""
    monkeypatch.chdir(world)
    monkeypatch.setattr("sys.stdin", io.StringIO("1+1-1+1-1?\n\n5*5+0+0+0?\n"))
    keys = {"block_length": 8} if name == "llada" else {}
    last = sample.main(model=name, prompt="3+5*2-7+4?", chat=True, max_new_tokens=16, device="cpu", **keys)
    expected = answers_of_a_chat(name, ["3+5*2-7+4?", "1+1-1+1-1?", "5*5+0+0+0?"], 16, **keys)
    assert capsys.readouterr() == ("".join(f"{answer}\n" for answer in expected), "")
    assert last == expected[-1]


def test_who_types_into_a_pipe_sees_the_arrow_elsewhere(tmp_path):
    """Standard input is a terminal, the answers go into a file: the "> " must not."""
    ours, theirs = pty.openpty()
    os.write(ours, b"3+5*2-7+4?\n\x04")
    words = [*AUTOREGRESSIVE, "--chat=true", "--max_new_tokens=8"]
    done = subprocess.run(words, cwd=tmp_path, stdin=theirs, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0 and done.stderr == "> > "
    assert done.stdout == answers_of_a_chat(ROOT / "students/toy-1", ["3+5*2-7+4?"], 8)[0] + "\n"


def test_ctrl_c_in_the_middle_of_an_answer_is_one_word(tmp_path):
    words = [*AUTOREGRESSIVE, "--prompt=3+5*2-7+4?", "--max_new_tokens=200", "--temperature=5", "--seed=1"]
    text, code = on_a_terminal([*words, "--top_k=0"], tmp_path, interrupt_after=" ")
    assert code == 130 and text.endswith("interrupted\n") and "Traceback" not in text


def test_a_reader_who_has_gone_away_hears_nothing(tmp_path):
    words = [*AUTOREGRESSIVE, "--prompt=3+5*2-7+4?", "--max_new_tokens=8"]
    with subprocess.Popen(words, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b"" and process.wait(timeout=100) == 141
