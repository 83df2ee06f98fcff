"""mechanism.py against autograd by brute force: one token at a time, in float64."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from worlds import inside, make_world

import eval as evaluation
import mechanism
import train
from plumbing.config import InputError, load_select

ROOT = Path(__file__).parent.parent
KEYS = dict(batch_size=0, micro_batch_size=3, lr=2e-3, schedule="constant", max_new_tokens=40, steps=4)
RECORDED = dict(record_every=2, save_every=2)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Runs of student 1 and of its diffusion twin, recorded and kept at steps 0, 2 and 4."""
    folder = make_world(tmp_path_factory.mktemp("world"), teacher=5, unseen=6, cut=None, students=())
    with inside(folder):
        keys = KEYS | RECORDED | dict(data="data/toy-1/teacher", eval_data="data/toy-1/unseen")
        train.main(run="sft", model=str(ROOT / "students/toy-1"), **keys)
        train.main(run="masked", model=str(ROOT / "students/toy-diffusion-1"), **keys)
    return folder


def pass1_of(run, **keys):
    return mechanism.read_run(mechanism.Config(run=run, bottleneck="2", device="cpu", **keys))


def exact_gradients(pass1, step, groups):
    """Of an autoregressive student: the gradient of every token's NLL in float64, summed by group."""
    mechanism.load_step(pass1, step)
    student, train_set = pass1.run.student.double(), pass1.run.train_set
    parameters = list(student.parameters())
    sums = [torch.zeros(sum(p.numel() for p in parameters), dtype=torch.float64) for _ in groups]
    n = int(train_set.response_mask().sum())
    for start, prompt_end, end in train_set.spans:
        ids = torch.as_tensor(train_set.tokens[start:end].astype(np.int64))
        logprob = student(ids[None]).double().log_softmax(-1)[0]
        for t in range(prompt_end, end):
            nll = -logprob[t - start - 1, ids[t - start]] / n
            parts = torch.autograd.grad(nll, parameters, retain_graph=True)
            flat = torch.cat([part.flatten() for part in parts])
            for group, total in zip(groups, sums, strict=True):
                total += flat * bool(group[t])
    return sums


def test_norms_and_cosine_are_those_of_the_tokens_one_by_one(here):
    found = mechanism.main(run="sft", bottleneck="2", what="gradients", device="cpu")["gradients"]
    assert found["steps"] == [0, 2, 4]
    pass1 = pass1_of("sft")
    groups = mechanism.anchors_and_others(pass1)
    size = [group.sum() for group in groups]
    for i, step in enumerate(found["steps"]):
        ours, theirs = exact_gradients(pass1, step, groups)
        ratio = float(ours.norm() / theirs.norm())
        assert found["ratio"][i] == pytest.approx(ratio, rel=1e-4)
        assert found["ratio_a_token"][i] == pytest.approx(ratio * size[1] / size[0], rel=1e-4)
        cosine = float(ours @ theirs / ours.norm() / theirs.norm())
        assert found["cosine"][i] == pytest.approx(cosine, abs=1e-4)


@pytest.mark.parametrize("run", ["sft", "masked"])
def test_the_parts_of_the_groups_add_up_to_the_gradient_of_a_step(here, run):
    """A diffusion student's noise is the same for every group, and its pads are in none."""
    pass1 = pass1_of(run, draws=2)
    mechanism.load_step(pass1, 0)
    student = pass1.run.student
    response = pass1.run.train_set.response_mask()
    every = [response & (pass1.delta > 0.1), response & ~(pass1.delta > 0.1)]
    parts = mechanism.gradients(pass1, every)
    batches = mechanism.batches_of(pass1, every)
    count = sum(batch["count"] for batch, _ in batches)
    for batch, members in batches:
        in_a_group = members.any(0)
        assert not (members[0] & members[1]).any()
        scored = batch["targets"] != -100
        assert (in_a_group <= scored).all() and ((in_a_group == scored).all() or run == "masked")
        (mechanism.weighted_nll(student, batch) * in_a_group).sum().div(count).backward()
    for parameter, *own in zip(student.parameters(), *parts, strict=True):
        assert torch.allclose(sum(own), parameter.grad, atol=1e-6)


def test_the_share_below_the_base_is_counted_over_response_tokens(here):
    found = mechanism.main(run="sft", bottleneck="2", what="confidence")["confidence"]
    tracks = {step: np.load(f"runs/sft/trajectory/{step:06d}.npz")["logprob"] for step in (0, 2, 4)}
    for step, share in zip(found["steps"], found["below_base"], strict=True):
        both = [(now, start) for now, start in zip(tracks[step], tracks[0], strict=True) if not math.isnan(now)]
        assert share == pytest.approx(sum(now < start for now, start in both) / len(both))
    assert json.loads(Path("runs/sft/mechanism.json").read_text())["confidence"] == found


@pytest.mark.parametrize("keys, words", [
    (dict(run=""), "--run is missing"),
    (dict(what="gradient"), "--what=gradient: must be of confidence, gradients"),
    (dict(bottleneck="3"), "recorded were 0, 2, 4"),
    (dict(tau=99.0), "there are no anchors, or nothing but anchors"),
])  # fmt: skip
def test_what_cannot_work_is_one_line(here, keys, words):
    with pytest.raises(InputError, match=words) as error:
        mechanism.main(**dict(run="sft", bottleneck="2") | keys)
    assert "\n" not in str(error.value)


