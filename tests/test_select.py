"""select.py: the rules against plain loops, masks that must be refused, and the name it shares with the library."""

import glob
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from worlds import make_world

import data
import model
from hf import tokenizer as tokenizer_file
from plumbing import runs
from plumbing.config import InputError, load_select, read_json, write_json

select = load_select()
ROOT = Path(__file__).parent.parent


# ---------------------------------------------------------------------------------------------------------------------
# The method


def test_the_bottleneck_is_the_earliest_of_the_lowest():
    assert select.find_bottleneck({0: 0.7, 2: 0.6, 4: 0.3, 6: 0.3, 8: 0.5}) == 4
    assert select.find_bottleneck({8: 0.5, 0: 0.7, 6: 0.3, 4: 0.3}) == 4


@pytest.mark.parametrize("accuracy, message", [
    ({2: 0.6, 4: 0.3}, "step 0 was not recorded"),
    ({0: 0.3, 2: 0.3, 4: 0.5}, "never fell below the 0.300 of step 0"),
    ({0: 0.3}, "never fell"),
])  # fmt: skip
def test_no_bottleneck_is_said_in_one_line(accuracy, message):
    with pytest.raises(InputError, match=message) as error:
        select.find_bottleneck(accuracy)
    assert "\n" not in str(error.value)


def world(seed=0, n=60):
    rng = np.random.default_rng(seed)
    delta, start = rng.normal(size=n).round(1), -rng.exponential(size=n)
    edges = np.r_[0, np.sort(rng.choice(np.arange(1, n), 4, replace=False)), n]
    return delta, start, np.stack([edges[:-1], edges[1:]], axis=1)


@pytest.mark.parametrize("tau", [0.0, 0.3])
def test_rules_against_plain_loops(tau):
    delta, start, spans = world()
    n = len(delta)
    keep = {rule: select.choose(rule, "keep", delta, start, spans, tau) for rule in RULES}
    force = {rule: select.choose(rule, "force", delta, start, spans, tau) for rule in RULES}
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


RULES = ("t3s", "inverse", "all", "random", "random_file", "static_high", "static_low")


def test_random_rules_are_functions_of_the_seed():
    delta, start, spans = world(n=200)
    for rule in ("random", "random_file"):
        masks = [select.choose(rule, "keep", delta, start, spans, seed=seed).tolist() for seed in (1, 1, 2)]
        assert masks[0] == masks[1] != masks[2]
        assert masks[0] != select.choose("t3s", "keep", delta, start, spans).tolist()


def test_unknown_rule():
    with pytest.raises(InputError, match="--rule=best: must be t3s"):
        select.choose("best", "keep", *world())


@pytest.mark.parametrize("kind", ["keep", "force"])
def test_tau_of_a_share_comes_as_near_as_the_tokens_allow(kind):
    delta = np.random.default_rng(3).normal(size=1000)
    for share in (0.001, 0.05, 0.3):
        tau = select.tau_of_share(delta, share, kind)
        assert ((delta > tau) if kind == "keep" else (delta < -tau)).mean() == share
    for share in (0.9, -0.1):
        with pytest.raises(InputError, match=f"--share={share}: must be above 0 and at most 0"):
            select.tau_of_share(delta, share, kind)


def test_tau_sweep_counts():
    sweep = select.tau_sweep(np.array([0.0, 0.3, -0.3, 1.5]))
    assert sweep[0] == {"tau": 0.0, "anchors": 0.5, "yet_to_learn": 0.25}
    assert {"tau": 0.3, "anchors": 0.25, "yet_to_learn": 0.0} in sweep


def test_bootstrap_is_sure_only_of_what_is_clear():
    rng = np.random.default_rng(0)
    clear = {0: np.ones(50), 2: np.zeros(50), 4: np.ones(50)}
    assert select.bootstrap_bottleneck(clear) == {2: 1.0}
    close = {0: np.ones(50), 2: (rng.random(50) < 0.5) * 1.0, 4: (rng.random(50) < 0.5) * 1.0}
    share = select.bootstrap_bottleneck(close)
    assert sum(share.values()) == pytest.approx(1) and 0.01 < share[2] < 0.99
    same = {0: np.ones(5), 2: np.zeros(5), 4: np.zeros(5)}
    assert select.bootstrap_bottleneck(same) == {2: 1.0}  # ties go to the earliest


