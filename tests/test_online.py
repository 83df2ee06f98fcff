"""online.py: the rule, a pilot that ends by itself, both ways on from there, kills, and what it cost."""

import shutil
import statistics
from dataclasses import replace
from pathlib import Path

import false_alarms
import numpy as np
import pytest
from test_train import ROOT, SHORT, WORLD, log, torchrun

import batches
import data
import online
import train
import trajectory
from plumbing import resume
from plumbing.config import InputError, load_select, read_json

assert WORLD  # the world of test_train.py, which conftest.py makes for this file as well

# the accuracy of the student at each step: lowest at step 2, and behind it with step 4
FALL = (0.9, 0.5, 0.3, 0.6, 0.7, 0.8, 0.9, 0.9)
KEYS = SHORT | dict(steps=7, watch_every=1)


@pytest.fixture
def graded(here, monkeypatch):
    """Answers are right as often as FALL says, for every problem -> the calls [(step, problems)]."""
    calls = []

    def answer(run, step, problems, path):
        calls.append((step, len(problems)))
        if run.cfg.record_problems < 0:
            return None
        row = dict(sample=0, response="", extracted=None, truncated=False, thoughts="missing", n_tokens=5)
        row["correct"] = FALL[step]
        rows = [row | dict(id=one["id"]) for one in problems.examples]
        trajectory.write_rows(path, rows)
        kinds = ("truncated", "unparsed", "undecided", *(f"thoughts_{kind}" for kind in trajectory.evaluation.THOUGHTS))
        monkeypatch.setattr(trajectory.evaluation, "rates", lambda rows: dict.fromkeys(kinds, 0.0))
        return rows

    monkeypatch.setattr(trajectory, "answers", answer)
    return calls


def weights(run, step):
    return Path(f"runs/{run}/checkpoints/{step:06d}/model.safetensors").read_bytes()


# ---------------------------------------------------------------------------------------------------------------------
# The rule


def by_definition(watched):
    """`passed_bottleneck` once more, in sums of plain Python."""
    means = {step: statistics.fmean(values) for step, values in watched.items()}
    lowest = min(means, key=lambda step: (means[step], step))
    after = sorted(step for step in watched if step > lowest)
    if len(after) < 2:
        return None
    for step in (0, after[-2], after[-1]):
        differences = [float(a) - float(b) for a, b in zip(watched[step], watched[lowest], strict=True)]
        error = statistics.stdev(differences) / len(differences) ** 0.5
        if statistics.fmean(differences) <= 2 * error:
            return None
    return lowest


def test_the_rule_is_its_definition():
    rng = np.random.default_rng(0)
    found = []
    for _ in range(300):
        level = np.interp(range(8), [0, rng.integers(1, 7), 7], [0.7, rng.uniform(0.1, 0.7), rng.uniform(0.2, 0.7)])
        watched = {4 * i: rng.binomial(1, level[i], 40).astype(np.float32) for i in range(rng.integers(1, 9))}
        found.append(online.passed_bottleneck(watched))
        assert found[-1] == by_definition(watched)
    assert len(set(found)) > 3  # several steps, and None


def test_two_looks_above_the_lowest_are_needed_and_a_tie_is_the_earliest():
    watched = {step: np.full(5, value) for step, value in enumerate((0.9, 0.3, 0.3, 0.6))}
    assert online.passed_bottleneck(watched) is None  # step 2 lies not above step 1
    watched[4] = np.full(5, 0.6)
    assert online.passed_bottleneck(watched) == 1
    watched[5] = np.full(5, 0.2)  # the curve falls again: it was not the bottleneck
    assert online.passed_bottleneck(watched) is None


def test_what_is_watched_is_what_was_recorded(here):
    """Each problem's accuracy, of those that were asked; each example's fall of confidence, token by token."""
    train.main(run="sft", **SHORT | dict(record_every=2, samples=2, record_problems=4))
    train_set = data.load("data/toy-1/teacher")
    recorded = {step: np.load(f"runs/sft/trajectory/{step:06d}.npz") for step in (0, 2, 4)}
    accuracies = online.curve("sft", "accuracy", train_set)
    fallen = online.curve("sft", "label_free", train_set)
    for step, arrays in recorded.items():
        assert len(accuracies[step]) == 4 and accuracies[step].mean() == arrays["accuracy"]
        for i, (_, a, b) in enumerate(train_set.spans):
            changes = arrays["logprob"][a:b].astype(float) - recorded[0]["logprob"][a:b].astype(float)
            assert fallen[step][i] == pytest.approx(sum(min(0, change) for change in changes), abs=1e-12)
    assert fallen[4].mean() < 0