def test_checkpoints_that_were_not_kept_are_asked_for(here):
    keys = dict(data="data/toy-1/teacher", model=str(ROOT / "students/toy-1"), record_every=1)
    train.main(run="few", **KEYS | keys)
    with pytest.raises(InputError, match="step [0-9] was recorded and its checkpoint not kept .*--save_every"):
        mechanism.main(run="few", bottleneck="2")


# --------------------------------------------------------------------------------------------------
# Updates


def mean_loss(student, train_set, group):
    """The mean NLL of a group of tokens, from the logits of one example at a time."""
    total = 0.0
    for start, prompt_end, end in train_set.spans:
        ids = torch.as_tensor(train_set.tokens[start:end].astype(np.int64))
        logprob = student(ids[None]).log_softmax(-1)[0]
        for t in np.flatnonzero(group[prompt_end:end]) + prompt_end:
            total = total - logprob[t - start - 1, ids[t - start]]
    return total / int(group.sum())


def test_the_transfer_matrix_is_that_of_plain_adamw_on_one_group(here):
    """Its diagonal and the rest, against a loop over tokens and torch's own AdamW."""
    pass1 = pass1_of("sft", groups=3, updates=2)
    found = mechanism.transfer_by_delta(pass1)
    response = np.flatnonzero(pass1.run.train_set.response_mask())
    ranks = np.argsort(np.argsort(pass1.delta[response], kind="stable"))
    groups = np.zeros((3, len(pass1.delta)), dtype=bool)
    groups[np.searchsorted(-(-len(response) * np.array([1, 2]) // 3), ranks, side="right"), response] = True
    assert abs(groups.sum(1) - len(response) / 3).max() <= 1
    before = None
    for i, row in enumerate(found["changes"]):
        mechanism.load_step(pass1, 0)
        student = pass1.run.student
        optimizer = torch.optim.AdamW(student.parameters(), lr=2e-3, weight_decay=0.0)
        with torch.no_grad():
            before = [float(mean_loss(student, pass1.run.train_set, group)) for group in groups]
        for _ in range(2):
            optimizer.zero_grad()
            mean_loss(student, pass1.run.train_set, groups[i]).backward()
            torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
            optimizer.step()
        with torch.no_grad():
            after = [float(mean_loss(student, pass1.run.train_set, group)) for group in groups]
        assert row == pytest.approx(np.subtract(after, before), rel=2e-2, abs=1e-3)
    assert found["mean_delta"] == pytest.approx([pass1.delta[group].mean() for group in groups], abs=1e-6)


def test_an_intervention_is_a_transfer_between_anchors_and_others(here):
    pass1 = pass1_of("sft")
    found = mechanism.interventions(pass1)
    groups = mechanism.anchors_and_others(pass1)
    for i, step in enumerate(found["steps"]):
        mechanism.load_step(pass1, step)
        (own, other), (back, theirs) = mechanism.transfer(pass1, groups, updates=1)
        assert found["anchors_by_anchors"][i] == own and found["others_by_anchors"][i] == other
        assert found["anchors_by_others"][i] == back and found["others_by_others"][i] == theirs
    assert own < 0  # the update on the anchors lowers their own loss


# --------------------------------------------------------------------------------------------------
# RRT


def test_at_s_1_the_path_goes_through_the_model_of_rrt(here, monkeypatch):
    pass1 = pass1_of("sft")
    seen = []
    real = mechanism.evaluate

    def evaluate(run):
        seen.append({name: value.clone() for name, value in run.student.state_dict().items()})
        return real(run)

    monkeypatch.setattr(mechanism, "evaluate", evaluate)
    found = mechanism.rrt_path(pass1)
    folder = load_select().main(run="sft", rule="rrt", bottleneck="2")
    rrt = seen[found["s"].index(1.0)]
    for name, value in load_weights(folder).items():
        assert torch.allclose(rrt[name], value, atol=1e-6)
    results = evaluation.main(model=str(folder), data="data/toy-1/unseen", max_new_tokens=40, device="cpu")
    [(summary, _)] = results.values()
    assert found["accuracy"][found["s"].index(1.0)] == summary["accuracy"]

    base, low, last = (load_weights(path) for path in checkpoints(pass1.run))
    damage = torch.cat([(low[name] - base[name]).flatten().double() for name in base])
    recovery = torch.cat([(last[name] - low[name]).flatten().double() for name in base])
    assert found["projection"] == pytest.approx(float(recovery @ damage / (damage @ damage)), rel=1e-6)
    cosine = float(recovery @ damage / damage.norm() / recovery.norm())
    assert found["cosine"] == pytest.approx(cosine, rel=1e-6)


def checkpoints(run):
    return [ROOT / "students/toy-1", run.folder / "checkpoints/000002", run.folder / "checkpoints/000004"]


def load_weights(folder):
    return load_file(Path(folder) / "model.safetensors")


# --------------------------------------------------------------------------------------------------
# The command


@pytest.mark.parametrize("run", ["sft", "masked"])
def test_both_kinds_of_student_give_all_measures_and_a_picture(here, run, capsys):
    found = mechanism.main(run=run, bottleneck="2", draws=1, device="cpu")
    assert json.loads(Path(f"runs/{run}/mechanism.json").read_text()) == found
    assert list(found) == ["bottleneck_step", "tau", *mechanism.MEASURES]
    assert Path(f"runs/{run}/mechanism.png").read_bytes().startswith(b"\x89PNG")
    out = capsys.readouterr().out
    for name in mechanism.MEASURES:
        assert f"\n{name}\n" in out
    assert all(value > 0 for value in found["gradients"]["ratio"])
