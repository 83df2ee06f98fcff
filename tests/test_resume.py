"""resume.py: a run that was killed, cut off or damaged goes on as if nothing had happened, or says why it cannot."""

import errno
import fcntl
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

import faults
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from worlds import inside, make_world

import data
import model
import train
import trajectory
from plumbing import resume
from plumbing.config import InputError, load_select, read_json, write_json

ROOT = Path(__file__).parent.parent
KEYS = faults.KEYS
STUDENTS = {"ar": {}, "packed": dict(packing=True, max_row_tokens=90), "llada": dict(model="llada"),
            "llada2": dict(model="llada2"), "qwen3_moe": dict(model="qwen3_moe")}  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The data, the students, and for each a run that nobody disturbed."""
    folder = make_world(tmp_path_factory.mktemp("world"))
    with inside(folder):
        for name, keys in STUDENTS.items():
            train.main(run=f"whole-{name}", **KEYS | keys)
    return folder


@pytest.fixture
def here(world, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("data", "llada", "llada2", "qwen3_moe"):
        (tmp_path / name).symlink_to(world / name)
    shutil.copytree(world / "runs", tmp_path / "runs")
    return tmp_path


def stop_at(step, run="cut", **keys):
    """Train until update `step` would begin, and fall over there."""
    step_of = train.train_step

    def fall(cfg, student, optimizer, batches, at):
        if at == step:
            raise ZeroDivisionError
        return step_of(cfg, student, optimizer, batches, at)

    train.train_step = fall
    try:
        with pytest.raises(ZeroDivisionError):
            train.main(run=run, **KEYS | keys)
    finally:
        train.train_step = step_of


def log(run):
    return [json.loads(line) for line in Path(f"runs/{run}/log.jsonl").read_text().splitlines()]


def newest_file(run):
    return next(resume.states(Path("runs") / run)[0].glob("*.safetensors"))


# ---------------------------------------------------------------------------------------------------------------------
# Killed, and on again


@pytest.mark.parametrize("student, part, nth, delay", [
    ("ar", "state", 2, 0.01), ("packed", "sweep", 2, 0.002), ("llada", "step", 6, 0.0), ("ar", "checkpoint", 3, 0.0),
    ("llada2", "checkpoint", 2, 0.005), ("qwen3_moe", "evaluation", 3, 0.002),
])  # fmt: skip
def test_killed_and_resumed_is_never_interrupted(here, student, part, nth, delay):
    """kill -9 in each part of the program, twice; then parameters, optimizer, log, trajectories are bit for bit."""
    keys = KEYS | STUDENTS[student] | dict(run="killed")
    assert faults.kill_in(keys, part, nth, delay)
    faults.kill_in(keys | dict(resume=True), "rewind", 1, 0.001)
    train.main(run="killed", resume=True)
    faults.same(f"whole-{student}", "killed")


def test_without_a_state_it_begins_again_and_without_a_run_it_begins(here, capsys):
    stop_at(5, resume_every=0)
    train.main(run="cut", resume=True)
    assert "no resume state yet: from the beginning" in capsys.readouterr().out
    train.main(run="new", resume=True, **KEYS | dict(resume_every=0))
    faults.same("new", "cut")


def test_plain_sgd_goes_on_from_the_parameters_alone(here):
    keys = dict(optimizer="sgd", lr=0.1)
    train.main(run="whole-sgd", **KEYS | keys)
    stop_at(5, **keys)
    train.main(run="cut", resume=True)
    faults.same("whole-sgd", "cut")


def test_an_interrupted_run_goes_on(here, monkeypatch):
    """Ctrl-C saves a state and a checkpoint; the resumed run has neither the extra checkpoint nor a gap."""
    step_of = train.train_step

    def interrupted(cfg, student, optimizer, batches, step):
        if step == 4:
            os.kill(os.getpid(), signal.SIGINT)
        return step_of(cfg, student, optimizer, batches, step)

    monkeypatch.setattr(train, "train_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train.main(run="stopped", **KEYS)
    assert (Path("runs/stopped/resume/000005").is_dir() and Path("runs/stopped/checkpoints/000005").is_dir())
    monkeypatch.undo()
    os.chdir(here)
    train.main(run="stopped", resume=True)
    faults.same("whole-ar", "stopped")


def test_a_sweep_goes_on_where_it_was(here, monkeypatch):
    """Forward passes that an interrupted recording has finished are not made again."""
    score, asked = trajectory.score, []

    def counted(run, rows):
        asked.append(rows)
        if len(asked) == limit:
            raise ZeroDivisionError
        return score(run, rows)

    monkeypatch.setattr(trajectory, "score", counted)
    limit = 5 + 4  # 9 examples, 2 in a pass: 5 passes at step 0, the fourth one at step 3 falls over
    with pytest.raises(ZeroDivisionError):
        train.main(run="cut", **KEYS)
    before, limit = [*asked], 0
    asked.clear()
    train.main(run="cut", resume=True)
    assert before[5:8] == before[:3] and asked[:2] == before[3:5]  # two of the five were left to do
    assert len(asked) == 2 + 5 + 5
    faults.same("whole-ar", "cut")


def test_a_state_is_cut_into_files(here, monkeypatch):
    """The writer holds a whole file in memory: no file has more than FILE_BYTES and one tensor."""
    with monkeypatch.context() as small:
        small.setattr(resume, "FILE_BYTES", 2**14)
        stop_at(5)
    files = list(Path("runs/cut/resume/000004").glob("*.safetensors"))
    sizes = [[tensor.nbytes for tensor in load_file(file).values()] for file in files]
    assert len(files) > 5 and all(sum(each) <= 2**14 + max(each) for each in sizes)
    train.main(run="cut", resume=True)
    faults.same("whole-ar", "cut")


def torchrun(n, *words):
    program = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n}", "--"]
    return subprocess.run([*program, str(ROOT / "train.py"), *words], capture_output=True, text=True, timeout=300,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip


@pytest.mark.parametrize("student", ["ar", "qwen3_moe"])
def test_on_another_number_of_processes(here, student):
    """One process until step 4, two until 9, one again from 8: the same examples, losses, records and weights."""
    stop_at(5, **STUDENTS[student])
    done = torchrun(2, "--run=cut", "--resume=true")
    assert done.returncode == 0 and "resumed at step 4 of 9" in done.stdout, done.stderr
    assert len(list(Path("runs/cut/resume/000008").glob("*.safetensors"))) == 2
    shutil.rmtree("runs/cut/resume/000009")
    train.main(run="cut", resume=True)
    for a, b in zip(log(f"whole-{student}"), log("cut"), strict=True):
        assert a.keys() == b.keys()
        for key in set(a) - {"seconds", "padding", "grad_norm"}:
            assert b[key] == pytest.approx(a[key], abs=1e-5), key
    x, y = (load_file(f"runs/{run}/checkpoints/000009/model.safetensors") for run in (f"whole-{student}", "cut"))
    assert all(torch.allclose(x[name], y[name], atol=2e-5) for name in x)


# ---------------------------------------------------------------------------------------------------------------------
# Damaged files


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


DAMAGE = {
    "flipped": (lambda p: flip(newest_file("cut")), r"safetensors: damaged \(its sha256 is not the manifest's\)"),
    "truncated": (lambda p: os.truncate(newest_file("cut"), 1000), r"safetensors: damaged \(1000 bytes, not \d+\)"),
    "missing": (lambda p: newest_file("cut").unlink(), "safetensors: missing"),
    "manifest flipped": (lambda p: flip(p / "manifest.json"), "(manifest.json: |safetensors: (damaged|missing))"),
    "manifest cut": (lambda p: os.truncate(p / "manifest.json", 30), "manifest.json: not JSON"),
    "no manifest": (lambda p: (p / "manifest.json").unlink(), "manifest.json: no such file"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_state_is_named_and_the_one_before_is_used(here, capsys, damage):
    stop_at(7)
    spoil, message = DAMAGE[damage]
    spoil(Path("runs/cut/resume/000006"))
    train.main(run="cut", resume=True)
    printed = capsys.readouterr().out
    assert re.search(rf"runs/cut/resume/000006/.*{message}.*; looking for an older state", printed), printed
    assert "resumed at step 4 of 9" in printed
    faults.same("whole-ar", "cut")


def test_if_every_state_is_damaged_nothing_is_touched(here):
    stop_at(7)
    for path in Path("runs/cut/resume").rglob("*.safetensors"):
        flip(path)
    before = Path("runs/cut/log.jsonl").read_bytes()
    with pytest.raises(InputError, match="runs/cut/resume: every state is damaged; delete that folder to begin again"):
        train.main(run="cut", resume=True)
    assert Path("runs/cut/log.jsonl").read_bytes() == before


def test_a_damaged_log_is_refused(here):
    stop_at(7)
    lines = Path("runs/cut/log.jsonl").read_text().splitlines()
    third = next(i for i, line in enumerate(lines) if '"step": 3, "loss"' in line)
    Path("runs/cut/log.jsonl").write_text("\n".join(lines[:third] + lines[third + 1 :]) + "\n")
    with pytest.raises(InputError, match="log.jsonl: the line of step 3 is missing or there twice"):
        train.main(run="cut", resume=True)
    Path("runs/cut/log.jsonl").write_text("\n".join([*lines[:third], "{half", *lines[third:]]) + "\n")
    with pytest.raises(InputError, match=f"log.jsonl, line {third + 1}: not JSON"):
        train.main(run="cut", resume=True)


def test_so_many_states_are_kept(here):
    assert [p.name for p in resume.states(Path("runs/whole-ar"))] == ["000009", "000008"]
    train.main(run="more", **KEYS | dict(keep_resume_states=4, record_every=0, resume_every=1))
    assert [p.name for p in resume.states(Path("runs/more"))] == ["000009", "000008", "000007", "000006"]


# ---------------------------------------------------------------------------------------------------------------------
# Not the run it was


def other_data():
    shutil.copytree("data/toy-1/teacher", "other")
    lines = Path("data/toy-1/teacher.jsonl").read_text().replace("so ", "thus ").replace("wait ", "ok ")
    Path("other.jsonl").write_text(lines)
    shutil.rmtree("other")
    data.main(source="other.jsonl", tokenizer="data/toy-1/untrained", out="other", verifier="toy")


@pytest.mark.parametrize("keys, message", [
    (dict(batch_size=3), "batch_size: then 4, now 3"),
    (dict(lr=2e-3), "lr: then 0.001, now 0.002"),
    (dict(steps=12), "steps: then 9, now 12"),
    (dict(seed=1, samples=2), "seed: then 0, now 1; samples: then 1, now 2"),
    (dict(data="other"), "data: then data/toy-1/teacher, now other; the training data: then [0-9a-f]{64}, now"),
    (dict(model="qwen3_moe"), "model: then .*; the student's config.json: then"),
])  # fmt: skip
def test_changes_are_refused_with_the_differences(here, keys, message):
    other_data()
    stop_at(3)
    before = {p: p.read_bytes() for p in Path("runs/cut").rglob("*") if p.is_file()}
    with pytest.raises(InputError, match=f"runs/cut: not the run it was \\({message}.*--allow_changes=true") as error:
        train.main(run="cut", resume=True, **keys)
    assert "\n" not in str(error.value)
    assert {p: p.read_bytes() for p in Path("runs/cut").rglob("*") if p.is_file()} == before


def test_the_same_name_with_other_content_is_refused(here):
    """Data, selection or tokenizer may change behind the same path: their hashes tell."""
    shutil.copytree("data/toy-1/teacher", "mine")
    folder = load_select().main(run="whole-ar", rule="all", bottleneck=3, show=0)
    mask = np.load(folder / "mask.npy")
    stop_at(3, selection=str(folder), model="data/toy-1/untrained")
    mask[np.flatnonzero(mask)[5]] = False
    np.save(folder / "mask.npy", mask)
    with pytest.raises(InputError, match=r"not the run it was \(the selection's mask: then [0-9a-f]{64}, now"):
        train.main(run="cut", resume=True)
    stop_at(3, run="cut2", data="mine")
    other_data()
    shutil.rmtree("mine")
    shutil.copytree("other", "mine")
    with pytest.raises(InputError, match=r"not the run it was \(the training data: then [0-9a-f]{64}, now"):
        train.main(run="cut2", resume=True)
    shutil.copytree("data/toy-1/untrained", "renamed")
    spec = read_json("renamed/tokenizer.json")
    spec["model"]["merges"].pop()
    write_json("renamed/tokenizer.json", spec)
    with pytest.raises(InputError, match="made with another tokenizer than the student's"):
        train.main(run="cut2", resume=True, model="renamed")


def test_another_torch_is_refused(here):
    stop_at(3)
    saved = read_json("runs/cut/config.json")
    write_json("runs/cut/config.json", {**saved, "versions": {**saved["versions"], "torch": "2.0.0"}})
    with pytest.raises(InputError, match=r"not the run it was \(torch: then 2.0.0, now"):
        train.main(run="cut", resume=True)


def test_a_key_that_an_older_run_does_not_know_had_its_default(here):
    """Whatever the default is: 1.0, "free" or 0. Any other value is a change; renamed keys are known."""
    stop_at(3)
    saved = read_json("runs/cut/config.json")
    for key in ("top_p", "eos_rule", "confidence_draws"):
        del saved["config"][key]
    saved["config"]["keep_checkpoints"] = saved["config"].pop("keep_resume_states")
    write_json("runs/cut/config.json", saved)
    with pytest.raises(InputError, match=r"not the run it was \(top_p: then 1.0, now 0.5\)"):
        train.main(run="cut", resume=True, top_p=0.5)
    train.main(run="cut", resume=True)
    assert read_json("runs/cut/config.json")["resumed"][0]["changes"] == []
    faults.same("whole-ar", "cut")


def test_changes_that_are_allowed_are_written_down(here):
    stop_at(7)
    train.main(run="cut", resume=True, lr=5e-4, micro_batch_size=3, allow_changes=True)
    saved = read_json("runs/cut/config.json")
    assert saved["config"]["lr"] == 5e-4 and saved["resumed"][0]["changes"] == [["lr", 1e-3, 5e-4]]
    whole, lines = log("whole-ar"), log("cut")
    assert [line["step"] for line in lines] == [line["step"] for line in whole]
    assert all(a["loss"] == b["loss"] for a, b in zip(whole, lines, strict=True) if "loss" in a and a["step"] <= 6)
    assert [line["lr"] for line in lines if line.get("step") == 8 and "lr" in line] == [
        pytest.approx(next(w["lr"] for w in whole if w["step"] == 8 and "lr" in w) / 2)]


def test_asking_for_more_steps_loses_nothing(here):
    """A finished run of 9 goes on to 12: checkpoint 9, its record and its answers stay as they are."""
    before = {p: p.read_bytes() for p in Path("runs/whole-ar").rglob("*") if p.is_file() and "0009" in str(p)}
    kept = [p for p in before if "resume" not in p.parts]
    assert {p.parts[2] for p in kept} == {"checkpoints", "trajectory"}
    lines = log("whole-ar")
    train.main(run="whole-ar", resume=True, steps=12, allow_changes=True)
    train.main(run="whole-ar", resume=True, steps=13, allow_changes=True)
    assert all(p.read_bytes() == before[p] for p in kept)
    assert log("whole-ar")[: len(lines)] == lines
    assert [line["step"] for line in log("whole-ar") if "loss" in line] == list(range(1, 14))
    ends = {p.name for p in Path("runs/whole-ar/checkpoints").iterdir()}
    assert {"000009", "000012", "000013"} <= ends
    with pytest.raises(InputError, match="--steps=10: this run has made 13 updates already"):
        train.main(run="whole-ar", resume=True, steps=10, allow_changes=True)
    assert {p.name for p in Path("runs/whole-ar/checkpoints").iterdir()} == ends


def test_a_finished_run_that_is_resumed_does_nothing_again(here, monkeypatch):
    before = log("whole-ar")
    monkeypatch.setattr(trajectory, "score", None)
    train.main(run="whole-ar", resume=True)
    assert log("whole-ar") == before


def test_keys_that_change_no_result_may_change(here):
    stop_at(5)
    train.main(run="cut", resume=True, micro_batch_size=4, resume_every=3, keep_resume_states=1)
    assert read_json("runs/cut/config.json")["resumed"][0]["changes"] == []
    for a, b in zip(log("whole-ar"), log("cut"), strict=True):
        assert a.get("loss") == pytest.approx(b.get("loss"), abs=1e-5) and a["step"] == b["step"]


# ---------------------------------------------------------------------------------------------------------------------
# Disks and folders


def in_child(function):
    """Run in a forked child -> (exit code, what it printed)."""
    with tempfile.TemporaryFile("w+") as output:
        pid = os.fork()
        if not pid:
            sys.stdout = sys.stderr = output
            code = 1
            try:
                function()
                code = 0
            except SystemExit as error:
                code = error.code
            except BaseException:
                traceback.print_exc()
            finally:
                output.flush()
                os._exit(code)
        status = os.waitpid(pid, 0)[1]
        output.seek(0)
        return os.waitstatus_to_exitcode(status), output.read()


def shell(**keys):
    """What `python train.py --run=...` does, without starting another interpreter."""
    words = [f"--{key}={str(value).lower() if value is True else value}" for key, value in keys.items()]
    sys.argv = ["train.py", *words]
    train.command(train.main, train.Config)


@pytest.mark.parametrize("limit, what", [
    (700_000, "runs/cut/resume/000006: cannot be written"), (200_000, "cannot be written"),
])  # fmt: skip
def test_files_that_may_not_grow(here, limit, what):
    """A quota hit while a state or a checkpoint is written: one line, exit 1, and what was there is still good."""
    stop_at(5)

    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        shell(run="cut", resume=True)

    code, printed = in_child(limited)
    assert code == 1 and re.search(f"^error: .*({what})", printed, re.M) and "Traceback" not in printed, printed
    assert resume.states(Path("runs/cut"))[0].name == "000004"
    assert not list(Path("runs/cut/resume").glob(".*"))
    train.main(run="cut", resume=True)
    faults.same("whole-ar", "cut")


def test_a_full_disk(here):
    """The same on a file system of 4 MB that really is full, at whatever write that happens first."""
    Path("small").mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "none", "small"]
    if os.geteuid() or not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        shutil.copytree("data/toy-1", "small/data/toy-1")
        os.chdir("small")
        code, printed = in_child(lambda: shell(run="cut", **KEYS))
        assert code == 1 and re.search("^error: .*No space left", printed, re.M) and "Traceback" not in printed, printed
        assert not list(Path("runs/cut").rglob("resume/.*"))  # half a state would only take room
        with pytest.raises(OSError), open("filler", "wb") as file:
            while True:
                file.write(bytes(4096))
                file.flush()
        code, printed = in_child(lambda: shell(run="cut", resume=True))
        said = [line for line in printed.splitlines() if line.startswith("error: ")]
        assert code == 1 and len(said) == 1 and "Traceback" not in printed, printed
        assert "cannot be written (No space left on device)" in said[0]
        shutil.copytree("runs/cut", here / "runs/cut", ignore=lambda folder, names: {"lock"} & set(names))
        os.chdir(here)
        train.main(run="cut", resume=True)
        faults.same("whole-ar", "cut")
    finally:
        os.chdir(here)
        subprocess.run(["umount", "small"], check=True)


def test_two_runs_in_one_folder(here):
    stop_at(5)
    with open("runs/cut/lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(InputError, match="runs/cut: another process is training this run right now"):
            train.main(run="cut", resume=True)
    train.main(run="cut", resume=True)  # whoever held it is gone
    faults.same("whole-ar", "cut")


def test_a_file_system_without_locks(here, monkeypatch):
    def no_locks(file, how):
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    message = r"runs/new: this file system cannot lock \(.* not supported\); --lock=false trains without"
    with pytest.raises(InputError, match=message):
        train.main(run="new", **KEYS)
    assert not Path("runs/new").exists()
    train.main(run="new", lock=False, **KEYS)
    Path("runs/new/lock").touch()  # which the other one has
    faults.same("whole-ar", "new")


def test_resuming_needs_no_weights_of_the_base_model(here):
    """They may have been cleared from a cache since: the state holds all that an update reads."""
    for student in ("qwen3_moe", "llada2"):
        shutil.copytree(STUDENTS[student]["model"], f"base-{student}")
        stop_at(5, run=student, model=f"base-{student}")
        Path(f"base-{student}/model.safetensors").unlink()
        train.main(run=student, resume=True)
        a, b = (load_file(f"runs/{run}/checkpoints/000009/model.safetensors") for run in (f"whole-{student}", student))
        assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_folders_that_cannot_be_written(here):
    """As root nothing is read-only, but /proc is, for anybody."""
    shutil.rmtree("runs")
    Path("runs").symlink_to("/proc")
    code, printed = in_child(lambda: shell(run="x", **KEYS))
    assert code == 1 and printed.startswith("error: ") and printed.count("\n") == 1, printed
    if os.geteuid():
        Path("runs").unlink()
        Path("runs").mkdir(mode=0o555)
        code, printed = in_child(lambda: shell(run="x", **KEYS))
        assert code == 1 and "Permission denied" in printed and printed.count("\n") == 1, printed


def test_a_state_of_another_student_is_no_state(here):
    """Only by hand can it get there; even so it is not read into the wrong tensors."""
    stop_at(5)
    shutil.rmtree("runs/cut/resume/000004")
    shutil.copytree("runs/whole-qwen3_moe/resume/000008", "runs/cut/resume/000008")
    with pytest.raises(InputError, match="log.jsonl: the line of step 6 is missing"):
        train.main(run="cut", resume=True)
    shutil.copytree("runs/whole-qwen3_moe/resume/000008", "runs/cut/resume/000004")
    manifest = read_json("runs/cut/resume/000004/manifest.json")
    write_json("runs/cut/resume/000004/manifest.json", {**manifest, "step": 4})
    shutil.rmtree("runs/cut/resume/000008")
    with pytest.raises(InputError, match="runs/cut/resume/000004: not a state of this student"):
        train.main(run="cut", resume=True)


def test_what_is_kept_is_all_that_an_update_reads(here):
    """AdamW's own state after load is that of an optimizer which made the updates."""
    student = model.load("data/toy-1/untrained")
    optimizer = train.make_optimizer(train.Config(), student)
    for step in range(3):
        for p in student.parameters():
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(step))
        optimizer.step()
    resume.save(Path("runs/one"), student, optimizer, 3, 1)
    other = model.load("data/toy-1/untrained")
    fresh = train.make_optimizer(train.Config(), other)
    resume.load(Path("runs/one"), 3, other, fresh)
    for p, q in zip(student.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q) and optimizer.state[p].keys() == fresh.state[q].keys()
        for key, value in optimizer.state[p].items():
            assert torch.equal(value, fresh.state[q][key]) and value.dtype == fresh.state[q][key].dtype
