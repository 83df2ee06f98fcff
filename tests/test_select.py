"""select.py: the rules against plain loops, both bottlenecks, and the name it shares with Python's own module."""

import glob
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import hand_made
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import data
import model
import train
from hf import families
from hf import tokenizer as tokenizer_file
from plumbing import runs, selection
from plumbing.config import InputError, load_select, read_json, write_json

select = load_select()
ROOT = Path(__file__).parent.parent
BUILT_IN = ("t3s", "inverse", "all", "random", "random_file", "static_high", "static_low")


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    made = hand_made.Run()
    capsys.readouterr()
    return made


def world(seed=0, n=60):
    """delta, start, spans of five examples with n tokens in all; deltas are rounded, so some are 0."""
    rng = np.random.default_rng(seed)
    delta, start = rng.normal(size=n).round(1), -rng.exponential(size=n)
    edges = np.r_[0, np.sort(rng.choice(np.arange(1, n), 4, replace=False)), n]
    return delta, start, np.stack([edges[:-1], edges[1:]], axis=1)


# -------------------------------------------------------------------------------------------------
# The bottleneck


def test_the_bottleneck_is_the_earliest_of_the_lowest():
    assert select.find_bottleneck({0: 0.7, 2: 0.6, 4: 0.3, 6: 0.3, 8: 0.5}) == 4
    assert select.find_bottleneck({8: 0.5, 0: 0.7, 6: 0.3, 4: 0.3}) == 4


def test_smoothing_averages_neighbours_but_never_with_step_0():
    values = [0.9, 0.2, 0.6, 0.1, 0.3, 0.2]
    curve = dict(zip(range(0, 12, 2), values, strict=True))
    expected = [0.9, 0.4, 0.3, 1 / 3, 0.2, 0.25]  # by hand: (0.2 + 0.6) / 2, (0.2 + 0.6 + 0.1) / 3, ...
    assert selection.smoothed(values, 1) == pytest.approx(expected)
    assert selection.smoothed(values, 0).tolist() == values
    assert select.find_bottleneck(curve) == 6 and select.find_bottleneck(curve, smooth=1) == 8


def test_the_label_free_bottleneck_is_where_the_fallers_turn():
    curve = {0: 0.0, 2: -0.1, 4: -0.4, 6: -0.4, 8: -0.3}
    assert select.find_label_free_bottleneck(curve) == 4


def test_the_label_free_curve_against_a_plain_loop(run):
    out = select.main(run="sft", bottleneck="label_free", show=0)
    stats, response = read_json(out / "stats.json"), np.flatnonzero(run.response)
    start = run.logprob(0)
    for step in (0, 2, 4):
        total = sum(min(0.0, float(run.logprob(step)[t]) - float(start[t])) for t in response)
        assert stats["label_free"][str(step)] == pytest.approx(total / len(response), abs=1e-12)
    assert stats["label_free_bottleneck"] == stats["bottleneck_step"] == 2
    assert read_json(out / "config.json")["bottleneck"] == "label_free"
    assert stats["accuracy_bottleneck"] == 2 and sum(stats["label_free_bootstrap"].values()) == 1


def test_the_bootstrap_is_certain_only_of_what_is_clear():
    rng = np.random.default_rng(0)
    clear = {0: np.ones(50), 2: np.zeros(50), 4: np.ones(50)}
    assert select.bootstrap_bottleneck(clear) == {2: 1.0}
    close = {0: np.ones(50), 2: (rng.random(50) < 0.5) * 1.0, 4: (rng.random(50) < 0.5) * 1.0}
    share = select.bootstrap_bottleneck(close)
    assert sum(share.values()) == pytest.approx(1) and 0.01 < share[2] < 0.99
    same = {0: np.ones(5), 2: np.zeros(5), 4: np.zeros(5)}
    assert select.bootstrap_bottleneck(same) == {2: 1.0}  # ties go to the earliest