def test_false_alarms_are_rare_and_a_bottleneck_is_found_three_looks_later():
    """On simulated curves; tests/false_alarms.py prints the whole table."""
    rng = np.random.default_rng(1)
    for name, most in (("flat", 0.1), ("falling", 0.02), ("plateau", 0.1)):
        assert false_alarms.cell(rng, name, 100, 100)["ended"] <= most
    found = false_alarms.cell(rng, "turning", 200, 50)
    assert found["ended"] > 0.9 and found["early"] == 0 and found["looks"] < 3.3 and found["off"] < 0.4


# ---------------------------------------------------------------------------------------------------------------------
# One command


def test_online_is_a_shorter_pass_1_selection_and_pass_2(graded):
    """The same bytes as three commands with pass 1 run to its end, whose checkpoints up to there are the pilot's."""
    train.main(run="fast", online=True, **KEYS)
    assert [step for step, _ in graded] == [0, 1, 2, 3, 4]  # two looks behind the lowest, and none in pass 2
    assert read_json("runs/fast-pilot/selection/t3s/stats.json")["bottleneck_step"] == 2
    train.main(run="sft", record_every=1, **SHORT | dict(steps=7))
    assert losses("fast-pilot") == losses("sft")[:4]
    folder = load_select().main(run="sft", show=0)
    train.main(run="slow", selection=str(folder), record_every=0)
    assert weights("fast", 7) == weights("slow", 7)
    with pytest.raises(InputError, match="make their own selection; leave --selection out"):
        train.main(run="both", online=True, selection=str(folder))


def test_a_probe_selects_by_the_rule_that_was_asked_for(graded):
    train.main(run="fast", probe=2, rule="kinds", **KEYS)
    train.main(run="sft", record_every=1, **SHORT | dict(steps=7))
    folder = load_select().main(run="sft", rule="kinds", bottleneck="2", show=0)
    made = Path("runs/fast-probe/selection/kinds/mask.npy").read_bytes()
    assert made == (folder / "mask.npy").read_bytes()
    assert made != (load_select().main(run="sft", bottleneck="2", show=0) / "mask.npy").read_bytes()
    assert read_json("runs/fast/config.json")["config"]["selection"].endswith("selection/kinds")


def losses(run):
    return [line["loss"] for line in log(run) if "loss" in line]


def test_continue_goes_on_with_weights_and_optimizer_of_the_pilot(graded, monkeypatch):
    """Against one run whose loss loses the anchors from step 4 on, as if somebody had changed it meanwhile."""
    train.main(run="fast", online="continue", record_every=2, **KEYS)
    mask = np.load("runs/fast-pilot/selection/t3s/mask.npy")

    def changed(run, step):
        return batches.micro_batches(run if step < 4 else replace(run, selected=mask), step)

    monkeypatch.setattr(train, "micro_batches", changed)
    train.main(run="whole", **SHORT | dict(steps=7))
    assert weights("fast", 7) == weights("whole", 7)
    assert losses("fast") == losses("whole")
    # what the pilot recorded stays there; here the recordings begin where it stood
    assert [line["step"] for line in log("fast") if "event" in line] == [4, 6, 7]


@pytest.mark.parametrize("student, kind", [("data/toy-1/untrained", "keep"), ("llada", "force")])
def test_without_answers_nothing_is_sampled(graded, monkeypatch, student, kind):
    fallen = dict(enumerate([0.0, -2.0, -1.0, -0.5, -0.2, -0.1, 0.0, 0.0]))
    select = load_select()
    monkeypatch.setattr(select, "falls", lambda t, *_: {step: np.full(7, fallen[step]) for step in t})
    train.main(run="silent", online=True, watch="label_free", **KEYS | dict(model=student, max_new_tokens=4))
    stats = read_json("runs/silent-pilot/selection/t3s/stats.json")
    assert stats["bottleneck_step"] == 1 and stats["bottleneck_bootstrap"] is None
    assert read_json("runs/silent-pilot/selection/t3s/config.json")["kind"] == kind
    assert log("silent-pilot")[-1]["step"] == 3 and not list(Path("runs").glob("*/trajectory/*.jsonl"))


@pytest.mark.parametrize("rule, why", [("dft", "gives weights"), ("entropy_high", "needs entropy")])
def test_a_rule_that_a_diffusion_student_cannot_use_is_refused_before_pass_1(graded, rule, why):
    with pytest.raises(InputError, match=f"--rule={rule}: {why}"):
        train.main(run="masked", probe=2, rule=rule, **KEYS | dict(model="llada"))
    assert not list(Path("runs").glob("masked*"))


def test_a_pilot_without_a_bottleneck_is_kept_and_said(graded, monkeypatch):
    monkeypatch.setattr(online, "LOOKS", 9)
    with pytest.raises(InputError, match="by accuracy has passed in 7 steps .* nothing is selected") as error:
        train.main(run="none", online=True, **KEYS)
    assert "\n" not in str(error.value) and not Path("runs/none").exists()
    assert not Path("runs/none-pilot/selection").exists()
    # as the message says: it is an ordinary run
    assert load_select().main(run="none-pilot", bottleneck=3, show=0).exists()


