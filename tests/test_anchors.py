"""Diffusion students trained on a selection that keeps, or on one that keeps and one that forces, by train.py."""

import json
from pathlib import Path

import numpy as np
import pytest
import worlds

import batches
import data
import train
from hf import families
from plumbing.config import InputError, load_select

SHORT = worlds.KEYS | dict(steps=4, record_every=2, save_every=0, resume_every=0, eval_data="")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A world with an autoregressive run that was recorded, and its selections: keep, random keep, force."""
    folder = worlds.make_world(tmp_path_factory.mktemp("world"), teacher=6, students=("llada", "llada2"))
    with worlds.inside(folder):
        train.main(run="sft", **SHORT)
        choose = load_select().main
        for name, keys in {
            "keep": dict(kind="keep", rule="t3s", share=0.4),
            "random": dict(kind="keep", rule="random", share=0.4),
            "all": dict(kind="keep", rule="all"),
            "force": dict(kind="force", rule="t3s"),
        }.items():
            choose(run="sft", name=name, bottleneck=4, show=0, **keys)
        # hardly a token fell in four steps: force half of those that are kept
        half = mask_of("keep") & (np.random.default_rng(0).random(len(mask_of("keep"))) < 0.5)
        np.save("runs/sft/selection/force/mask.npy", half)
    return folder


def selection(*names):
    return ",".join(f"runs/sft/selection/{name}" for name in names)


def mask_of(name):
    return np.load(f"runs/sft/selection/{name}/mask.npy")


def losses(run):
    lines = [json.loads(line) for line in Path(f"runs/{run}/log.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


@pytest.fixture
def fresh(here):
    """Runs of the test's own, beside those of the world."""
    (here / "runs").unlink()
    (here / "runs").mkdir()
    (here / "runs/sft").symlink_to((here / "data").resolve().parent / "runs/sft")
    return here


@pytest.fixture
def seen(monkeypatch):
    """Every micro-batch that is trained on."""
    found, make = [], batches.micro_batches

    def spy(run, step):
        made = make(run, step)
        found.extend(made)
        return made

    monkeypatch.setattr(train, "micro_batches", spy)
    return found


def by_token(found, name):
    """Of every response token of every batch: was it masked, was it scored -> a list of the chosen, one of the rest."""
    spans, chosen = data.load("data/toy-1/teacher").spans, mask_of(name)
    mask_id = families.read_config("llada").mask_token_id
    table = {True: [], False: []}
    for batch in found:
        rows = zip(batch["ids"].numpy(), batch["targets"].numpy(), batch["examples"], strict=True)
        for ids, targets, example in rows:
            start, prompt_end, end = spans[example]
            for at in range(prompt_end, end):
                fate = (bool(ids[at - start] == mask_id), bool(targets[at - start] != -100))
                table[bool(chosen[at])].append(fate)
    return table[True], table[False]


@pytest.mark.parametrize("student", ["llada", "llada2"])
def test_keeping_all_is_training_without_a_selection(fresh, student):
    keys = SHORT | dict(model=student, record_every=0)
    train.main(run="plain", **keys)
    for anchors in ("visible", "unscored"):
        train.main(run=anchors, selection=selection("all"), anchors=anchors, **keys)
        assert losses(anchors) == losses("plain")
        last = [Path(f"runs/{run}/checkpoints/000004/model.safetensors").read_bytes() for run in ("plain", anchors)]
        assert last[0] == last[1]


def test_anchors_leave_the_loss_visible_or_unscored(fresh, seen, capsys):
    keys = dict(model="llada", steps=3, batch_size=4, lr=1e-3, device="cpu")
    for name in ("keep", "random"):
        for anchors in ("visible", "unscored"):
            seen.clear()
            train.main(run=f"{name}-{anchors}", selection=selection(name), anchors=anchors, **keys)
            kept, others = by_token(seen, name)
            assert f"stay in the loss, the others are {anchors}" in capsys.readouterr().out
            assert not any(scored for _, scored in others) and len(others) > 20
            assert any(masked for masked, _ in others) == (anchors == "unscored")
            assert all(masked == scored for masked, scored in kept) and any(masked for masked, _ in kept)
    chosen = {name: [int((mask_of(name)[a:b]).sum()) for _, a, b in data.load("data/toy-1/teacher").spans]
              for name in ("keep", "random")}  # fmt: skip
    assert chosen["keep"] == chosen["random"]  # the control's budget is that of each example


def test_what_rose_is_visible_while_what_fell_is_forced(fresh, seen, capsys):
    train.main(run="both", model="llada", selection=selection("keep", "force"), steps=3, batch_size=4, device="cpu")
    printed = capsys.readouterr().out
    assert "stay in the loss, the others are visible" in printed and "are always masked" in printed
    _, anchors = by_token(seen, "keep")
    forced, _ = by_token(seen, "force")
    assert not any(masked for masked, _ in anchors)
    assert all(masked and scored for masked, scored in forced) and len(forced) > 20
    with pytest.raises(InputError, match="the selection's mask"):  # a resumed run sees that one of the two is gone
        train.main(run="both", resume=True, selection=selection("keep"))


@pytest.mark.parametrize("keys, message", [
    (dict(model="llada", selection="keep,all"), "two of kind keep; a student takes one of each kind"),
    (dict(model="llada", selection="force", anchors="unscored"), "--anchors=unscored has no effect without"),
    (dict(model="llada", selection="keep", forced_odds=2.0), "--forced_odds=2.0 has no effect without"),
    (dict(model="data/toy-1/untrained", complementary=True), "--complementary=True is about masked-diffusion"),
    (dict(model="data/toy-1/untrained", forced_below=0.5), "--forced_below=0.5 is about masked-diffusion"),
    (dict(model="data/toy-1/untrained", selection="keep,force"), "a force selection is for a diffusion student"),
])  # fmt: skip
def test_selections_and_keys_without_effect_are_refused(fresh, keys, message):
    keys = dict(keys)
    if "selection" in keys:
        keys["selection"] = selection(*keys["selection"].split(","))
    else:
        keys["data"] = "data/toy-1/teacher"
    with pytest.raises(InputError, match=message):
        train.main(run="bad", **keys)
    assert not Path("runs/bad").exists()