def test_the_bootstrap_resamples_examples_with_their_tokens():
    """One long example falls at step 4, twenty short ones at step 2: tokens count, not examples."""
    sizes = np.array([1000] + [1] * 20)
    parts = {0: np.zeros(21), 2: -np.array([0.0] + [1.0] * 20), 4: -np.array([100.0] + [0.0] * 20)}
    share = select.bootstrap_bottleneck(parts, sizes)
    missed = (20 / 21) ** 21  # the share of resamplings without the long example
    assert share[4] == pytest.approx(1 - missed, abs=0.05) and share[2] == pytest.approx(missed, abs=0.05)


# -------------------------------------------------------------------------------------------------
# The rules


@pytest.mark.parametrize("tau", [0.0, 0.3])
def test_rules_against_plain_loops(tau):
    delta, start, spans = world()
    n = len(delta)
    keep = {rule: select.choose(rule, "keep", delta, start, spans, tau) for rule in BUILT_IN}
    force = {rule: select.choose(rule, "force", delta, start, spans, tau) for rule in BUILT_IN}
    for mask in (*keep.values(), *force.values()):
        assert mask.dtype == bool and mask.shape == (n,)
    assert keep["t3s"].tolist() == [not d > tau for d in delta]  # a token that did not move stays
    assert force["t3s"].tolist() == [d < -tau for d in delta]
    assert keep["inverse"].tolist() == force["inverse"].tolist() == [d > tau for d in delta]
    assert keep["all"].all() and force["all"].all()
    dropped, forced = n - keep["t3s"].sum(), force["t3s"].sum()
    by_start = sorted(range(n), key=lambda t: start[t])
    assert set(np.flatnonzero(~keep["static_low"])) == set(by_start[:dropped])
    assert set(np.flatnonzero(~keep["static_high"])) == set(by_start[n - dropped :])
    assert set(np.flatnonzero(force["static_low"])) == set(by_start[:forced])
    assert set(np.flatnonzero(force["static_high"])) == set(by_start[n - forced :])
    assert keep["random_file"].sum() == keep["t3s"].sum()
    assert force["random_file"].sum() == forced
    for a, b in spans:  # the control has t3s's budget in every single example
        assert keep["random"][a:b].sum() == keep["t3s"][a:b].sum()
        assert force["random"][a:b].sum() == force["t3s"][a:b].sum()


def test_random_rules_are_functions_of_the_seed():
    delta, start, spans = world(n=200)
    for rule in ("random", "random_file"):
        masks = [select.choose(rule, "keep", delta, start, spans, seed=seed).tolist() for seed in (1, 1, 2)]
        assert masks[0] == masks[1] != masks[2]
        assert masks[0] != select.choose("t3s", "keep", delta, start, spans).tolist()


def test_a_rule_of_your_own_is_a_function_and_its_line(run, monkeypatch):
    def ends(moved, start, spans, rng):
        """As many tokens as T3S takes in each example, the last ones."""
        chosen = np.zeros_like(moved)
        for a, b in spans:
            chosen[b - moved[a:b].sum() : b] = True
        return chosen

    monkeypatch.setitem(select.RULES, "ends", ends)
    out = select.main(run="sft", rule="ends", show=0)
    mask = np.load(out / "mask.npy")
    for start, prompt_end, end in run.train_set.spans:
        kept = mask[prompt_end:end].tolist()
        assert kept == sorted(kept, reverse=True) and not mask[start:prompt_end].any()


def test_a_rule_may_give_weights_of_any_float_type(run, monkeypatch, capsys):
    monkeypatch.setitem(select.RULES, "half", lambda moved, *_: np.where(moved, 0.5, 1))  # float64
    out = select.main(run="sft", rule="half", show=0)
    share = np.mean(run.logprob(2)[run.response] > run.logprob(0)[run.response])
    assert f"with weights from 0.50 to 1.00, {1 - share / 2:.2f} on average" in capsys.readouterr().out
    weights = runs.load_mask(out, run.train_set)
    rose = run.logprob(2) > run.logprob(0)
    assert weights.dtype == np.float32
    assert weights.tolist() == np.where(run.response, np.where(rose, 0.5, 1), 0).tolist()
    with pytest.raises(InputError, match="--rule=half: gives weights, which only --kind=keep can use"):
        select.main(run="sft", rule="half", kind="force", name="forced")


