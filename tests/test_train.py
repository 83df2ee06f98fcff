"""train.py: one update against plain float64 code, the pipeline's identities, what stops a run and what it leaves."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import batches
import data
import diffusion
import model
import train
import trajectory
from hf import families
from plumbing import parallel, resume, runs, screen
from plumbing.config import InputError, load_select, read_json

ROOT = Path(__file__).parent.parent
N = 7  # training examples
SHORT = dict(model="data/toy-1/untrained", data="data/toy-1/teacher", steps=4, batch_size=4, micro_batch_size=3,
             lr=1e-3, max_new_tokens=8, device="cpu")  # fmt: skip


WORLD = dict(teacher=N, cut=7)


def log(run):
    return [json.loads(line) for line in Path(f"runs/{run}/log.jsonl").read_text().splitlines()]


def losses(run):
    return [line["loss"] for line in log(run) if "loss" in line]


def weights(run, step):
    return load_file(f"runs/{run}/checkpoints/{step:06d}/model.safetensors")


# ---------------------------------------------------------------------------------------------------------------------
# The update


def brute_force_nll(student, train_set, examples, mask=None):
    """Sum of the weighted NLL of the response tokens, one token at a time, and of the weights."""
    total, count = 0.0, 0
    for i in examples:
        start, prompt_end, end = train_set.spans[i]
        ids = torch.tensor(train_set.tokens[start:end].astype(np.int64))[None]
        logp = F.log_softmax(student(ids)[0], -1)
        for t in range(prompt_end, end):
            weight = 1 if mask is None else float(mask[t])
            total = total - weight * logp[t - start - 1, ids[0, t - start]]
            count += weight
    return total, count


def test_two_updates_against_plain_code(here):
    """Loss, gradient norm and weights of clipped AdamW, float32 against float64, over two uneven micro-batches."""
    keys = SHORT | dict(steps=2, weight_decay=0.1, clip=0.5, warmup_steps=1, schedule="constant", seed=3)
    train.main(run="short", **keys)
    train_set = data.load("data/toy-1/teacher")
    student = model.load("data/toy-1/untrained", dtype=torch.float64)
    decayed = [p for p in student.parameters() if p.dim() > 1]
    others = [p for p in student.parameters() if p.dim() <= 1]
    optimizer = torch.optim.AdamW([{"params": decayed}, {"params": others, "weight_decay": 0.0}], lr=1e-3,
                                  betas=(0.9, 0.999), weight_decay=0.1)  # fmt: skip
    for step, line in enumerate(log("short")):
        total, count = brute_force_nll(student, train_set, batches.step_examples(N, 4, step, 3))
        optimizer.zero_grad()
        (total / count).backward()
        norm = torch.nn.utils.clip_grad_norm_(student.parameters(), 0.5)
        optimizer.step()
        assert line["step"] == step + 1 and line["supervised"] == count
        assert line["loss"] == pytest.approx((total / count).item(), abs=1e-5)
        assert line["grad_norm"] == pytest.approx(norm.item(), rel=1e-4) and norm > 0.5
    saved = weights("short", 2)
    for name, p in student.named_parameters():
        off = (saved[name] - p.float()).abs()  # AdamW divides by |gradient|: where that is near 0, rounding shows
        assert (off > 1e-6).float().mean() < 2e-3 and off.max() < 2e-3, name


def test_updates_of_plain_sgd_against_plain_code(here):
    train.main(run="sgd", **SHORT | dict(steps=2, optimizer="sgd", lr=0.3, clip=0.5, schedule="constant", seed=3))
    train_set = data.load("data/toy-1/teacher")
    student = model.load("data/toy-1/untrained", dtype=torch.float64)
    for step in range(2):
        total, count = brute_force_nll(student, train_set, batches.step_examples(N, 4, step, 3))
        gradients = torch.autograd.grad(total / count, list(student.parameters()))
        norm = torch.cat([g.flatten() for g in gradients]).norm()
        with torch.no_grad():
            for p, g in zip(student.parameters(), gradients, strict=True):
                p -= 0.3 * min(1.0, 0.5 / norm) * g
    saved = weights("sgd", 2)
    for name, p in student.named_parameters():
        assert torch.allclose(saved[name], p.float(), atol=1e-5), name


@pytest.mark.parametrize("micro_batch_size", [1, 2, 50])
def test_micro_batches_change_nothing(here, micro_batch_size):
    train.main(run="one", **SHORT | dict(micro_batch_size=3))
    train.main(run="two", **SHORT | dict(micro_batch_size=micro_batch_size))
    for a, b in zip(log("one"), log("two"), strict=True):
        assert b["loss"] == pytest.approx(a["loss"], abs=1e-5)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-4)
        assert a["tokens"] == b["tokens"] and a["supervised"] == b["supervised"]


def test_schedules():
    at = lambda step, **keys: train.learning_rate(train.Config(lr=2.0, steps=10, **keys), step)  # noqa: E731
    assert [at(s, warmup_steps=4, schedule="constant") for s in range(6)] == [0.5, 1.0, 1.5, 2.0, 2.0, 2.0]
    assert at(0) == 2.0 and at(5) == pytest.approx(1.0) and at(10) == pytest.approx(0.0)
    assert at(7, warmup_steps=4) == pytest.approx(1.0)  # half of what is left after the warm-up


def test_batch_size_0_is_the_whole_set(here):
    train.main(run="full", **SHORT | dict(batch_size=0, steps=1))
    train_set = data.load("data/toy-1/teacher")
    assert log("full")[0]["supervised"] == train_set.response_mask().sum()
    total, count = brute_force_nll(model.load("data/toy-1/untrained"), train_set, range(N))
    assert losses("full")[0] == pytest.approx(total.item() / count, abs=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# Two passes


def sft(**keys):
    train.main(run="sft", eval_data="data/toy-1/unseen", record_every=2, **SHORT | keys)


def test_a_selection_that_keeps_everything_reproduces_pass_1_bit_for_bit(here):
    sft()
    folder = load_select().main(run="sft", rule="all", bottleneck=2, show=0)
    train.main(run="again", selection=str(folder))
    for a, b in zip(log("sft"), log("again"), strict=True):
        assert {**a, "seconds": 0} == {**b, "seconds": 0}
    for step in (0, 2, 4):
        a, b = (np.load(f"runs/{run}/trajectory/{step:06d}.npz") for run in ("sft", "again"))
        assert all(np.array_equal(a[key], b[key], equal_nan=a[key].dtype.kind == "f") for key in a)
    a, b = (Path(f"runs/{run}/checkpoints/000004/model.safetensors").read_bytes() for run in ("sft", "again"))
    assert a == b


def test_dropped_tokens_leave_loss_and_normaliser(here):
    sft()
    folder = load_select().main(run="sft", bottleneck=4, share=0.5, show=0)
    train_set = data.load("data/toy-1/teacher")
    mask = np.load(folder / "mask.npy")
    assert 0 < mask.sum() < train_set.response_mask().sum()
    train.main(run="t3s", selection=str(folder))
    chosen = batches.step_examples(N, 4, 0, 0)
    total, count = brute_force_nll(model.load("data/toy-1/untrained"), train_set, chosen, mask)
    line = next(line for line in log("t3s") if "loss" in line)
    assert line["loss"] == pytest.approx(total.item() / count, abs=1e-5) and line["supervised"] == count
    # what is recorded is every response token all the same
    assert np.isfinite(np.load("runs/t3s/trajectory/000004.npz")["logprob"][train_set.response_mask()]).all()


def test_weights_count_in_the_loss_and_in_its_normaliser(here):
    sft()
    folder = load_select().main(run="sft", rule="all", bottleneck=2, show=0)
    mask = np.load(folder / "mask.npy")
    weights = (mask * np.random.default_rng(0).random(len(mask)) * 2).astype(np.float32)
    weights[weights < 0.5] = 0
    np.save(folder / "mask.npy", weights)
    train.main(run="weighted", selection=str(folder), packing=True, record_every=0)
    chosen = batches.step_examples(N, 4, 0, 0)
    student = model.load("data/toy-1/untrained", dtype=torch.float64)
    total, count = brute_force_nll(student, data.load("data/toy-1/teacher"), chosen, weights)
    (total / count).backward()
    norm = torch.stack([p.grad.norm() for p in student.parameters()]).norm()
    line = log("weighted")[0]
    assert line["loss"] == pytest.approx(total.item() / count, abs=1e-5)
    assert line["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)


def test_pass_2_inherits_and_prints_what_differs(here, capsys):
    sft(weight_decay=0.25, seed=5)
    folder = load_select().main(run="sft", rule="all", bottleneck=2, show=0)
    capsys.readouterr()
    train.main(run="more", selection=str(folder), lr=5e-4, seed=5)
    printed = capsys.readouterr().out
    assert "differs from pass 1: lr = 0.0005 (pass 1: 0.001)" in printed and printed.count("differs from") == 1
    first, second = (read_json(f"runs/{run}/config.json")["config"] for run in ("sft", "more"))
    assert {k for k in first if first[k] != second[k]} == {"run", "selection", "lr"}
    assert "= 100.0% stay in the loss" in printed


def test_an_example_of_which_nothing_is_kept(here):
    """Its micro-batch counts 0 tokens; a step made of such examples only has loss 0 and moves nothing."""
    sft(micro_batch_size=1)
    folder = load_select().main(run="sft", rule="all", bottleneck=2, show=0)
    mask, spans = np.load(folder / "mask.npy"), data.load("data/toy-1/teacher").spans
    chosen = batches.step_examples(N, 2, 0, 0)
    for i in chosen:
        mask[spans[i, 0] : spans[i, 2]] = False
    np.save(folder / "mask.npy", mask)
    train.main(run="none", selection=str(folder), batch_size=2, steps=1, record_every=0)
    line = log("none")[0]
    assert line["loss"] == 0 and line["grad_norm"] == 0 and line["supervised"] == 0
    before = load_file("data/toy-1/untrained/model.safetensors")
    assert all(torch.equal(before[name], w) for name, w in weights("none", 1).items())


# ---------------------------------------------------------------------------------------------------------------------
# The trajectory


def test_what_is_recorded(here):
    sft()
    train_set = data.load("data/toy-1/teacher")
    response = train_set.response_mask()
    for step, folder in ((0, "data/toy-1/untrained"), (4, "runs/sft/checkpoints/000004")):
        recorded = np.load(f"runs/sft/trajectory/{step:06d}.npz", allow_pickle=False)
        assert recorded["logprob"].dtype == np.float32 and recorded["logprob"].shape == (len(train_set.tokens),)
        assert np.array_equal(np.isnan(recorded["logprob"]), ~response)
        student = model.load(folder, dtype=torch.float64)
        for start, prompt_end, end in train_set.spans:
            ids = torch.tensor(train_set.tokens[start:end].astype(np.int64))
            with torch.no_grad():
                logp = F.log_softmax(student(ids[None])[0], -1)
            for t in range(prompt_end, end):
                c = logp[t - start - 1, ids[t - start]].item()
                assert recorded["logprob"][t] == pytest.approx(c, abs=1e-5)
        assert recorded["correct"].shape == (N,) and recorded["accuracy"] == recorded["correct"].mean()
        assert str(recorded["sha256"]) == train_set.sha256 and int(recorded["step"]) == step
    lines = [line for line in log("sft") if line.get("event") == "record"]
    assert [line["step"] for line in lines] == [0, 2, 4]
    assert lines[0]["nll"] == pytest.approx(-np.load("runs/sft/trajectory/000000.npz")["logprob"][response].mean())
    assert all(0 <= line["eval_accuracy"] <= 1 for line in lines)


def test_recording_changes_no_update(here):
    sft()
    train.main(run="silent", **SHORT)
    assert losses("sft") == losses("silent")


def test_without_answers_there_is_no_accuracy(here):
    lines = [json.loads(line) for line in Path("data/toy-1/teacher.jsonl").read_text().splitlines()]
    del lines[3]["answer"]
    Path("some.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    data.main(source="some.jsonl", tokenizer="data/toy-1/untrained", out="some", verifier="toy")
    sft(data="some")
    assert [line["accuracy"] for line in log("sft") if line.get("event")] == [None, None, None]
    with pytest.raises(InputError, match="recorded no accuracy .* name a --bottleneck=STEP"):
        load_select().main(run="sft")
    assert load_select().main(run="sft", bottleneck=2, show=0).exists()


def test_checkpoints_kept_are_the_bottleneck_the_last_and_what_was_asked_for(here, monkeypatch):
    accuracies = iter([0.9, 0.5, 0.7, 0.3, 0.3, 0.6])  # steps 0, 1, 2, ... 5

    def evaluate(student, tokenizer, problems, sampling, **more):
        row = dict(sample=0, response="", extracted=None, truncated=False, thoughts="missing")
        accuracy = next(accuracies)
        return accuracy, [row | dict(id=one["id"], correct=accuracy) for one in problems.examples]

    monkeypatch.setattr(trajectory.evaluation, "evaluate", evaluate)
    train.main(run="sft", record_every=1, save_every=2, **SHORT | dict(steps=5))
    kept = sorted(int(path.name) for path in Path("runs/sft/checkpoints").iterdir())
    assert kept == [2, 3, 4, 5]  # 1 was the lowest for a while; 3 and 4 are equal, the earlier one counts
    from_disk = load_select().find_bottleneck({s: float(t["accuracy"]) for s, t in
                                               runs.load_trajectory("sft").items()})  # fmt: skip
    assert from_disk == 3


# ---------------------------------------------------------------------------------------------------------------------
# Diffusion students: the objectives themselves are tested in test_diffusion.py


@pytest.mark.parametrize("student", ["llada", "llada2"])
def test_a_diffusion_update_is_the_objective_of_the_whole_step(here, student):
    """However a step is cut into micro-batches: its loss is that of corrupt_batch on all its examples at once."""
    more = dict(model=student, steps=1, seed=2, complementary=True)
    train_set, shape = data.load("data/toy-1/teacher"), families.read_config(student)
    chosen = batches.step_examples(N, 4, 0, 2)
    length = int(np.diff(train_set.spans[chosen][:, ::2]).max())
    noise = diffusion.Corruption(complementary=True)
    batch = diffusion.corrupt_batch(shape, train_set, chosen, noise, seed=2, step=0, length=length)
    whole = model.load(student)
    nll = whole(batch["ids"], batch["targets"], positions=batch["positions"], attention=batch["attention"])
    loss = (nll * batch["weights"]).sum() / batch["count"]
    loss.backward()
    norm = torch.stack([p.grad.norm() for p in whole.parameters()]).norm()
    for size in (1, 3, 4):
        train.main(run=f"{student}-{size}", **SHORT | more | dict(micro_batch_size=size))
        line = log(f"{student}-{size}")[0]
        assert line["loss"] == pytest.approx(loss.item(), rel=1e-5)
        assert line["grad_norm"] == pytest.approx(norm.item(), rel=1e-5)
        assert line["supervised"] == int((batch["targets"] != -100).sum())


def test_a_diffusion_student_takes_an_autoregressive_selectors_choice(here, capsys):
    """Force mask from an AR run: data and recording are inherited, lr and steps are not; what is forced is masked."""
    sft(micro_batch_size=2)
    folder = load_select().main(run="sft", kind="force", rule="all", bottleneck=4, show=0)
    mask = np.load(folder / "mask.npy") & (np.random.default_rng(0).random(len(np.load(folder / "mask.npy"))) < 0.4)
    np.save(folder / "mask.npy", mask)
    with pytest.raises(InputError, match="a force selection is for a diffusion student, and data/toy-1/untrained is"):
        train.main(run="bad", selection=str(folder))
    capsys.readouterr()
    seen, make = [], train.micro_batches

    def spy(run, step):
        seen.extend(batch := make(run, step))
        return batch

    train.micro_batches = spy
    try:
        train.main(run="dllm", selection=str(folder), model="llada", steps=1, batch_size=3, device="cpu")
    finally:
        train.micro_batches = make
    printed = capsys.readouterr().out
    assert ("pass 1 trained an autoregressive student, this is a diffusion one; inherited: data=data/toy-1/teacher "
            "eval_data=data/toy-1/unseen seed=0 record_every=2 save_every=0 samples=1 max_new_tokens=8;") in printed
    assert f"{mask.sum():,} tokens" in printed and "are always masked" in printed
    keys = read_json("runs/dllm/config.json")["config"]
    assert keys["lr"] == train.Config.lr and keys["micro_batch_size"] == train.Config.micro_batch_size
    spans, mask_id = data.load("data/toy-1/teacher").spans, families.read_config("llada").mask_token_id
    forced = 0
    for batch in seen:
        for row, example in zip(batch["ids"].numpy(), batch["examples"], strict=True):
            start, _, end = spans[example]
            assert (row[: end - start][mask[start:end]] == mask_id).all()
            forced += mask[start:end].sum()
    assert forced > 5
    # and a run of the same kind inherits everything
    folder = load_select().main(run="dllm", kind="force", rule="all", bottleneck=1, show=0)
    train.main(run="dllm2", selection=str(folder))
    first, second = (read_json(f"runs/{run}/config.json")["config"] for run in ("dllm", "dllm2"))
    assert {k for k in first if first[k] != second[k]} == {"run", "selection"}


@pytest.mark.parametrize("student, draws", [("llada", 0), ("llada", 2), ("llada2", 0)])
def test_a_diffusion_trajectory_is_its_own_confidence(here, student, draws):
    train.main(run="sft", record_every=4, **SHORT | dict(model=student, confidence_draws=draws, seed=4))
    train_set = data.load("data/toy-1/teacher")
    for step, folder in ((0, student), (4, "runs/sft/checkpoints/000004")):
        recorded = np.load(f"runs/sft/trajectory/{step:06d}.npz")["logprob"]
        for i, (_, a, b) in enumerate(train_set.spans):
            one, = diffusion.confidence(model.load(folder), train_set, [i], draws=draws, seed=4)
            assert np.allclose(recorded[a:b], one, atol=1e-5)
        assert np.array_equal(np.isnan(recorded), ~train_set.response_mask())


# ---------------------------------------------------------------------------------------------------------------------
# Other ways to run the same loop


def torchrun(n, script=ROOT / "train.py", words=(), **keys):
    words = [*words, *(f"--{k}={str(v).lower() if isinstance(v, bool) else v}" for k, v in keys.items())]
    # the -- keeps torchrun from taking --run for its own --run-path
    program = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n}", "--"]
    return subprocess.run([*program, str(script), *words], capture_output=True, text=True, timeout=300,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip


STUDENTS = {
    "ar": {}, "packed": dict(packing=True, max_row_tokens=70), "checkpointed": dict(checkpoint_activations=True),
    "qwen3_moe": dict(model="qwen3_moe"), "llada": dict(model="llada", confidence_draws=1),
    "llada2": dict(model="llada2", complementary=True),
}  # fmt: skip


@pytest.mark.parametrize("n", [2, 4])
def test_n_processes_do_what_one_does(here, n):
    """Sharded over gloo processes, some with fewer examples or none: losses, gradient norms, records, weights."""
    keys = {name: SHORT | dict(batch_size=3, micro_batch_size=1, record_every=4, max_new_tokens=4) | more
            for name, more in STUDENTS.items() if n == 2 or name in ("ar", "llada2")}  # fmt: skip
    Path("all.py").write_text("import json, sys\nsys.path.insert(0, sys.argv[1])\nimport train\n"
                              "for keys in json.loads(sys.argv[2]): train.main(**keys)\n"
                              "train.parallel.end_processes()\n")  # fmt: skip
    runs = [more | dict(run=f"{name}-{n}") for name, more in keys.items()]
    done = torchrun(n, script="all.py", words=[str(ROOT), json.dumps(runs)])
    assert done.returncode == 0, done.stderr
    for name, more in keys.items():
        train.main(run=name, **more | dict(micro_batch_size=2))  # other micro-batches, too
        for a, b in zip(log(name), log(f"{name}-{n}"), strict=True):
            assert a.keys() == b.keys() and a["step"] == b["step"]
            for key in set(a) - {"seconds", "padding", "padding_unpacked", "event"}:
                assert b[key] == pytest.approx(a[key], rel=1e-5, abs=1e-5), (name, key)
        for step in (0, 4):
            a, b = (np.load(f"runs/{run}/trajectory/{step:06d}.npz") for run in (name, f"{name}-{n}"))
            assert np.allclose(a["logprob"], b["logprob"], atol=2e-5, equal_nan=True), name
            assert np.array_equal(a["correct"], b["correct"])
        a, b = weights(name, 4), weights(f"{name}-{n}", 4)
        assert all(torch.allclose(a[k], b[k], atol=2e-5) for k in a), name


def test_two_processes_share_the_answers_of_one_evaluation(here):
    """Of answers of uneven length, and of a single one, so that the second process has none to write."""
    students = [str(ROOT / "students" / name) for name in ("toy-1", "toy-diffusion-1")]
    Path("answers.py").write_text("""