# ---------------------------------------------------------------------------------------------------------------------
# The command, on a run whose trajectory is written by hand


WORLD = dict(teacher=6, unseen=2, cut=None, students=())


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """runs/sft as train.py would leave it, with train accuracy 0.8, 0.2, 0.5 and random confidences."""
    monkeypatch.chdir(tmp_path)
    make_world(**WORLD)
    capsys.readouterr()
    train_set = data.load("data/toy-1/teacher")
    write_json_in("runs/sft/config.json", {"config": {"model": "data/toy-1/untrained", "data": "data/toy-1/teacher"}})
    rng = np.random.default_rng(0)
    for step, correct in ((0, [1, 1, 1, 1, 0]), (2, [0, 0, 0, 1, 0]), (4, [1, 0, 1, 0, 0])):
        logprob = np.where(train_set.response_mask(), -rng.exponential(size=len(train_set.tokens)), np.nan)
        write_step(train_set, step, logprob.astype(np.float32), np.array([*correct, 0.0]))
    return train_set


def write_json_in(path, value):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_json(path, value)


def write_step(train_set, step, logprob, correct, **changes):
    Path("runs/sft/trajectory").mkdir(parents=True, exist_ok=True)
    arrays = dict(logprob=logprob, correct=correct, accuracy=correct.mean(), step=step, sha256=train_set.sha256,
                  tokenizer_hash=train_set.meta["tokenizer_hash"])  # fmt: skip
    np.savez(f"runs/sft/trajectory/{step:06d}.npz", **arrays | changes)


def test_main_writes_mask_and_statistics(run, capsys):
    out = select.main(run="sft")
    assert out == Path("runs/sft/selection/t3s")
    start, low = (np.load(f"runs/sft/trajectory/{s:06d}.npz")["logprob"] for s in (0, 2))
    mask = np.load(out / "mask.npy")
    assert mask.tolist() == [bool(r and not b > a) for r, a, b in zip(run.response_mask(), start, low, strict=True)]
    stats, chosen = read_json(out / "stats.json"), read_json(out / "config.json")
    assert stats["bottleneck_step"] == chosen["bottleneck_step"] == 2
    assert stats["selected"] == mask.sum() and stats["response_tokens"] == run.response_mask().sum()
    assert stats["share"] == mask.sum() / run.response_mask().sum()
    assert stats["anchors"] + stats["yet_to_learn"] == pytest.approx(1)
    tokenizer = tokenizer_file.load_tokenizer(Path("data/toy-1/untrained"))
    ids = run.tokens[run.response_mask()].tolist()
    top = stats["anchor_tokens"][0]
    assert top["seen"] == ids.count(top["id"]) and top["token"] == tokenizer.decode([top["id"]])
    assert chosen["sha256"] == run.sha256 and chosen["kind"] == "keep" and chosen["tau"] == 0.0
    assert np.array_equal(runs.load_mask(out, run), mask)
    text = capsys.readouterr().out
    assert "bottleneck: step 2" in text and f"{stats['share']:.1%} stay in the loss" in text
    shown = text.split("example 0:\n")[1].split("\n")[0]  # not a terminal: brackets around what is dropped
    assert shown.replace("⟦", "").replace("⟧", "") == tokenizer.decode(run.response(0))
    assert "\x1b" not in text


def test_share_and_kind_and_bottleneck_keys(run):
    n = run.response_mask().sum()
    out = select.main(run="sft", share=0.1, name="tenth", show=0)
    assert (~np.load(out / "mask.npy"))[run.response_mask()].sum() == round(0.1 * n) and out.name == "tenth"
    out = select.main(run="sft", kind="force", share=0.1, show=0)
    assert np.load(out / "mask.npy").sum() == round(0.1 * n)
    with pytest.raises(InputError, match="kind is force; an autoregressive student needs select.py --kind=keep"):
        runs.load_mask(out, run, "keep")
    out = select.main(run="sft", bottleneck=4, show=0)
    assert read_json(out / "config.json")["bottleneck_step"] == 4