@pytest.mark.parametrize("kind", ["keep", "force"])
@pytest.mark.parametrize("tau", [0.0, 0.3])
def test_ranked_controls_against_python_s_sort(kind, tau):
    """In float64 and by hand: who comes first when the tokens are sorted by what the rule names."""
    delta, start, spans = world(seed=4)
    delta += np.random.default_rng(5).normal(scale=1e-3, size=len(delta))  # no ties: sort decides
    entropy = np.random.default_rng(6).exponential(size=len(delta))
    budget = sum(d > tau for d in delta) if kind == "keep" else sum(d < -tau for d in delta)
    gain = {"keep": 1, "force": -1}[kind]
    score = {
        "retrospective": lambda t: -gain * delta[t],
        "loss_high": lambda t: -(start[t] + delta[t]),
        "loss_low": lambda t: start[t] + delta[t],
        "entropy_high": lambda t: entropy[t],
        "entropy_low": lambda t: -entropy[t],
    }
    for rule, key in score.items():
        mask = select.choose(rule, kind, delta, start, spans, tau, entropy=entropy)
        taken = np.flatnonzero(~mask if kind == "keep" else mask).tolist()
        assert taken == sorted(sorted(range(len(delta)), key=key)[-budget:]), rule


def test_retrospective_and_t3s_take_from_opposite_ends():
    delta, start, spans = world(seed=7, n=100)
    for kind in ("keep", "force"):
        other = select.choose("retrospective", kind, delta, start, spans, 1.0)
        t3s = select.choose("t3s", kind, delta, start, spans, 1.0)
        assert other.sum() == t3s.sum()
        gone, paper = (~other, ~t3s) if kind == "keep" else (other, t3s)
        assert not (gone & paper).any()


def test_matched_random_takes_the_same_words_elsewhere():
    delta, start, spans = world(seed=8, n=500)
    ids = np.random.default_rng(9).integers(0, 12, size=500)
    delta[ids == 3] = 1.0  # a word that always rises can only be taken where it is
    for kind in ("keep", "force"):
        mask = select.choose("matched_random", kind, delta, start, spans, seed=1, ids=ids)
        t3s = select.choose("t3s", kind, delta, start, spans)
        for token in range(12):
            assert mask[ids == token].sum() == t3s[ids == token].sum()
        assert (mask[ids == 3] == t3s[ids == 3]).all()
        assert 0.2 < (mask != t3s).mean() < 0.6
        again = select.choose("matched_random", kind, delta, start, spans, seed=1, ids=ids)
        other = select.choose("matched_random", kind, delta, start, spans, seed=2, ids=ids)
        assert (again == mask).all() and (other != mask).any()


@pytest.mark.parametrize("kind", ["keep", "force"])
def test_kinds_takes_what_moved_with_its_kind(kind):
    delta, start, spans = world(seed=11, n=300)
    ids = np.random.default_rng(12).integers(0, 20, size=300)
    gain = delta if kind == "keep" else -delta
    taken = []
    for t in range(300):
        same = [gain[u] for u in range(300) if ids[u] == ids[t]]
        taken.append(gain[t] > 0.3 and sum(same) / len(same) > sum(gain) / 300)
    masks = {
        rule: select.choose(rule, kind, delta, start, spans, 0.3, ids=ids) == (kind == "force")
        for rule in ("kinds", "kinds_random", "kinds_low")
    }
    assert masks["kinds"].tolist() == taken and 0 < sum(taken) < (gain > 0.3).sum()
    for a, b in spans:
        assert masks["kinds_random"][a:b].sum() == sum(taken[a:b])
    lowest = sorted(range(300), key=lambda t: start[t])[: sum(taken)]
    assert set(np.flatnonzero(masks["kinds_low"])) == set(lowest)


