"""memory.py: the dry run's bytes against what real tensors of a real step take, on small models."""

from pathlib import Path

import huggingface_hub
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.autograd.graph import saved_tensors_hooks

import data
import model
import train
from hf import families
from plumbing import memory, parallel
from plumbing.config import InputError


def kept_bytes(function, without):
    """Bytes of all storages that autograd keeps while function() runs, but those of the tensors `without`."""
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        result = function()
    others = {t.untyped_storage()._cdata for t in without}
    return sum(t.untyped_storage().nbytes() for key, t in kept.items() if key not in others), result


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("student", ["data/toy-1/untrained", "qwen3_moe", "llada", "llada2"])
def test_what_a_block_keeps_is_counted_to_the_byte(here, student, dtype):
    shape, T = families.read_config(student), 40
    if shape.num_experts and not hasattr(F, "grouped_mm"):
        pytest.skip("counts the grouped products of torch 2.10 and later")
    real = model.load(student, dtype=getattr(torch, dtype))
    x = torch.randn(1, T, shape.hidden_size, dtype=getattr(torch, dtype), requires_grad=True)
    cos, sin = torch.randn(2, 1, 1, T, int(shape.head_dim * shape.partial_rotary_factor))
    for layer, block in enumerate(real.model.layers):
        size, _ = kept_bytes(lambda block=block: block(x, cos, sin, None, shape.attention == "causal", None),
                             [cos, sin, *real.parameters(), *real.buffers()])  # fmt: skip
        assert memory.kept_by(shape, layer, T, dtype) == size > 0


@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_whole_step_fits_the_plan(here, checkpointed):
    """Weights, gradients, moments exactly; all activations of a forward pass within a tenth."""
    keys = dict(model="data/toy-1/untrained", max_row_tokens=100, checkpoint_activations=checkpointed)
    planned = memory.dry_run(train.Config(**keys))
    student = model.load("data/toy-1/untrained")
    parallel.parallelize(train.Config(**keys), student, torch.device("cpu"))
    optimizer = train.make_optimizer(train.Config(), student)
    ids = torch.randint(0, 200, (1, 100))
    size, nll = kept_bytes(lambda: student(ids, ids), [*student.parameters(), ids])
    nll.sum().backward()
    optimizer.step()
    parameters = list(student.parameters())
    assert planned["weights: float32, sharded"] == sum(p.nbytes for p in parameters)
    assert planned["gradients: float32, sharded"] == sum(p.grad.nbytes for p in parameters)
    moments = sum(optimizer.state[p][m].nbytes for p in parameters for m in ("exp_avg", "exp_avg_sq"))
    assert planned["AdamW's two moments: float32, sharded"] == moments
    logits = 100 * student.config.vocab_size * 4  # a part of a chunk: the plan counts it as such, not per row
    again = planned["block"] if checkpointed else 0  # computed again later, so not kept now
    assert size - logits <= planned["all"] - again < (1.6 if checkpointed else 1.1) * (size - logits)


def test_shards_of_eight_processes(here):
    """FSDP's own cuts: process 0 of 8 that are not there holds what the plan says."""
    dist.init_process_group("fake", rank=0, world_size=8, store=dist.HashStore())
    try:
        for student in ("data/toy-1/untrained", "qwen3_moe", "llada2"):
            planned = memory.dry_run(train.Config(model=student, max_row_tokens=10, gpus=8))
            with torch.device("meta"):
                built = model.Transformer(families.read_config(student))
            parallel.parallelize(train.Config(), built, torch.device("cpu"))
            assert planned["weights: float32, sharded"] == sum(p.to_local().nbytes for p in built.parameters())
    finally:
        dist.destroy_process_group()


def test_the_batch_that_fits_fits_and_one_more_does_not(here, capsys):
    cfg = train.Config(model="llada", max_row_tokens=100, gpu_memory_gib=1.0, micro_batch_size=3)
    planned = memory.dry_run(cfg)
    fixed = planned["total"] - 3 * planned["all"]
    assert fixed + planned["fits"] * planned["all"] <= 0.9 * memory.GIB < fixed + (planned["fits"] + 1) * planned["all"]
    assert f"hold {planned['fits']} rows = {100 * planned['fits']:,} tokens" in capsys.readouterr().out
    # 90 % of this memory do not even hold what is needed whatever the batch
    too_small = train.Config(model="llada", max_row_tokens=100, gpu_memory_gib=fixed / memory.GIB)
    assert memory.dry_run(too_small)["fits"] == 0