import json, sys
sys.path.insert(0, sys.argv[1])
import data, eval as evaluation, model, torch, train
from hf.tokenizer import load_tokenizer
from sampling import Sampling
from plumbing import parallel

def answers(folder, indices):
    cfg = train.Config(device="cpu")
    device = parallel.start_processes(cfg)
    student = model.load(folder, device, shard=lambda m: parallel.parallelize(cfg, m, device))
    tokenizer, problems = load_tokenizer(folder), data.load("data/toy-1/teacher")
    sampling = Sampling(max_new_tokens=40)
    return evaluation.evaluate(student, tokenizer, problems, sampling, indices, samples=2, batch_size=3)

found = [answers(folder, indices) for folder in sys.argv[2:] for indices in (None, [0])]
with open(f"answers-{parallel.world_size()}-{parallel.rank()}.json", "w") as file:
    json.dump(found, file)
parallel.end_processes()
""")
    done = torchrun(2, script="answers.py", words=[str(ROOT), *students])
    assert done.returncode == 0, done.stderr
    alone = subprocess.run([sys.executable, "answers.py", str(ROOT), *students], capture_output=True, text=True)
    assert alone.returncode == 0, alone.stderr
    one, first, second = (read_list(f"answers-{name}.json") for name in ("1-0", "2-0", "2-1"))
    assert one == first == second
    assert len(one[0][1]) == 2 * N and len({row["n_tokens"] for row in one[0][1]}) > 1
    assert len(one[1][1]) == 2 and any(row["correct"] for _, rows in one for row in rows)


def read_list(path):
    return json.loads(Path(path).read_text())


def test_nan_on_one_of_two_processes_stops_both_with_one_message(here):
    """A gradient is poisoned on process 1 in update 2: nobody updates, nobody hangs, one line names the examples."""
    Path("nan.py").write_text(f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from plumbing import config
import train
batches = train.micro_batches
def spoiled(run, step):
    made = batches(run, step)
    if step == 1 and train.parallel.rank() == 1:
        made[0]["weights"] = (made[0]["targets"] != -100) * float("nan")
    return made
train.micro_batches = spoiled
config.command(train.main, train.Config)
""")
    words = [f"--{key}={value}" for key, value in (SHORT | dict(run="nan", micro_batch_size=1, resume_every=1)).items()]
    done = torchrun(2, script="nan.py", words=words)
    lines = [line for line in done.stderr.splitlines() if "step 2: loss nan" in line]
    assert done.returncode != 0 and len(lines) == 1, done.stderr
    spans = data.load("data/toy-1/teacher").spans
    examples = sorted(batches.step_examples(N, 4, 1, 0), key=lambda i: spans[i, 0] - spans[i, 2])
    assert f"not finite in the micro-batch of examples [{examples[1]}]; stopped, nothing saved" in lines[0]
    assert [line["step"] for line in log("nan")] == [1]
    assert [p.name for p in Path("runs/nan/resume").iterdir()] == ["000001"]