@pytest.mark.parametrize("keys, message", [
    (dict(), "--run is missing"),
    (dict(run="other"), "config.json: no such file"),
    (dict(run="sft", kind="drop"), "--kind=drop: must be keep or force"),
    (dict(run="sft", tau=-1.0), "--tau=-1.0: must not be negative"),
    (dict(run="sft", bottleneck=3), "--bottleneck=3: recorded were 0, 2, 4"),
    (dict(run="sft", kind="force", tau=99.0), "selects no token at all; nothing written"),
    (dict(run="sft", rule="rrt"), "000002: this checkpoint was not kept"),
    (dict(run="../sft"), "--run=../sft: must be the name of a folder in runs/"),
    *((dict(run="sft", name=name), f"--name={name}: must be a plain name")
      for name in (".", "..", "../x", "a/b", "/x")),
    (dict(run="sft", rule="random", seed=-1), "--seed=-1: must not be negative"),
])  # fmt: skip
def test_bad_keys(run, keys, message):
    with pytest.raises(InputError, match=message):
        select.main(**keys)
    assert not Path("runs/sft/selection").exists()


def test_bad_trajectories(run):
    step4 = Path("runs/sft/trajectory/000004.npz")
    whole = step4.read_bytes()
    step4.write_bytes(whole[:100])
    with pytest.raises(InputError, match="000004.npz: not a complete trajectory file"):
        select.main(run="sft")
    nothing = np.full(len(run.tokens), np.nan, dtype=np.float32)
    write_step(run, 4, nothing, np.zeros(6), sha256="of other data")
    with pytest.raises(InputError, match="not all about the same data"):
        select.main(run="sft")
    write_step(run, 4, nothing, np.full(6, np.nan))
    with pytest.raises(InputError, match="recorded no accuracy .* name a --bottleneck=STEP"):
        select.main(run="sft")
    for path in Path("runs/sft/trajectory").iterdir():
        path.unlink()
    with pytest.raises(InputError, match="no trajectory; run train.py --run=sft with --record_every"):
        select.main(run="sft")


def test_without_answers_there_is_no_accuracy_in_the_statistics(run, capsys):
    for step in (0, 2, 4):
        logprob = np.load(f"runs/sft/trajectory/{step:06d}.npz")["logprob"]
        write_step(run, step, logprob, np.full(6, np.nan))
    out = select.main(run="sft", bottleneck=2, show=0)
    stats = read_json(out / "stats.json")
    assert stats["accuracy"] == {"0": None, "2": None, "4": None} and stats["bottleneck_bootstrap"] is None
    assert "NaN" not in (out / "stats.json").read_text()
    text = capsys.readouterr().out
    assert "bottleneck: step 2, as asked for; no accuracy was recorded" in text and "nan" not in text


def test_masks_that_do_not_belong_are_refused(run):
    out = select.main(run="sft", show=0)
    make_world(seed=2, **WORLD)
    with pytest.raises(InputError, match="made for another data set than data/toy-2/teacher"):
        runs.load_mask(out, data.load("data/toy-2/teacher"))
    mask, chosen = np.load(out / "mask.npy"), read_json(out / "config.json")
    write_json(out / "config.json", {**chosen, "tokenizer_hash": "another"})
    with pytest.raises(InputError, match="made with another tokenizer"):
        runs.load_mask(out, run)
    write_json(out / "config.json", chosen)
    for wrong in (mask[:-1], mask.astype(np.int8), ~mask):
        np.save(out / "mask.npy", wrong)
        with pytest.raises(InputError, match="mask.npy is no mask of the response tokens"):
            runs.load_mask(out, run)
    np.save(out / "mask.npy", np.zeros_like(mask))
    with pytest.raises(InputError, match="the selection is empty"):
        runs.load_mask(out, run)
    (out / "mask.npy").write_bytes(b"\x93NUMPY")
    with pytest.raises(InputError, match="mask.npy: cannot be read"):
        runs.load_mask(out, run)