def test_it_needs_no_weights_and_says_what_it_lacks(here, monkeypatch):
    Path("bare").mkdir()
    Path("bare/config.json").write_bytes(Path("llada2/config.json").read_bytes())
    with pytest.raises(InputError, match="how long is a row"):
        train.main(model="bare", dry_run=True)
    longest = max(end - start for start, _, end in data.load("data/toy-1/teacher").spans)
    a = train.main(model="bare", dry_run=True, data="data/toy-1/teacher")
    b = train.main(model="bare", dry_run=True, max_row_tokens=int(longest))
    assert a == b and not Path("runs").exists()
    with pytest.raises(InputError, match="--model is missing"):
        train.main(dry_run=True)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *given, **keys: 1 / 0)
    with pytest.raises(InputError, match="llada/nothing: neither a folder nor a hub repository"):
        train.main(model="llada/nothing", dry_run=True)
    for size in (-1.0, 0.0):
        with pytest.raises(InputError, match=f"--gpu_memory_gib={size}: must be more than 0"):
            train.main(model="bare", dry_run=True, max_row_tokens=8, gpu_memory_gib=size)


def test_of_a_hub_model_only_its_config_is_fetched(here, monkeypatch):
    asked = []

    def fetch(name, allow_patterns):
        asked.append((name, allow_patterns))
        return "llada2"

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    hub = train.main(model="org/name", dry_run=True, max_row_tokens=50)
    assert asked == [("org/name", ["config.json", "generation_config.json"])]
    assert hub == train.main(model="llada2", dry_run=True, max_row_tokens=50)


def test_on_a_cpu_a_run_says_before_it_begins_what_it_takes(here, monkeypatch):
    """The dry run's figures for the rows of this run; a warning, and a size that fits, if it is too much."""
    keys = dict(run="x", model="llada", data="data/toy-1/teacher", micro_batch_size=100, device="cpu")
    run = train.read_inputs(train.resolve(keys))
    assert memory.on_cpu(run) == ""  # a toy's needs are nothing to speak of
    monkeypatch.setattr(memory, "GIB", 2**20)
    longest = max(end - start for start, _, end in run.train_set.spans)
    planned = memory.dry_run(train.Config(**keys | dict(max_row_tokens=int(longest), data="")))
    batch = 100 * planned["all"]
    monkeypatch.setattr(memory, "available", lambda: planned["total"] + 1)
    said = memory.on_cpu(run)
    assert said == (
        f"memory: about {(planned['total'] - batch) / 2**20:.2f} GiB for weights, gradients and the optimizer, "
        f"{batch / 2**20:.2f} GiB for a micro-batch of 100 x {longest} tokens")
    monkeypatch.setattr(memory, "available", lambda: planned["total"] - 40 * planned["all"] - 1)
    assert "warning: more than the" in memory.on_cpu(run) and "--micro_batch_size=59," in memory.on_cpu(run)


def test_the_free_memory_is_the_kernels(monkeypatch):
    free = memory.available()
    assert 2**20 < free < 2**50
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert memory.available() == pytest.approx(free / 4, rel=0.5)


def test_mfu_is_that_of_known_gpus_only(monkeypatch):
    cfg, gpu = train.Config(dtype="bfloat16"), torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    assert memory.mfu(cfg, gpu, 989e12, 2.0) == {"mfu": 0.5}
    assert memory.mfu(train.Config(), gpu, 989e12, 2.0) == {}  # float32 has another peak
    assert memory.mfu(cfg, gpu, 0, 2.0) == {}  # operations not counted
    assert memory.mfu(cfg, torch.device("cpu"), 989e12, 2.0) == {}
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 of another kind")
    assert memory.mfu(cfg, gpu, 989e12, 2.0) == {}


def test_operations_by_hand(here):
    """Against torch's own counter, forward and backward."""
    from torch.utils.flop_counter import FlopCounterMode

    for student in ("data/toy-1/untrained", "llada"):
        made = model.load(student)
        ids = torch.randint(0, 200, (2, 50))
        attention = torch.ones(50, 50, dtype=torch.bool)  # a mask, or the counter takes half for a causal kernel
        with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(
            torch.nn.attention.SDPBackend.MATH):  # fmt: skip
            made(ids, ids, attention=attention).sum().backward()
        assert memory.flops(made, 100, 100, 2 * 50 * 50) == pytest.approx(counter.get_total_flops(), rel=0.01)