def test_bfloat16_computes_what_float32_does_about(here):
    train.main(run="full", **SHORT)
    done = torchrun(1, run="half", dtype="bfloat16", **SHORT)
    assert done.returncode == 0, done.stderr
    assert losses("half") == pytest.approx(losses("full"), abs=0.02) and losses("half") != losses("full")
    assert all(w.dtype == torch.float32 for w in weights("half", 4).values())


COMPILED = """
import json, sys
root, keys = sys.argv[1:]
sys.argv[1:] = []
sys.path.insert(0, root)
import torch, train
from torch.profiler import ProfilerActivity, profile

students = []
make = train.make_optimizer
train.make_optimizer = lambda cfg, student: students.append(student) or make(cfg, student)
train.main(**json.loads(keys))
ids = torch.arange(1, 20)[None]
with profile(activities=[ProfilerActivity.CPU]) as seen:
    students[0](ids, ids).sum().backward()
names = [event.name for event in seen.events()]
print("regions:", sum(name.startswith("Torch-Compiled Region") for name in names))
train.parallel.end_processes()
"""


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("n", [1, 2])
def test_blocks_stay_compiled_although_answers_are_sampled(here, n):
    """Losses as without; torch's profiler, which knows nothing of our count, sees a region per block."""
    Path("compiled.py").write_text(COMPILED)
    keys = SHORT | dict(steps=3, record_every=1, eval_data="data/toy-1/unseen")
    train.main(run="eager", **keys)
    words = [str(ROOT), json.dumps(keys | dict(run="compiled", compile=True))]
    done = torchrun(n, script="compiled.py", words=words)
    assert done.returncode == 0, done.stderr
    blocks = families.read_config("data/toy-1/untrained").num_hidden_layers
    assert f"compiled: {blocks} of {blocks} blocks, in " in done.stdout
    assert "warning: from step" not in done.stdout  # a fall of the count; this student's answers have another
    assert [line["compiled"] for line in log("compiled") if "loss" in line] == [blocks] * 3
    assert re.findall(r"^regions: (\d+)$", done.stdout, re.M) == [str(blocks)] * n
    assert losses("compiled") == pytest.approx(losses("eager"), abs=1e-5)