# ---------------------------------------------------------------------------------------------------------------------
# Killed


class Killed(Exception):
    pass


@pytest.mark.parametrize("way", ["true", "continue"])
def test_killed_in_any_stage_and_resumed_it_is_never_interrupted(graded, monkeypatch, way):
    """In the pilot, behind its last look, in the selection, the fork, pass 2: the same bytes in the end."""
    keys = KEYS | dict(online=way, resume_every=2)
    train.main(run="whole", **keys)
    done = []

    def kill_at(module, name, nth, after=False):
        function = getattr(module, name)
        calls = iter(range(1, 99))

        def fall(*given, **more):
            number = next(calls)
            result = function(*given, **more) if after or number != nth else None
            if number == nth:
                raise Killed(name)
            return result

        with monkeypatch.context() as once:
            once.setattr(module, name, fall)
            with pytest.raises(Killed):
                train.main(run="cut", resume=True, **keys)
        done.append(name)

    select = load_select()
    kill_at(train, "train_step", 3)
    kill_at(trajectory, "write_record", 2, after=True)
    kill_at(train, "save_checkpoint", 1, after=True)
    kill_at(select, "main", 1)
    kill_at(select, "main", 1, after=True)
    if way == "continue":
        kill_at(resume, "fork", 1)
        kill_at(shutil, "copytree", 1, after=True)
        kill_at(resume, "write_config", 1)
    kill_at(train, "train_step", 2)
    train.main(run="cut", resume=True, **keys)
    for one, other in (("cut", "whole"), ("cut-pilot", "whole-pilot")):
        last = log(other)[-1]["step"]
        assert weights(one, last) == weights(other, last)
        assert losses(one) == losses(other)
    assert np.array_equal(*(np.load(f"runs/{run}-pilot/selection/t3s/mask.npy") for run in ("cut", "whole")))
    # finished, it does nothing again, whether asked with all keys or with the run's name alone
    before = Path("runs/cut-pilot/log.jsonl").read_bytes(), Path("runs/cut/log.jsonl").read_bytes()
    train.main(run="cut", resume=True)
    train.main(run="cut", resume=True, **keys)
    assert before == (Path("runs/cut-pilot/log.jsonl").read_bytes(), Path("runs/cut/log.jsonl").read_bytes())


# ---------------------------------------------------------------------------------------------------------------------
# What it cost


@pytest.mark.parametrize("way", ["true", "continue"])
def test_the_costs_are_those_of_the_commands_themselves(graded, way, capsys):
    """Against numbers counted by hand: the whole set is one batch, and an answer is five tokens."""
    keys = SHORT | dict(steps=7, batch_size=0)
    train.main(run="t3s", online=way, watch_every=1, record_every=3, **keys)
    last = capsys.readouterr().out.splitlines()[-2:]
    n = len(data.load("data/toy-1/teacher").tokens)
    answers = 7 * 5
    # pilot: 4 updates, 5 looks; pass 2: 0, a copy of the pilot's, 3, 6 and 7, or what follows step 4
    updates, looks = (4 + 7, 5 + 3) if way == "true" else (7, 5 + 2)
    offline = 8 + (3 if way == "true" else 4)  # without a step 0 it is not known that it can be copied
    cfg = train.Config(**read_json("runs/t3s/config.json")["config"])
    found = online.costs(cfg)
    assert found["online"] == dict(trained=updates * n, scored=looks * n, sampled=looks * answers)
    assert found["offline"] == dict(trained=14 * n, scored=offline * n, sampled=offline * answers)
    numbers = [[int(word.replace(",", "")) for word in line.split()[-4:]] for line in last]
    for line, key in zip(numbers, found, strict=True):
        assert line == [*found[key].values(), sum(found[key].values())]


# ---------------------------------------------------------------------------------------------------------------------
# Several processes


def test_two_processes_end_and_go_on_where_one_does(here):
    """A real curve: the shipped student, whose confidence falls at once and comes back at this learning rate."""
    keys = SHORT | dict(model=str(ROOT / "students/toy-1"), batch_size=0, lr=2e-3, schedule="constant", steps=8)
    keys |= dict(online="continue", watch="label_free", watch_every=1)
    train.main(run="one", **keys)
    out = torchrun(2, run="two", **keys).stdout
    ended = log("one-pilot")[-1]["step"]
    assert 2 < ended < 8 and log("two-pilot")[-1]["step"] == ended
    assert out.count(f"pass 1 ends at step {ended}") == 1 and out.count("this command") == 1
    assert losses("two") == pytest.approx(losses("one"), rel=1e-4)