def test_kinds_keeps_what_the_teacher_knows():
    """A word is news wherever it stands; one digit in four is, and rises as far."""
    ids = np.repeat([1, 2], 40)  # the word, the digit
    delta = np.where(ids == 1, 2.0, np.where(np.arange(80) % 4, 0.0, 2.0)) + 1e-3
    keep = select.choose("kinds", "keep", delta, np.full(80, -3.0), [(0, 80)], ids=ids)
    assert keep.tolist() == (ids == 2).tolist()
    assert not select.choose("t3s", "keep", delta, np.full(80, -3.0), [(0, 80)]).any()


def test_dft_weights_are_the_probabilities_at_step_0(run):
    weights = np.load(select.main(run="sft", rule="dft", show=0) / "mask.npy")
    expected = [math.exp(c) if r else 0.0 for c, r in zip(run.logprob(0), run.response, strict=True)]
    assert weights.dtype == np.float32 and weights.tolist() == pytest.approx(expected, rel=1e-6)


def test_entropy_comes_from_the_bottleneck_s_file(run):
    for step in (0, 2, 4):
        run.write(step, run.logprob(step), np.array(hand_made.CORRECT[step], float),
                  entropy=np.where(run.response, np.arange(len(run.response)) * (step - 1.0), np.nan))  # fmt: skip
    mask = np.load(select.main(run="sft", rule="entropy_high", show=0) / "mask.npy")
    kept = mask[run.response].tolist()
    assert kept == sorted(kept, reverse=True) and 0 < sum(kept) < len(kept)  # step 2: the last are highest


@pytest.mark.parametrize("kind", ["keep", "force"])
def test_tau_of_a_share_comes_as_near_as_the_tokens_allow(kind):
    delta = np.random.default_rng(3).normal(size=1000)
    for share in (0.001, 0.05, 0.3):
        tau = select.tau_of_share(delta, share, kind)
        assert ((delta > tau) if kind == "keep" else (delta < -tau)).mean() == share
    for share in (0.9, -0.1):
        with pytest.raises(InputError, match=f"--share={share}: must be above 0 and at most 0"):
            select.tau_of_share(delta, share, kind)


def test_the_tau_sweep_counts_both_groups():
    sweep = selection.tau_sweep(np.array([0.0, 0.3, -0.3, 1.5]))
    assert sweep[0] == {"tau": 0.0, "anchors": 0.5, "yet_to_learn": 0.25}
    assert {"tau": 0.3, "anchors": 0.25, "yet_to_learn": 0.0} in sweep


# -------------------------------------------------------------------------------------------------
# The command, on a run whose trajectory is written by hand


def test_main_writes_mask_and_statistics(run, capsys):
    out = select.main(run="sft")
    assert out == Path("runs/sft/selection/t3s")
    start, low, train_set = run.logprob(0), run.logprob(2), run.train_set
    mask = np.load(out / "mask.npy")
    assert mask.dtype == bool
    assert mask.tolist() == [bool(r and not b > a) for r, a, b in zip(run.response, start, low, strict=True)]
    stats, chosen = read_json(out / "stats.json"), read_json(out / "config.json")
    assert stats["bottleneck_step"] == chosen["bottleneck_step"] == 2
    assert stats["selected"] == mask.sum() and stats["response_tokens"] == run.response.sum()
    assert stats["share"] == mask.sum() / run.response.sum()
    assert stats["anchors"] + stats["yet_to_learn"] == pytest.approx(1)
    tokenizer = tokenizer_file.load_tokenizer(run.tokenizer_folder)
    ids = train_set.tokens[run.response].tolist()
    top = stats["anchor_tokens"][0]
    assert top["seen"] == ids.count(top["id"]) and top["token"] == tokenizer.decode([top["id"]])
    assert chosen["sha256"] == train_set.sha256 and chosen["kind"] == "keep" and chosen["tau"] == 0.0
    assert np.array_equal(runs.load_mask(out, train_set), mask)
    text = capsys.readouterr().out
    assert "bottleneck: step 2, by accuracy" in text and f"{stats['share']:.1%} stay in the loss" in text
    shown = text.split("example 0:\n")[1].split("\n")[0]  # not a terminal: brackets around what is dropped
    assert shown.replace("⟦", "").replace("⟧", "") == tokenizer.decode(train_set.response(0))
    assert "\x1b" not in text


