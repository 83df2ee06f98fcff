"""select.py says in one line what cannot work, and then writes nothing."""

import sys
from pathlib import Path

import hand_made
import numpy as np
import pytest
import test_select
from worlds import make_world

import data
from plumbing import runs
from plumbing.config import InputError, load_select, read_json, write_json

select = load_select()
run = test_select.run


@pytest.mark.parametrize("accuracy, message", [
    ({2: 0.6, 4: 0.3}, "step 0 was not recorded"),
    ({0: 0.3, 2: 0.3, 4: 0.5}, "train accuracy never fell below the 0.300 of step 0"),
    ({0: 0.3}, "never fell"),
])  # fmt: skip
def test_no_bottleneck_is_said_in_one_line(accuracy, message):
    with pytest.raises(InputError, match=message) as error:
        select.find_bottleneck(accuracy)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("curve, message", [
    ({0: 0.0, 2: -0.1, 4: -0.4}, "still falling at step 4, the last one recorded: no bottleneck"),
    ({0: 0.0, 2: 0.0, 4: 0.0}, "confidence never fell below the 0.000 of step 0"),
])  # fmt: skip
def test_a_label_free_curve_that_never_turns_has_no_bottleneck(curve, message):
    with pytest.raises(InputError, match=message):
        select.find_label_free_bottleneck(curve)


def test_a_curve_that_was_not_asked_for_may_have_no_bottleneck(run, capsys):
    run.write(4, run.logprob(4) - 5, np.array(hand_made.CORRECT[4], float))
    out = select.main(run="sft", show=0)
    stats = read_json(out / "stats.json")
    assert stats["accuracy_bottleneck"] == 2 and stats["label_free_bottleneck"] is None
    assert "bottleneck: step 2, by accuracy (by accuracy: step 2, by label_free: none)" in capsys.readouterr().out
    with pytest.raises(InputError, match="still falling at step 4"):
        select.main(run="sft", bottleneck="label_free")


def test_an_unknown_rule_is_refused_with_all_the_names():
    with pytest.raises(InputError, match="--rule=best: must be t3s, .*inverse, all, rrt"):
        select.choose("best", "keep", *test_select.world())


@pytest.mark.parametrize("rule", [lambda moved, *_: moved.astype(int), lambda moved, *_: moved[1:]])
def test_a_rule_that_returns_something_else_is_named_and_writes_nothing(run, monkeypatch, rule):
    monkeypatch.setitem(select.RULES, "odd", rule)
    with pytest.raises(InputError, match="--rule=odd: must return bool or floats, one per response token"):
        select.main(run="sft", rule="odd")
    assert not Path("runs/sft/selection").exists()


@pytest.mark.parametrize("keys, message", [
    (dict(), "--run is missing"),
    (dict(run="none", rule="best"), "--rule=best: must be t3s or random or"),
    (dict(run="other"), "config.json: no such file"),
    (dict(run="sft", kind="drop"), "--kind=drop: must be keep or force"),
    (dict(run="sft", tau=-1.0), "--tau=-1.0: must be at least 0"),
    (dict(run="sft", smooth=-1), "--smooth=-1: must be at least 0"),
    (dict(run="sft", bottleneck=3), "--bottleneck=3: recorded were 0, 2, 4"),
    (dict(run="sft", bottleneck="lowest"), "--bottleneck=lowest: recorded were 0, 2, 4; or use accuracy or label_free"),
    (dict(run="sft", kind="force", tau=99.0), "selects no token at all; nothing written"),
    (dict(run="sft", rule="rrt"), "000002: this checkpoint was not kept"),
    (dict(run="../sft"), "--run=../sft: must be the name of a folder in runs/"),
    *((dict(run="sft", name=name), f"--name={name}: must be a plain name")
      for name in (".", "..", "../x", "a/b", "/x")),
    (dict(run="sft", rule="random", seed=-1), "--seed=-1: must be at least 0"),
    (dict(run="sft", rule="entropy_high"), "--rule=entropy_high: needs entropy, which this trajectory does not hold"),
    (dict(run="sft", rule="dft", kind="force"), "--rule=dft: gives weights, which only --kind=keep can use"),
    (dict(run="sft", export="tokens"), "--export=tokens: must be labels"),
    (dict(run="sft", export="labels", export_format="csv"), "--export_format=csv: must be jsonl or parquet"),
    (dict(run="sft", export="labels", kind="force"), "only a --kind=keep selection can be said in labels"),
])  # fmt: skip
def test_keys_that_cannot_work_write_nothing(run, keys, message):
    with pytest.raises(InputError, match=message):
        select.main(**keys)
    assert not Path("runs/sft/selection").exists()


def test_trajectories_that_are_damaged_or_mixed_are_refused(run):
    step4 = Path("runs/sft/trajectory/000004.npz")
    whole = step4.read_bytes()
    step4.write_bytes(whole[:100])
    with pytest.raises(InputError, match="000004.npz: not a complete trajectory file"):
        select.main(run="sft")
    nothing = np.full(len(run.response), np.nan)
    run.write(4, nothing, np.zeros(6), sha256="of other data")
    with pytest.raises(InputError, match="not all about the same data"):
        select.main(run="sft")
    run.write(4, nothing, np.full(6, np.nan))
    with pytest.raises(InputError, match="recorded no accuracy .* name a --bottleneck=STEP"):
        select.main(run="sft")
    Path("runs/sft/trajectory/000000.npz").unlink()
    with pytest.raises(InputError, match="run sft: step 0 was not recorded"):
        select.main(run="sft")
    for path in Path("runs/sft/trajectory").iterdir():
        path.unlink()
    with pytest.raises(InputError, match="no trajectory; run train.py --run=sft with --record_every"):
        select.main(run="sft")


def test_masks_that_do_not_belong_are_refused(run):
    out = select.main(run="sft", show=0)
    forced = select.main(run="sft", kind="force", name="forced", show=0)
    with pytest.raises(InputError, match="kind is force; an autoregressive student needs select.py --kind=keep"):
        runs.load_mask(forced, run.train_set, "keep")
    make_world(seed=2, **hand_made.WORLD)
    with pytest.raises(InputError, match="made for another data set than data/toy-2/teacher"):
        runs.load_mask(out, data.load("data/toy-2/teacher"))
    mask, chosen = np.load(out / "mask.npy"), read_json(out / "config.json")
    write_json(out / "config.json", {**chosen, "tokenizer_hash": "another"})
    with pytest.raises(InputError, match="made with another tokenizer"):
        runs.load_mask(out, run.train_set)
    write_json(out / "config.json", chosen)
    for wrong in (mask[:-1], mask.astype(np.int8), ~mask):
        np.save(out / "mask.npy", wrong)
        with pytest.raises(InputError, match="mask.npy is no mask of the response tokens"):
            runs.load_mask(out, run.train_set)
    np.save(out / "mask.npy", np.zeros_like(mask))
    with pytest.raises(InputError, match="the selection is empty"):
        runs.load_mask(out, run.train_set)
    (out / "mask.npy").write_bytes(b"\x93NUMPY")
    with pytest.raises(InputError, match="mask.npy: cannot be read"):
        runs.load_mask(out, run.train_set)


def test_without_the_real_select_the_importer_is_told(tmp_path):
    here = str(test_select.ROOT)
    program = f"""
import importlib.util, sys
sys.path[:] = [{here!r}]
spec = importlib.util.spec_from_file_location("select", {here + "/select.py"!r})
try:
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
except ImportError as error:
    print(error)
"""
    said = test_select.python(sys.executable, "-c", program, packages=[])
    assert "Python's own module select is not on sys.path" in said
