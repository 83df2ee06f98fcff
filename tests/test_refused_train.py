"""train.py: what cannot work is refused in one line, before anything is written."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_train import ROOT, SHORT, WORLD, log, sft, torchrun

import data
import model
import train
from plumbing.config import InputError, load_select, read_json, write_json

assert WORLD  # the world of test_train.py, which conftest.py makes for this file as well


def test_diffusion_keys_that_cannot_work_are_refused(here):
    for keys, message in ((dict(objective="block"), "--objective=block is not for llada"),
                          (dict(forced_weight="two"), "--forced_weight=two: must be one or t"),
                          (dict(t_min=0.9, t_max=0.2), "--t_min=0.9 --t_max=0.2"),
                          (dict(packing=True), "--packing=true is for autoregressive students")):  # fmt: skip
        with pytest.raises(InputError, match=message):
            train.main(run="bad", **SHORT | dict(model="llada") | keys)
    assert not Path("runs").exists()



def test_a_loss_that_is_not_finite_stops_before_the_update(here):
    spoiled = model.load("data/toy-1/untrained")
    with torch.no_grad():
        spoiled.model.embed_tokens.weight[int(data.load("data/toy-1/teacher").tokens[0])] = float("nan")
    model.save(spoiled, "data/toy-1/untrained", "spoiled")
    with pytest.raises(InputError, match=r"step 1: loss nan, .* not finite in the micro-batch of examples \[") as error:
        train.main(run="nan", **SHORT | dict(model="spoiled"))
    assert "\n" not in str(error.value)
    with pytest.raises(InputError, match="step 0: a response token has probability 0 or nan under the student"):
        train.main(run="nan2", record_every=1, **SHORT | dict(model="spoiled"))
    assert not Path("runs/nan/checkpoints").exists() and not list(Path("runs/nan2/trajectory").iterdir())
    assert log("nan") == log("nan2") == []



@pytest.mark.parametrize("keys, message", [
    (dict(run=""), "--run is missing"),
    (dict(model=""), "--model is missing"),
    (dict(data="nowhere"), "nowhere: no such folder; make it with python data.py"),
    (dict(schedule="linear"), "--schedule=linear: must be cosine or constant"),
    (dict(dtype="float16"), "--dtype=float16: must be float32 or bfloat16"),
    (dict(steps=0), "--steps=0: must be at least 1"),
    (dict(micro_batch_size=0), "--micro_batch_size=0: must be at least 1"),
    (dict(learning_rate=1.0), "unknown key learning_rate"),
    (dict(selection="runs/x/selection/t3s"), "config.json: no such file"),
    (dict(selection="elsewhere/t3s"), "--selection=elsewhere/t3s: must be a folder runs/<run>/selection/<name>"),
    (dict(run="../out"), "--run=../out: must be the name of a folder in runs/"),
    (dict(run="/out"), "--run=/out: must be"), (dict(run="."), "--run=.: must be"),
    (dict(run="a/../../b"), "--run=a/../../b: must be"),
    (dict(lr=-1.0), "--lr=-1.0: must be at least 0"),
    (dict(beta1=2.0), "--beta1=2.0: must be at least 0 and less than 1"), (dict(beta2=1.0), "--beta2=1.0: must be"),
    *((dict([(key, -1)]), f"--{key}=-1: must be at least 0")
      for key in ("batch_size", "warmup_steps", "clip", "seed", "record_every", "save_every")),
    (dict(device="foo"), "--device=foo: not on this machine"),
    (dict(device="cuda:99"), "--device=cuda:99: not on this machine"),
    (dict(record_every=1, temperature=-1.0), "--temperature=-1.0: must be at least 0"),
    (dict(record_every=1, model="llada", block_length=3), "--block_length=3 does not divide"),
    (dict(gpu_memory_gib=-1.0), "--gpu_memory_gib=-1.0: must be more than 0"),
])  # fmt: skip
def test_bad_keys_leave_nothing_behind(here, keys, message):
    with pytest.raises(InputError, match=message) as error:
        train.main(**{"run": "bad", **SHORT, **keys})
    assert "\n" not in str(error.value) and not Path("runs").exists()



@pytest.mark.parametrize("spoil, message", [
    ("truncated", "model.safetensors: not a complete safetensors file"),
    ("missing", "no model.safetensors"),
    ("shape", "has shape"),
    ("outside", "which is not a plain file name"),
])  # fmt: skip
def test_weights_that_cannot_be_read_leave_nothing_behind(here, spoil, message):
    """And so the same command works once the model is mended."""
    shutil.copytree("data/toy-1/untrained", "broken")
    path = Path("broken/model.safetensors")
    if spoil == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    elif spoil == "shape":
        stored = load_file(path)
        save_file(stored | {"model.norm.weight": torch.ones(3)}, path, metadata={"format": "pt"})
    else:
        path.unlink()
    if spoil == "outside":
        write_json("broken/model.safetensors.index.json", {"weight_map": {"model.norm.weight": "../m.safetensors"}})
    with pytest.raises(InputError, match=message):
        train.main(run="a/b", **SHORT | dict(model="broken"))
    assert not Path("runs").exists()
    train.main(run="a/b", **SHORT | dict(steps=1))



def test_of_two_processes_with_bad_weights_one_speaks_and_no_folder_is_left(here):
    shutil.copytree("data/toy-1/untrained", "broken")
    Path("broken/model.safetensors").unlink()
    done = torchrun(2, run="x", **SHORT | dict(model="broken"))
    said = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 1 and len(said) == 1 and "no model.safetensors" in said[0], done.stderr
    assert not Path("runs").exists()



def test_a_run_config_that_is_none_is_named(here):
    Path("runs/x").mkdir(parents=True)
    write_json("runs/x/config.json", {"model_type": "qwen3"})
    with pytest.raises(InputError, match="runs/x/config.json: not a run's config.json"):
        train.main(run="x", resume=True)



def test_an_existing_run_is_never_written_over(here):
    train.main(run="one", **SHORT)
    before = Path("runs/one/log.jsonl").read_bytes()
    with pytest.raises(InputError, match="runs/one: this run exists; --resume=true goes on with it, or give"):
        train.main(run="one", **SHORT)
    assert Path("runs/one/log.jsonl").read_bytes() == before



def test_what_is_refused_is_refused_before_the_weights_are_read(here, monkeypatch):
    """An existing run, other keys than it had, and a probe whose second pass could not be written."""
    train.main(run="one", **SHORT | dict(resume_every=-1))
    before = Path("runs/one/log.jsonl").read_bytes()
    read = []
    for name in ("load", "build"):
        of_model = getattr(model, name)
        monkeypatch.setattr(model, name, lambda *given, _of=of_model, **more: read.append(given) or _of(*given, **more))
    with pytest.raises(InputError, match="runs/one: this run exists"):
        train.main(run="one", **SHORT)
    with pytest.raises(InputError, match="runs/one: this run exists"):
        train.main(run="one", probe=1, **SHORT)
    with pytest.raises(InputError, match=r"runs/one: not the run it was \(lr: then 0.001, now 0.5\)"):
        train.main(run="one", resume=True, lr=0.5)
    assert read == [] and not Path("runs/one-probe").exists()
    assert Path("runs/one/log.jsonl").read_bytes() == before
    train.main(run="two", **SHORT | dict(steps=1))
    assert read  # the spy sees what it should



def test_neither_a_refusal_nor_a_resume_removes_the_users_files(here):
    """Only what a killed process left half-written goes, and not before the run is known to go on."""
    train.main(run="one", record_every=4, **SHORT)
    users = [Path("runs/one") / name for name in (".note", "trajectory/.note", "trajectory/note.txt",
             "trajectory/.nfs0001.x", "checkpoints/.DS_Store", "resume/.note", ".plan.tmp")]  # fmt: skip
    left = [Path("runs/one/resume/.000002.tmp"), Path("runs/one/trajectory/.000004.npz.123.tmp"),
            Path("runs/one/checkpoints/.000004.123.old")]  # fmt: skip
    for path in users:
        path.write_text("mine")
    for path in left:
        path.mkdir()
    with pytest.raises(InputError, match="this run exists"):
        train.main(run="one", **SHORT)
    with pytest.raises(InputError, match="not the run it was"):
        train.main(run="one", resume=True, lr=0.5)
    assert all(path.is_dir() for path in left)
    train.main(run="one", resume=True)
    assert all(path.read_text() == "mine" for path in users)
    assert not any(path.exists() for path in left)



def test_a_run_without_resume_states_cannot_be_resumed(here):
    """--resume_every=-1: nothing in resume/; --resume must not begin again and remove what is there."""
    train.main(run="one", **SHORT | dict(resume_every=-1))
    assert not Path("runs/one/resume").exists() and Path("runs/one/checkpoints/000004").is_dir()
    with pytest.raises(InputError, match=r"runs/one: no resume state was kept \(--resume_every=-1\)"):
        train.main(run="one", resume=True)
    assert Path("runs/one/checkpoints/000004").is_dir() and len(log("one")) == 4



def test_what_does_not_belong_together_is_refused(here):
    sft()
    folder = load_select().main(run="sft", rule="all", bottleneck=2, show=0)
    with pytest.raises(InputError, match="made for another data set than data/toy-1/unseen"):
        train.main(run="bad", selection=str(folder), data="data/toy-1/unseen")
    # a student with another tokenizer: one merge less
    shutil.copytree("data/toy-1/untrained", "other")
    spec = read_json("other/tokenizer.json")
    spec["model"]["merges"].pop()
    write_json("other/tokenizer.json", spec)
    with pytest.raises(InputError, match="data/toy-1/teacher: made with another tokenizer than the student's"):
        train.main(run="bad", **SHORT | dict(model="other"))
    assert not Path("runs/bad").exists()



def test_the_shell_gets_one_line_and_an_exit_code(here):
    stored = load_file("data/toy-1/untrained/model.safetensors")
    shutil.copytree("data/toy-1/untrained", "broken")
    stored.pop("model.norm.weight")
    save_file(stored, "broken/model.safetensors", metadata={"format": "pt"})
    words = ["--run=x", "--model=broken", "--data=data/toy-1/teacher"]
    for more, message in ((["--stpes=3"], "unknown key --stpes; did you mean --steps?"),
                          (["--steps=three"], "--steps=three: the value must be a whole number"),
                          ([], "the tensor model.norm.weight is missing")):  # fmt: skip
        done = subprocess.run([sys.executable, str(ROOT / "train.py"), *words, *more], capture_output=True, text=True)
        assert done.returncode == 1 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
        assert message in done.stderr
    assert not Path("runs").exists()