def test_rrt_is_the_sum_of_three_models(run):
    folders = {}
    names = ("data/toy-1/untrained", "runs/sft/checkpoints/000002", "runs/sft/checkpoints/000004")
    for seed, name in enumerate(names, 1):
        network = model.load("data/toy-1/untrained").init_weights(seed)
        # the base is a bfloat16 checkpoint in two shards: the sum is float32 all the same
        if seed == 1:
            network = network.to(torch.bfloat16)
        model.save(network, "data/toy-1/untrained", name, max_shard_bytes=100_000 if seed == 1 else 10**9)
        folders[seed] = model.load(name).state_dict()
    out = select.main(run="sft", rule="rrt")
    assert out == Path("runs/sft/selection/rrt") and read_json(out / "config.json")["model_type"] == "qwen3"
    made = load_file(out / "model.safetensors")
    assert len(made) == len(folders[1])
    for name, tensor in made.items():
        assert tensor.dtype == torch.float32
        exact = folders[1][name].double() + folders[3][name].double() - folders[2][name].double()
        assert (tensor.double() - exact).abs().max() < 1e-7
    assert tokenizer_file.load_tokenizer(out).hash == run.meta["tokenizer_hash"]
    with pytest.raises(InputError, match="rrt: a model folder, not a selection; go on from it with --model=runs/sft"):
        runs.load_mask(out, run)


def test_colours_on_a_terminal_only(run, monkeypatch):
    tokenizer = tokenizer_file.load_tokenizer(Path("data/toy-1/untrained"))
    ids, picked = tokenizer.encode("1+2=3"), np.array([True, True, False, False, True])
    assert select.paint(tokenizer, ids, picked) == "1+⟦2=⟧3"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert select.paint(tokenizer, ids, picked) == "\x1b[32m1+\x1b[0m\x1b[90m2=\x1b[0m\x1b[32m3\x1b[0m"
    monkeypatch.setenv("NO_COLOR", "1")
    assert select.paint(tokenizer, ids, picked) == "1+⟦2=⟧3"


# ---------------------------------------------------------------------------------------------------------------------
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
import multiprocessing, torch, subprocess, asyncio, config

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
def test_everybody_gets_the_select_they_mean(builtin, tmp_path):
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
    assert "--bottleneck=-1" in python(path, "select.py", "--help", packages=packages)
    assert "pytest" in python(path, "-m", "pytest", "--version", packages=packages)
    torchrun = ["-m", "torch.distributed.run", "--nproc_per_node=2", "train.py", "--help"]
    assert python(path, *torchrun, packages=packages).count("--micro_batch_size=8") == 2


def test_our_code_never_imports_it_by_name():
    for path in ROOT.glob("*.py"):
        words = [line.split() for line in path.read_text(encoding="utf-8").splitlines()]
        assert not any(w[:2] in (["import", "select"], ["from", "select"]) for w in words), path


def test_without_the_real_one_it_says_so(tmp_path):
    here = str(ROOT)
    program = f"""
import importlib.util, sys
sys.path[:] = [{here!r}]
spec = importlib.util.spec_from_file_location("select", {str(ROOT / 'select.py')!r})
try:
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
except ImportError as error:
    print(error)
"""
    assert "Python's own module select is not on sys.path" in python(sys.executable, "-c", program, packages=[])


def test_stats_are_json_a_stranger_can_read(run):
    out = select.main(run="sft", show=0)
    stats = json.loads((out / "stats.json").read_text())
    assert stats["accuracy"] == {"0": pytest.approx(4 / 6), "2": pytest.approx(1 / 6), "4": pytest.approx(2 / 6)}
    assert stats["bottleneck_bootstrap"] and stats["tau_sweep"][0]["tau"] == 0.0