def test_a_fall_of_the_compiled_blocks_is_said(here, capsys):
    """What torch does in silence when its limit of recompilations is reached."""
    run = train.read_inputs(train.resolve(dict(run="x", compile=True, **SHORT)))
    run.student = model.load("data/toy-1/untrained")
    parallel.compile_blocks(run.student)
    total = len(run.student.model.layers)
    shown = screen.Progress(run, resume.Start())
    for step, blocks in ((1, total), (2, total), (3, 1), (4, 1)):
        shown.watch_compiled({"step": step, "compiled": blocks})
    printed = capsys.readouterr().out
    assert printed.count("warning") == 1
    assert f"warning: from step 3 on only 1 of {total} blocks run compiled" in printed


# ---------------------------------------------------------------------------------------------------------------------
# What stops a run


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_lets_the_step_finish_saves_and_stops(here, monkeypatch, capsys, number):
    before = signal.getsignal(number)
    step_of = train.train_step

    def interrupted(cfg, student, optimizer, batches, step):
        if step == 1:
            os.kill(os.getpid(), number)
        return step_of(cfg, student, optimizer, batches, step)

    monkeypatch.setattr(train, "train_step", interrupted)
    with pytest.raises(KeyboardInterrupt):  # a notebook's next cell, like a shell's &&, must not go on
        train.main(run="stopped", **SHORT)
    assert [line["step"] for line in log("stopped")] == [1, 2]
    assert "stopped at step 2 of 4" in capsys.readouterr().out
    monkeypatch.undo()
    os.chdir(here)
    train.main(run="whole", save_every=2, **SHORT)
    whole = weights("whole", 2)
    assert all(torch.equal(w, whole[name]) for name, w in weights("stopped", 2).items())
    assert signal.getsignal(number) is before
