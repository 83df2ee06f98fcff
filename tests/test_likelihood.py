"""likelihood.py: autoregressive students against transformers' way, the bound against all orders, enumerated."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from test_diffusion import any_order_nll, make_set, make_student

import eval as evaluation
import likelihood
import model
from diffusion import lay_out
from plumbing.config import InputError, read_json

WORLD = dict(teacher=3, students=("llada", "llada2"))


def test_an_autoregressive_response_has_the_sum_of_its_log_probabilities():
    config = replace(make_student("full").config, model_type="llama", attention="causal")
    student = model.Transformer(config).init_weights(0, std=0.4).eval()
    train_set = make_set()
    found = likelihood.logprobs(student, train_set, [3, 0, 2], batch_size=2)
    for i, ours in zip([3, 0, 2], found, strict=True):
        start, prompt_end, end = train_set.spans[i]
        text = torch.from_numpy(train_set.tokens[start:end].astype(np.int64))
        with torch.no_grad():
            logp = student(text[None])[0].double().log_softmax(-1)
        expected = sum(float(logp[at - 1, text[at]]) for at in range(prompt_end - start, end - start))
        assert ours == pytest.approx([expected], rel=1e-5)
    assert likelihood.rows_of(train_set, [3], found[:1])[0]["interval"] == 0


CASES = [("full", (2, 3)), ("full", (3, 1)), ("block", (4, 4)), ("block", (3, 5))]


@pytest.mark.parametrize("attention, lengths", CASES)
def test_the_bound_is_the_mean_over_all_orders(attention, lengths):
    """Against every order of revealing the answer; a block model's answer is revealed block by block."""
    student = make_student(attention)
    train_set = make_set([lengths])
    found = likelihood.logprobs(student, train_set, [0], draws=400, seed=3)[0]
    clean = train_set.tokens.tolist()
    expected = 0.0
    if attention == "full":
        expected = any_order_nll(student, clean, range(lengths[0], sum(lengths)))
    else:
        clean += [student.config.pad_token_id] * (-len(clean) % 4)
        for start in range(0, len(clean), 4):
            answer = [at for at in range(start, start + 4) if at >= lengths[0]]
            if answer:
                expected += any_order_nll(student, clean[: start + 4], answer)
    error = found.std(ddof=1) / math.sqrt(len(found))
    assert abs(found.mean() + expected) < 4 * error + 1e-5
    [row] = likelihood.rows_of(train_set, [0], found[None])
    assert row["logprob"] == pytest.approx(found.mean()) and row["interval"] == pytest.approx(1.96 * error)
    assert row["tokens"] == lengths[1] and row["nats_per_token"] == pytest.approx(-found.mean() / lengths[1])


def test_numbers_of_masks_are_exact_and_stratified():
    """Of 12 answer tokens and 24 draws every number from 1 to 12 comes up twice; which tokens is even."""
    config, train_set = make_student("full").config, make_set([(6, 12)])
    rows = lay_out(config, train_set, [0], np.array([18]), "key")
    counts, hits = [], np.zeros(18)
    for offset in (0.0, 0.37 / 24, 0.99 / 24):
        counts = []
        for draw in range(24):
            level = np.full((1, 19), (offset + draw / 24) % 1)
            masked, factor = likelihood.mask_counts(rows, np.zeros(18, dtype=int), level)
            counts.append(int(masked.sum()))
            assert not masked[0, :6].any() and np.array_equal(factor, masked * 12 / counts[-1])
        assert sorted(counts) == sorted([*range(1, 13)] * 2)
    for key in range(600):
        rows = lay_out(config, train_set, [0], np.array([18]), f"key {key}")
        hits += likelihood.mask_counts(rows, np.zeros(18, dtype=int), np.full((1, 19), 0.2))[0][0]
    expected = 600 * 3 / 12
    assert ((hits[6:] - expected) ** 2 / (expected * 0.75)).sum() * 11 / 12 < 31.3  # chi-square, 11, p = 0.001


def test_draws_are_a_function_of_seed_and_example():
    student, train_set = make_student("block"), make_set()
    whole = likelihood.logprobs(student, train_set, [0, 1, 2, 3], draws=5, seed=1)
    assert whole.shape == (4, 5)
    alone = [likelihood.logprobs(student, train_set, [i], draws=5, seed=1)[0] for i in range(4)]
    assert np.allclose(whole, alone, atol=1e-4)
    assert not np.allclose(whole, likelihood.logprobs(student, train_set, [0, 1, 2, 3], draws=5, seed=2))


def test_the_command_prints_a_bound_with_its_interval_and_an_exact_value(here, capsys):
    keys = dict(data="data/toy-1/teacher", likelihood=True, draws=6, device="cpu")
    results = evaluation.main(model="llada,llada2,data/toy-1/untrained", **keys)
    printed = capsys.readouterr().out.splitlines()
    assert [line[: line.index("±")].split()[1][0] for line in printed[2:5]] == ["≤", "≤", "5"]
    assert printed[5].startswith("llada2 - llada: ") and printed[5].endswith("(paired, 3 problems)")
    for name, stem in (("llada", "llada"), ("untrained", "untrained")):
        summary, rows = results[name]
        path = Path(f"runs/{stem}/eval/teacher-likelihood.jsonl")
        assert [json.loads(line) for line in path.read_text().splitlines()] == rows and len(rows) == 3
        assert read_json(path.with_suffix(".json"))["is_bound"] == (name == "llada") == summary["is_bound"]
        assert all((row["interval"] > 0) == (name == "llada") for row in rows)
    with pytest.raises(InputError, match="--draws=1: must be at least 2"):
        evaluation.main(model="llada", **keys | dict(draws=1))