def test_stats_are_json_a_stranger_can_read(run):
    out = select.main(run="sft", show=0)
    stats = json.loads((out / "stats.json").read_text())
    assert stats["accuracy"] == {"0": pytest.approx(4 / 6), "2": pytest.approx(1 / 6), "4": pytest.approx(2 / 6)}
    assert stats["bottleneck_bootstrap"] and stats["tau_sweep"][0]["tau"] == 0.0


def test_share_and_kind_and_bottleneck_keys(run):
    n = run.response.sum()
    out = select.main(run="sft", share=0.1, name="tenth", show=0)
    assert (~np.load(out / "mask.npy"))[run.response].sum() == round(0.1 * n) and out.name == "tenth"
    out = select.main(run="sft", kind="force", share=0.1, show=0)
    assert np.load(out / "mask.npy").sum() == round(0.1 * n)
    for bottleneck in (4, "4"):
        out = select.main(run="sft", bottleneck=bottleneck, show=0)
        assert read_json(out / "config.json")["bottleneck_step"] == 4


def test_without_answers_only_the_label_free_curve_is_left(run, capsys):
    for step in (0, 2, 4):
        run.write(step, run.logprob(step), np.full(6, np.nan))
    out = select.main(run="sft", bottleneck="label_free", show=0)
    stats = read_json(out / "stats.json")
    assert stats["accuracy"] == {"0": None, "2": None, "4": None} and stats["bottleneck_bootstrap"] is None
    assert stats["accuracy_bottleneck"] is None and stats["label_free_bottleneck"] == 2
    assert "NaN" not in (out / "stats.json").read_text()
    text = capsys.readouterr().out
    assert "no accuracy was recorded" in text and "nan" not in text
    assert "bottleneck: step 2, by label_free (by accuracy: none, by label_free: step 2)" in text
    named = select.main(run="sft", bottleneck=2, name="named", show=0)
    assert np.array_equal(np.load(named / "mask.npy"), np.load(out / "mask.npy"))
    assert "bottleneck: step 2, as asked for" in capsys.readouterr().out


def other_student(run, change=None):
    """A folder of other weights whose tokenizer has one more token, and the data made with it."""
    folder = Path("other")
    shutil.copytree(run.tokenizer_folder.resolve(), folder)
    tokenizer = read_json(folder / "tokenizer.json")
    used = [token["id"] for token in tokenizer["added_tokens"]] + list(tokenizer["model"]["vocab"].values())
    extra = {**tokenizer["added_tokens"][-1], "content": "<extra>", "id": max(used) + 1}
    tokenizer["added_tokens"].append(extra)
    config = read_json(folder / "config.json")
    config["vocab_size"] = max(config["vocab_size"], extra["id"] + 1)
    write_json(folder / "tokenizer.json", tokenizer)
    write_json(folder / "config.json", config)
    network = model.Transformer(families.read_config(folder)).init_weights(7)
    model.save(network, folder, "student")
    lines = Path("data/toy-1/teacher.jsonl").read_text().splitlines()
    if change:
        lines[2] = change(lines[2])
    Path("lines.jsonl").write_text("\n".join(lines))
    data.main(source="lines.jsonl", tokenizer="student", out="data/for-student", verifier="toy")


def test_a_selection_is_transferred_to_another_model_with_the_same_tokens(run, capsys):
    other_student(run)
    out = select.main(run="sft", student="student", data="data/for-student", show=0)
    assert out == Path("runs/sft/selection/t3s-for-student")
    own = select.main(run="sft", show=0)
    assert np.array_equal(np.load(out / "mask.npy"), np.load(own / "mask.npy"))
    trained = data.load("data/for-student")
    assert trained.meta["tokenizer_hash"] != run.train_set.meta["tokenizer_hash"]
    assert runs.load_mask(out, trained).any()
    capsys.readouterr()
    train_keys = dict(steps=1, batch_size=2, lr=1e-3, device="cpu")
    write_json("runs/sft/config.json", {"config": read_json("runs/sft/config.json")["config"] | train_keys})
    train.main(run="t3s", selection=str(out))
    assert "selector transfer: tokens chosen by data/toy-1/untrained, student student" in capsys.readouterr().out
    keys = read_json("runs/t3s/config.json")["config"]
    assert (keys["model"], keys["data"], keys["batch_size"]) == ("student", "data/for-student", 2)


