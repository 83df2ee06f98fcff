"""trajectory.py: answers that are kept, accuracy on some problems, step 0 of pass 1, kept and dropped tokens apart."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from asking import lines
from worlds import KEYS

import data
import model
import sample
import train
import trajectory
from hf.tokenizer import load_tokenizer
from plumbing.config import load_select, read_json
from verify import judge

WORLD = dict(students=("llada",))
SHORT = KEYS | dict(steps=2, record_every=2, resume_every=0, save_every=0)


def log(run):
    return lines(f"runs/{run}/log.jsonl")


def test_the_sampled_answers_are_kept_with_their_grades(here):
    """As sample.py gives them for the checkpoint, in the order of the problems."""
    train.main(run="sft", samples=2, **SHORT)
    for name, problems in (("", "teacher"), (".eval", "unseen")):
        rows = lines(f"runs/sft/trajectory/000002{name}.jsonl")
        asked = data.load(f"data/toy-1/{problems}")
        student = model.load("runs/sft/checkpoints/000002")
        tokenizer = load_tokenizer("data/toy-1/untrained")
        names = [f"{example['id']} {n}" for example in asked.examples for n in range(2)]
        prompts = [asked.prompt(i).tolist() for i in range(len(asked)) for _ in range(2)]
        ends = {*student.config.eos_token_ids, tokenizer.eos_token_id, tokenizer.end_of_turn_id}
        sampling = sample.Sampling(max_new_tokens=8)
        ids = sample.sample(
            student,
            prompts,
            sampling,
            example_ids=names,
            eos_ids=ends,
            vocab_size=tokenizer.vocab_size,
        )
        assert [f"{row['id']} {row['sample']}" for row in rows] == names
        assert [row["response"] for row in rows] == [tokenizer.decode(answer) for answer in ids]
        for row, answer in zip(rows, ids, strict=True):
            assert row["truncated"] == (len(answer) == 8)
            assert row["correct"] == judge(row["response"], row["answer"], "toy", False)["correct"]
    line = log("sft")[-1]
    rows = lines("runs/sft/trajectory/000002.jsonl")
    assert line["accuracy"] == np.mean([row["correct"] for row in rows])
    assert line["answers"]["truncated"] == np.mean([row["truncated"] for row in rows])


def test_accuracy_on_some_of_the_problems(here):
    train.main(run="all", **SHORT)
    train.main(run="some", record_problems=4, **SHORT)
    train.main(run="none", record_problems=-1, **SHORT)
    everything = {row["id"]: row for row in lines("runs/all/trajectory/000000.jsonl")}
    asked = [[row["id"] for row in lines(f"runs/some/trajectory/00000{n}.jsonl")] for n in (0, 2)]
    assert len(asked[0]) == 4 and asked[0] == asked[1]  # the same in every recording
    for row in lines("runs/some/trajectory/000000.jsonl"):
        assert row == everything[row["id"]]
    recorded = np.load("runs/some/trajectory/000002.npz")
    assert np.isfinite(recorded["correct"]).sum() == 4
    whole = np.load("runs/all/trajectory/000002.npz")
    assert np.array_equal(recorded["logprob"], whole["logprob"], equal_nan=True)
    assert [line["accuracy"] for line in log("none") if "event" in line] == [None, None]
    assert not list(Path("runs/none/trajectory").glob("*.jsonl"))


def selected(share=0.5):
    """Pass 1 and a selection -> its folder."""
    train.main(run="sft", **SHORT)
    return load_select().main(run="sft", bottleneck="2", share=share, show=0)


def test_step_0_of_pass_1_is_taken_over(here, monkeypatch, capsys):
    folder = selected()
    scored = []
    score = trajectory.score
    monkeypatch.setattr(trajectory, "score", lambda run, rows: scored.append(rows) or score(run, rows))
    train.main(run="t3s", selection=str(folder), lr=1e-4)
    assert len(scored) == 5  # of step 2 only: 9 examples, 2 in a pass
    assert "step 0 was recorded by runs/sft: the same student, data and sampling" in capsys.readouterr().out
    for name in ("000000.npz", "000000.jsonl", "000000.eval.jsonl"):
        a, b = (Path(f"runs/{run}/trajectory/{name}") for run in ("sft", "t3s"))
        assert a.read_bytes() == b.read_bytes()
    first, again = log("sft")[0], log("t3s")[0]
    assert {key: again[key] for key in first if key != "seconds"} == {k: v for k, v in first.items() if k != "seconds"}


@pytest.mark.parametrize("change", ["seed", "samples", "weights", "damaged"])
def test_what_pass_1_did_not_record_is_recorded(here, monkeypatch, change):
    """Other sampling, another student under the same shape, a damaged file: nothing is taken over."""
    shutil.copytree("data/toy-1/untrained", "mine")
    train.main(run="sft", **SHORT | dict(model="mine"))
    folder = load_select().main(run="sft", bottleneck="2", rule="all", show=0)
    keys = {"seed": dict(seed=1), "samples": dict(samples=2)}.get(change, {})
    if change == "weights":
        model.save(model.load("runs/sft/checkpoints/000002"), "mine", "theirs")
        shutil.copyfile("theirs/model.safetensors", "mine/model.safetensors")
        keys = dict(allow_changes=True)
    if change == "damaged":
        Path("runs/sft/trajectory/000000.npz").write_bytes(b"PK")
        monkeypatch.setattr(train, "of_pass_1", lambda given, cls: {})
        keys = SHORT | dict(model="mine")
    scored = []
    score = trajectory.score
    monkeypatch.setattr(trajectory, "score", lambda run, rows: scored.append(rows) or score(run, rows))
    train.main(run="again", selection=str(folder), **keys)
    assert len(scored) == 10


def test_kept_and_dropped_tokens_are_recorded_apart(here, capsys):
    folder = selected()
    mask = np.load(folder / "mask.npy")
    response = data.load("data/toy-1/teacher").response_mask()
    train.main(run="t3s", selection=str(folder))
    for line in (line for line in log("t3s") if "event" in line):
        logprob = np.load(f"runs/t3s/trajectory/{line['step']:06d}.npz")["logprob"]
        assert line["nll_kept"] == pytest.approx(-logprob[mask].mean(), rel=1e-5)
        assert line["nll_dropped"] == pytest.approx(-logprob[response & ~mask].mean(), rel=1e-5)
    printed = capsys.readouterr().out
    assert f"kept {line['nll_kept']:.3f} | dropped {line['nll_dropped']:.3f}" in printed
    assert "almost nothing to learn" not in printed


def test_a_selection_of_what_is_known_already_is_said(here, capsys):
    """Kept: the single token that the student is surest of, once it was trained."""
    train.main(run="sft", **SHORT | dict(steps=60, record_every=60, lr=1e-2, batch_size=0))
    folder = load_select().main(run="sft", rule="all", bottleneck="60", show=0)
    logprob = np.load("runs/sft/trajectory/000060.npz")["logprob"]
    sure = np.nan_to_num(logprob, nan=-np.inf) > -0.05
    assert sure.any()
    np.save(folder / "mask.npy", sure)
    capsys.readouterr()
    # another student than pass 1's: train.py asks whether that is meant
    known = dict(model="runs/sft/checkpoints/000060", allow_changes=True)
    train.main(run="t3s", selection=str(folder), steps=1, record_every=1, **known)
    printed = capsys.readouterr().out
    assert "warning: the tokens that stay in the loss have an NLL of only 0.0" in printed


def test_a_probe_is_pass_1_selection_and_pass_2_in_one_command(here):
    """The same as three commands; and resumed, it does nothing twice."""
    keys = SHORT | dict(steps=3, record_every=3)
    train.main(run="fast", probe=2, **keys)
    short = dict(steps=2, record_every=2, record_problems=-1, schedule="constant", eval_data="")
    train.main(run="pilot", **keys | short)
    folder = load_select().main(run="pilot", bottleneck="2", show=0)
    assert np.array_equal(np.load(folder / "mask.npy"), np.load("runs/fast-probe/selection/t3s/mask.npy"))
    train.main(run="slow", selection=str(folder), **keys | dict(schedule="cosine", record_problems=0))
    a, b = (Path(f"runs/{run}/checkpoints/000003/model.safetensors") for run in ("fast", "slow"))
    assert a.read_bytes() == b.read_bytes()
    before = Path("runs/fast-probe/log.jsonl").read_bytes()
    train.main(run="fast", resume=True)
    assert Path("runs/fast-probe/log.jsonl").read_bytes() == before
    assert read_json("runs/fast/config.json")["config"]["selection"] == "runs/fast-probe/selection/t3s"


@pytest.mark.parametrize("packing", [False, True])
def test_entropy_is_recorded_beside_confidence(here, packing):
    """Against float64 on the checkpoint's logits, one example at a time; selections can ask for it."""
    keys = SHORT | dict(eval_data="", packing=packing)
    train.main(run="sft", **keys)
    train_set = data.load("data/toy-1/teacher")
    student = model.load("runs/sft/checkpoints/000002")
    recorded = np.load("runs/sft/trajectory/000002.npz")
    response = train_set.response_mask()
    assert np.isnan(recorded["entropy"][~response]).all()
    for start, prompt_end, end in train_set.spans:
        ids = torch.as_tensor(train_set.tokens[start:end].astype(np.int64))[None]
        with torch.no_grad():
            logp = student(ids)[0].double().log_softmax(-1)
        exact = -(logp.exp() * logp).sum(-1)[prompt_end - start - 1 : -1].numpy()
        assert recorded["entropy"][prompt_end:end] == pytest.approx(exact, abs=1e-5)
        own = logp[:-1].gather(1, ids[0, 1:, None])[prompt_end - start - 1 :, 0].numpy()
        assert recorded["logprob"][prompt_end:end] == pytest.approx(own, abs=1e-5)
    folder = load_select().main(run="sft", bottleneck=2, rule="entropy_high", share=0.2, show=0)
    chosen = np.load(folder / "mask.npy")
    entropy = recorded["entropy"]
    assert entropy[response & ~chosen].min() >= entropy[response & chosen].max()


def test_a_diffusion_student_has_confidence_only(here):
    train.main(run="dllm", **SHORT | dict(model="llada", eval_data="", steps=1, record_every=1, max_new_tokens=4))
    assert "entropy" not in np.load("runs/dllm/trajectory/000001.npz")


def test_a_finished_answer_makes_room_for_the_next_while_recording(here, monkeypatch):
    """Continuous batching reaches over the batch size: fewer forward passes, and the same answers."""
    passes = []
    step = sample.Rows.step
    monkeypatch.setattr(sample.Rows, "step", lambda self, token: passes.append(len(token)) or step(self, token))
    student = str(Path(train.__file__).parent / "students/toy-1")
    taken = {}
    for fillings in (1, 4):
        monkeypatch.setattr(trajectory, "FILLINGS", fillings)
        keys = SHORT | dict(model=student, max_new_tokens=40, sample_batch_size=4, steps=1)
        train.main(run=f"x{fillings}", **keys | dict(record_every=1, eval_data=""))
        taken[fillings] = len(passes), Path(f"runs/x{fillings}/trajectory/000000.jsonl").read_bytes()
        passes.clear()
    assert taken[4][0] < taken[1][0] and taken[4][1] == taken[1][1]
