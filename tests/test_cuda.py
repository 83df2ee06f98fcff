"""What must be the same on a GPU: each fact is shown on the CPU, and on CUDA where there is one.

    python -m pytest -m cuda tests/test_cuda.py
"""

import json
from pathlib import Path

import bench_gpu
import numpy as np
import pytest
import torch

import batches
import data
import model
import sample
import train
from plumbing import parallel

WORLD = dict(students=("qwen3_moe",))
STUDENT = Path(__file__).parent.parent / "students" / "toy-1"
GPU = pytest.param("cuda", marks=pytest.mark.cuda)
DEVICES = ["cpu", GPU]

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def device(request):
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU here")
    return torch.device(request.param)


def on_devices(test):
    return pytest.mark.parametrize("device", DEVICES, indirect=True)(test)


def log(run):
    lines = map(json.loads, Path(f"runs/{run}/log.jsonl").read_text().splitlines())
    return [line for line in lines if "loss" in line]


KEYS = dict(
    model=str(STUDENT),
    data="data/toy-1/teacher",
    steps=2,
    batch_size=0,
    micro_batch_size=4,
    lr=1e-4,
)


@on_devices
def test_packed_rows_have_the_log_probabilities_of_single_ones(here, device):
    """On CUDA a BlockMask and flex_attention, elsewhere a dense mask; the CPU unpacked is the
    oracle."""
    train_set = data.load("data/toy-1/teacher")
    rows = [list(range(4)), list(range(4, len(train_set)))]
    ids, targets, weights, positions, segments = batches.collate_rows(train_set, rows, None)
    student = model.load(STUDENT, device)
    with torch.no_grad():
        packed = student(
            torch.as_tensor(ids, device=device),
            torch.as_tensor(targets, device=device),
            positions=torch.as_tensor(positions, device=device),
            attention=batches.causal_within(torch.as_tensor(segments, device=device)),
        )
        ids, targets, _ = batches.collate(train_set, range(len(train_set)))
        single = model.load(STUDENT)(torch.from_numpy(ids), torch.from_numpy(targets))
    ours = packed[packed != 0].sort().values.cpu()
    assert torch.allclose(ours, single[single != 0].sort().values, atol=2e-4)


@on_devices
def test_grouped_products_in_bfloat16_equal_a_loop(device):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(5, 16, 32, generator=generator).to(device, torch.bfloat16)
    x = torch.randn(40, 32, generator=generator).to(device, torch.bfloat16)
    ends = torch.tensor([7, 7, 20, 39, 40], dtype=torch.int32, device=device)
    ours = model.grouped_linear(x, weight, ends)
    begin = 0
    for expert, end in enumerate(ends.tolist()):
        expected = x[begin:end].float() @ weight[expert].float().T
        assert torch.allclose(ours[begin:end].float(), expected, atol=0.1, rtol=0.02)
        begin = end


@on_devices
def test_bfloat16_logits_are_near_those_of_float32(device):
    ids = np.random.default_rng(0).integers(0, 200, (2, 30))
    ids = torch.as_tensor(ids, device=device)
    with torch.no_grad():
        exact = model.load(STUDENT, device)(ids)
        rough = model.load(STUDENT, device, torch.bfloat16)(ids).float()
    assert (rough - exact).abs().max() < 0.05 * exact.abs().max()


@on_devices
def test_greedy_answers_are_those_of_the_cpu(here, device):
    unseen = data.load("data/toy-1/unseen")
    prompts = [unseen.prompt(i).tolist() for i in range(len(unseen))]
    sampling = sample.Sampling(max_new_tokens=40, temperature=0)
    answers = []
    for where in (torch.device("cpu"), device):
        student = model.load(STUDENT, where)
        answers.append(sample.sample(student, prompts, sampling, eos_ids={0}))
    assert answers[0] == answers[1] and all(answers[0])


@on_devices
def test_fsdp_of_one_process_in_bfloat16_trains_as_float32_does(here, device):
    """NCCL on CUDA, gloo elsewhere."""
    losses = []
    for dtype in ("float32", "bfloat16"):
        train.main(run=dtype, dtype=dtype, device=str(device), **KEYS)
        parallel.end_processes()
        losses.append([line["loss"] for line in log(dtype)])
    assert len(losses[0]) == 2
    assert losses[1] == pytest.approx(losses[0], rel=0.02)


@on_devices
def test_packing_checkpointing_and_bfloat16_together_change_no_loss(here, device):
    """And torch.compile on CUDA; on a CPU it takes minutes, and test_parallel.py has it."""
    all_keys = dict(packing=True, checkpoint_activations=True, dtype="bfloat16")
    if device.type == "cuda":
        all_keys["compile"] = True
    train.main(run="plain", device=str(device), **KEYS)
    train.main(run="all", device=str(device), **KEYS, **all_keys)
    parallel.end_processes()
    ours = [line["loss"] for line in log("all")]
    assert ours == pytest.approx([line["loss"] for line in log("plain")], rel=0.02)


@on_devices
def test_a_mixture_of_experts_trains_in_bfloat16(here, device):
    losses = []
    for dtype in ("float32", "bfloat16"):
        keys = KEYS | dict(model="qwen3_moe")
        train.main(run=dtype, dtype=dtype, device=str(device), **keys)
        parallel.end_processes()
        losses.append([line["loss"] for line in log(dtype)])
    assert losses[1] == pytest.approx(losses[0], rel=0.02)


def test_every_part_of_the_gpu_benchmark_runs_at_toy_size(capsys):
    class Quick:
        threads = 1

    lines = bench_gpu.gpu_section(Quick, None, None, sizes=bench_gpu.TOY)
    found = {line["what"]: line for line in lines}
    for name in ("Qwen3, toy", "LLaDA2, toy"):
        assert found[f"{name}, 64 tokens: tokens/s"]["ours"] > 0
    gap = found["Qwen3, toy, 64 tokens, against transformers' Trainer: largest difference of the losses"]
    assert gap["ours"] < 0.02
    assert found["Qwen3, toy: sampled tokens/s, batch 4"]["ours"] > 0
    assert torch.cuda.is_available() or "toy size on the CPU" in capsys.readouterr().out