def test_other_tokens_refuse_the_transfer(run):
    other_student(run, change=lambda line: line.replace('"response": "', '"response": "1'))
    name = run.train_set.examples[2]["id"]
    with pytest.raises(InputError, match=f"the response of example {name} has other tokens than in data/toy-1/teacher"):
        select.main(run="sft", student="student", data="data/for-student")
    with pytest.raises(InputError, match="--student=student: has another tokenizer than data/toy-1/teacher; make its"):
        select.main(run="sft", student="student")
    with pytest.raises(InputError, match="data/toy-1/unseen: has 2 examples, and data/toy-1/teacher 6"):
        select.main(run="sft", data="data/toy-1/unseen")
    assert not Path("runs/sft/selection").exists()


def test_problems_that_were_not_asked_have_no_part_in_the_bootstrap(run):
    """train.py --record_problems: `correct` is nan for the others, accuracy is that of the asked."""
    before = read_json(select.main(run="sft", show=0) / "stats.json")["bottleneck_bootstrap"]
    for step, correct in hand_made.CORRECT.items():
        some = np.array([*correct[:5], np.nan])
        run.write(step, run.logprob(step), some, accuracy=np.nanmean(some))
    stats = read_json(select.main(run="sft", show=0) / "stats.json")
    assert stats["accuracy"]["0"] == 0.8 and stats["bottleneck_step"] == 2
    asked = {step: np.array(correct[:5], float) for step, correct in hand_made.CORRECT.items()}
    expected = {str(step): share for step, share in select.bootstrap_bottleneck(asked).items()}
    assert stats["bottleneck_bootstrap"] == expected != before


def test_rrt_is_the_sum_of_three_models(run):
    folders = {}
    base = str(run.tokenizer_folder.resolve())
    names = ("base", "runs/sft/checkpoints/000002", "runs/sft/checkpoints/000004")
    for seed, name in enumerate(names, 1):
        network = model.load(base).init_weights(seed)
        # the base is a bfloat16 checkpoint in two shards: the sum is float32 all the same
        if seed == 1:
            network = network.to(torch.bfloat16)
        model.save(network, base, name, max_shard_bytes=100_000 if seed == 1 else 10**9)
        folders[seed] = model.load(name).state_dict()
    write_json("runs/sft/config.json", {"config": {"model": "base", "data": "data/toy-1/teacher"}})
    out = select.main(run="sft", rule="rrt")
    assert out == Path("runs/sft/selection/rrt") and read_json(out / "config.json")["model_type"] == "qwen3"
    made = load_file(out / "model.safetensors")
    assert len(made) == len(folders[1])
    for name, tensor in made.items():
        assert tensor.dtype == torch.float32
        exact = folders[1][name].double() + folders[3][name].double() - folders[2][name].double()
        assert (tensor.double() - exact).abs().max() < 1e-7
    assert tokenizer_file.load_tokenizer(out).hash == run.train_set.meta["tokenizer_hash"]
    with pytest.raises(InputError, match="rrt: a model folder, not a selection; go on from it with --model=runs/sft"):
        runs.load_mask(out, run.train_set)


def test_shades_by_delta_on_a_terminal_only(run, monkeypatch):
    tokenizer = tokenizer_file.load_tokenizer(run.tokenizer_folder)
    ids, picked = tokenizer.encode("1+2=3"), np.array([True, True, False, False, True])
    delta = np.array([0.0, 0.0, 3.0, 3.0, -0.1])
    assert selection.paint(tokenizer, ids, picked, delta) == "1+⟦2=⟧3"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.delenv("NO_COLOR", raising=False)
    rose, fell = "9;38;5;16;48;5;39", "38;5;16;48;5;223"
    assert selection.paint(tokenizer, ids, picked, delta) == f"1+\x1b[{rose}m2=\x1b[0m\x1b[{fell}m3\x1b[0m"
    forced = selection.paint(tokenizer, ids, ~picked, delta, "force")
    assert forced == f"1+\x1b[38;5;16;1;4;48;5;39m2=\x1b[0m\x1b[{fell}m3\x1b[0m"
    monkeypatch.setenv("NO_COLOR", "1")
    assert selection.paint(tokenizer, ids, picked, delta) == "1+⟦2=⟧3"


def test_a_character_cut_over_tokens_stays_whole_whatever_its_parts_look_like(run):
    tokenizer = tokenizer_file.load_tokenizer(run.tokenizer_folder)
    ids = tokenizer.encode("1é2")
    assert len(ids) == 4
    texts = selection.token_texts(tokenizer, ids)
    assert texts == ["1", "", "é", "2"] and selection.token_texts(tokenizer, ids[:2]) == ["1", "\ufffd"]
    picked = np.array([True, True, False, True])
    assert selection.paint(tokenizer, ids, picked, np.zeros(4)) == "1⟦é⟧2"


# -------------------------------------------------------------------------------------------------
# The name: Python's own `select` must be what an importer gets, on both kinds of interpreter


def interpreter(builtin):
    """A Python that has its own select built in, or one that loads it from a file; None if this machine has none."""
    pyenv = glob.glob(os.path.expanduser("~/.pyenv/versions/*/bin/python"))
    for path in (sys.executable, "/usr/bin/python3", *sorted(pyenv)):
        if os.access(path, os.X_OK):
            program = "import sys; print('select' in sys.builtin_module_names, *sys.version_info[:2])"
            found = subprocess.run([path, "-c", program], capture_output=True, text=True, cwd="/").stdout.split()
            if found[:1] == [str(builtin)]:
                return path, tuple(map(int, found[1:]))
    return None


def python(path, *words, packages):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(packages), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([path, *words], capture_output=True, text=True, cwd=ROOT, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


SPAWN = """
import multiprocessing, torch, subprocess, asyncio
from plumbing import config

def child(queue):
    import select
    queue.put(hasattr(select, "poll") and not hasattr(select, "find_bottleneck"))

if __name__ == "__main__":
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=child, args=(queue,))
    process.start()
    assert queue.get(timeout=100)
    process.join()
    import select
    assert hasattr(select, "poll")
    assert hasattr(config.load_select(), "find_bottleneck") and config.load_select() is not select
    print("fine")
"""


@pytest.mark.parametrize("builtin", [False, True])
def test_every_importer_gets_the_select_it_means(builtin, tmp_path):
    found = interpreter(builtin)
    if found is None:
        pytest.skip(f"no interpreter here whose own select is {'built in' if builtin else 'a file'}")
    path, version = found
    standard = "import select, subprocess, selectors, asyncio; select.poll; print(subprocess.__name__)"
    assert python(path, "-c", standard, packages=[]) == "subprocess\n"
    if path != sys.executable and version != sys.version_info[:2]:
        pytest.skip(f"{path} is Python {version}: the packages of this one cannot be tried with it")
    packages = [p for p in sys.path if p.endswith("site-packages")]
    assert "torch" in python(path, "-c", "import torch, select; select.poll; print(torch.__name__)", packages=packages)
    script = tmp_path / "spawn.py"
    script.write_text(SPAWN)
    assert python(path, str(script), packages=[str(ROOT), *packages]) == "fine\n"
    assert "--bottleneck=" in python(path, "select.py", "--help", packages=packages)
    assert "pytest" in python(path, "-m", "pytest", "--version", packages=packages)
    torchrun = ["-m", "torch.distributed.run", "--nproc_per_node=2", "train.py", "--help"]
    assert python(path, *torchrun, packages=packages).count("--micro_batch_size=8") == 2


def test_our_code_never_imports_it_by_name():
    for path in ROOT.glob("*.py"):
        words = [line.split() for line in path.read_text(encoding="utf-8").splitlines()]
        assert not any(w[:2] in (["import", "select"], ["from", "select"]) for w in words), path
