"""model.py against transformers, on tiny random checkpoints that transformers wrote; folders, traps and bad input.

The diffusion families (LLaDA-8B, LLaDA2) are in test_model_diffusion.py.
"""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM

import model
from hf import families, weights
from plumbing.config import InputError

SHAPE = dict(
    vocab_size=97, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=False, eos_token_id=3,
)  # fmt: skip
LLAMA3 = dict(rope_type="llama3", rope_theta=5e5, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=16)  # fmt: skip
YARN = dict(rope_type="yarn", rope_theta=1e4, factor=4.0, original_max_position_embeddings=512)
MOE = dict(head_dim=16, num_experts=8, num_experts_per_tok=3, moe_intermediate_size=24)

# Every family and every branch of its arithmetic: name -> (model_type, what differs from SHAPE).
# The eps are far apart, so that a hard-coded one would show.
TWINS = {
    "qwen3": ("qwen3", dict(head_dim=16, rms_norm_eps=1e-2)),  # 4 heads of 16 = 64, not hidden_size
    "qwen3-tied": ("qwen3", dict(head_dim=16, tie_word_embeddings=True)),
    "qwen2": ("qwen2", dict(rms_norm_eps=1e-5, attention_bias=True)),  # o_proj has none all the same
    "qwen2-tied": ("qwen2", dict(tie_word_embeddings=True)),
    "llama": ("llama", dict(rms_norm_eps=1e-3)),
    "llama-biases": ("llama", dict(attention_bias=True, mlp_bias=True)),
    "llama3": ("llama", dict(head_dim=16, rope_parameters=LLAMA3)),
    "yarn": ("qwen3", dict(head_dim=16, rope_parameters=YARN)),
    "yarn-smooth": ("qwen2", dict(rope_parameters=YARN | dict(truncate=False, beta_fast=8, beta_slow=2))),
    "yarn-short": ("llama", dict(rope_parameters=YARN | dict(original_max_position_embeddings=16))),
    "yarn-factor": ("llama", dict(rope_parameters=YARN | dict(attention_factor=1.7))),
    "yarn-mscale": ("llama", dict(rope_parameters=YARN | dict(mscale=0.7, mscale_all_dim=1.3))),
    "smollm2": ("llama", dict(hidden_size=72, num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True)),
    "qwen3-moe": ("qwen3_moe", MOE | dict(norm_topk_prob=True)),
    "qwen3-moe-mixed": ("qwen3_moe", MOE | dict(num_hidden_layers=4, decoder_sparse_step=2, mlp_only_layers=[3])),
}


def randomize(network, seed=0):
    """Weights at which every term matters: norms around 1, biases that are not 0."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, p in network.named_parameters():
            p.normal_(0.0, 0.15 if p.dim() > 1 else 0.3).add_(1.0 if p.dim() == 1 and "bias" not in name else 0.0)
    return network.eval()


def close(ours, theirs, tolerance=1e-5):
    """Same to `tolerance`, measured in units of the tensor's largest entry."""
    assert ours.shape == theirs.shape
    difference = (ours.double() - theirs.double()).abs().max().item()
    assert difference <= tolerance * max(theirs.abs().max().item(), 1e-30), difference


@pytest.fixture(scope="session")
def twin(tmp_path_factory):
    """name -> (folder written by transformers, transformers' model)."""
    made = {}

    def make(name):
        if name not in made:
            family, changes = TWINS[name]
            oracle = randomize(AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SHAPE | changes)))
            folder = tmp_path_factory.mktemp(name)
            oracle.save_pretrained(folder)
            made[name] = folder, oracle
        return made[name]

    return make


@pytest.fixture
def copy(twin, tmp_path):
    """A copy of a twin's folder, to be damaged."""
    return lambda name="qwen3": Path(shutil.copytree(twin(name)[0], tmp_path / "copy"))


def some_ids(B=3, T=23, seed=1):
    return torch.randint(0, SHAPE["vocab_size"], (B, T), generator=torch.Generator().manual_seed(seed))


def edit_config(folder, remove=(), **changes):
    raw = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in raw.items() if k not in remove}))


def tensors(folder):
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


def same_tensors(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]), name


def oracle_gradients(oracle):
    """Under our names: transformers stacks gate and up of all experts in one tensor."""
    found = {}
    for name, p in oracle.named_parameters():
        if name.endswith("experts.gate_up_proj"):
            found[name.replace("gate_up", "gate")], found[name.replace("gate_up", "up")] = p.grad.chunk(2, dim=1)
        else:
            found[name] = p.grad
    return found


# ---------------------------------------------------------------------------------------------------------------------
# The arithmetic


@pytest.mark.parametrize("attention", ["causal", "full"])
@pytest.mark.parametrize("name", TWINS)
def test_logits_nll_and_gradients_equal_transformers(twin, name, attention):
    folder, oracle = twin(name)
    tolerance = 1e-4 if "moe" in name else 1e-5
    student, ids = model.load(folder), some_ids()
    mask = None if attention == "causal" else torch.zeros(1, 1, 23, 23)
    logits = oracle(ids, attention_mask=mask, use_cache=False).logits
    close(student(ids, attention=attention), logits, tolerance)

    targets, weights = some_ids(seed=2), torch.rand(3, 23) + 0.5
    targets[torch.rand(3, 23) < 0.4] = -100
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(3, 23)
    nll = student(ids, targets=targets, attention=attention)
    assert nll.dtype == torch.float32 and (nll[targets == -100] == 0).all()
    close(nll, expected, tolerance)
    oracle.zero_grad()
    (expected * weights).sum().backward()
    (nll * weights).sum().backward()
    theirs, ours = oracle_gradients(oracle), dict(student.named_parameters())
    assert theirs.keys() == ours.keys()
    for parameter in ours:
        close(ours[parameter].grad, theirs[parameter], tolerance)


def test_gradients_through_logits(twin):
    folder, oracle = twin("qwen3-tied")
    student, ids, weights = model.load(folder), some_ids(), torch.randn(3, 23, 97)
    oracle.zero_grad()
    (oracle(ids).logits * weights).sum().backward()
    (student(ids) * weights).sum().backward()
    for name, p in student.named_parameters():
        close(p.grad, oracle.get_parameter(name).grad)


@pytest.mark.parametrize("name", ["qwen3", "llama3", "yarn"])
def test_positions_reach_rope(twin, name):
    folder, oracle = twin(name)
    ids, positions = some_ids(), torch.randint(1, 4, (3, 23)).cumsum(1)
    mask = torch.zeros(23, 23).masked_fill(torch.ones(23, 23).triu(1) > 0, -torch.inf)[None, None]
    expected = oracle(ids, position_ids=positions, attention_mask=mask, use_cache=False).logits
    close(model.load(folder)(ids, positions=positions), expected)


def test_a_bool_mask_says_who_sees_whom(twin):
    folder, oracle = twin("qwen2")
    student, ids = model.load(folder), some_ids()
    mask = (torch.rand(3, 1, 23, 23) < 0.5) | torch.eye(23, dtype=torch.bool)
    bias = torch.zeros(3, 1, 23, 23).masked_fill(~mask, torch.finfo(torch.float32).min)
    close(student(ids, attention=mask), oracle(ids, attention_mask=bias, use_cache=False).logits)
    causal = torch.ones(23, 23, dtype=torch.bool).tril()[None, None]
    close(student(ids, attention=causal), student(ids))
    cache = model.Cache(student.config, 3, 30)
    close(student(ids, attention=causal, cache=cache), student(ids))


def test_rows_picks_one_position_of_each_sequence(twin):
    student, ids = model.load(twin("qwen3")[0]), some_ids()
    rows = torch.tensor([4, 22, 0])
    close(student(ids, logits_at=rows), student(ids)[torch.arange(3), rows][:, None])


def test_only_rows_with_a_target_get_logits(twin):
    student, ids = model.load(twin("llama")[0]), some_ids(T=60)
    targets = torch.full((3, 60), -100)
    assert student(ids, targets=targets).tolist() == torch.zeros(3, 60).tolist()
    targets[1, 7], targets[2, 59] = 5, 6
    with Largest() as seen:
        student(ids, targets=targets).sum().backward()
    assert seen.numel < 3 * 60 * 97  # not even all logits of one forward pass


@torch.no_grad()
@pytest.mark.parametrize("name", ["qwen3", "llama3", "smollm2", "qwen3-moe"])
def test_cache_equals_no_cache_with_right_padded_prompts(twin, name):
    folder, oracle = twin(name)
    student, ids, lengths = model.load(folder), some_ids(T=20), torch.tensor([5, 2, 9])
    cache = model.Cache(student.config, 3, 20)

    def expected(row, position):
        return oracle(ids[row : row + 1, : position + 1]).logits[0, -1]

    prompts = torch.where(torch.arange(9) < lengths[:, None], ids[:, :9], 96)  # 96: padding
    logits = student(prompts, cache=cache, logits_at=lengths - 1)
    for row in range(3):
        close(logits[row, 0], expected(row, lengths[row] - 1), 1e-4)
    rows, at = [0, 1, 2], lengths.clone()
    for step, width in enumerate((1, 1, 3, 1, 2)):  # tokens fed at once
        if step == 3:  # the second sequence has ended
            cache.keep_rows([0, 2])
            rows, at = [0, 2], at[[0, 2]]
        positions = at[:, None] + torch.arange(width)  # (B, width)
        logits = student(ids[torch.tensor(rows)[:, None], positions], positions=positions, cache=cache)
        for i, row in enumerate(rows):
            for j in range(width):
                close(logits[i, j], expected(row, positions[i, j]), 1e-4)
        at += width


@pytest.mark.parametrize("name", ["qwen3", "qwen3-moe"])
def test_compiled_block_equals_eager(twin, name):
    """One graph without breaks, forward and backward (a compiler behind it would take half a minute here)."""
    eager, compiled = (model.load(twin(name)[0]) for _ in range(2))
    whole = name != "qwen3-moe" or hasattr(F, "grouped_mm")  # torch 2.9's loop over the experts breaks the graph
    compiled.model.layers[0].compile(backend="aot_eager", fullgraph=whole)
    ids = some_ids()
    outputs = [student(ids, targets=ids) for student in (eager, compiled)]
    close(outputs[1], outputs[0])
    for nll in outputs:
        nll.sum().backward()
    for p, q in zip(eager.parameters(), compiled.parameters(), strict=True):
        close(q.grad, p.grad)


def test_experts_without_grouped_mm(twin, monkeypatch):
    """torch 2.9 has no F.grouped_mm."""
    student, ids = model.load(twin("qwen3-moe")[0]), some_ids()
    expected = student(ids)
    monkeypatch.delattr(F, "grouped_mm", raising=False)
    close(student(ids), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_experts_of_any_width_and_dtype(dtype):
    """Grouped products want rows of 16 bytes and no float64; what does not fit takes the loop."""
    for width in (8, 12, 13):
        x, weight = torch.randn(7, 16, dtype=dtype), torch.randn(3, width, 16, dtype=dtype)
        ends = torch.tensor([2, 2, 7], dtype=torch.int32)
        expected = torch.cat([x[:2] @ weight[0].T, x[2:] @ weight[2].T])
        atol = 0.1 if dtype == torch.bfloat16 else 1e-5
        assert torch.allclose(model.grouped_linear(x, weight, ends), expected, atol=atol)


def test_router_computes_in_float32_under_autocast(twin):
    student = model.load(twin("qwen3-moe")[0])
    router, x = student.model.layers[0].mlp.gate, torch.randn(5, 48)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = router(x)[0]
    assert inside.dtype == torch.float32 and torch.equal(inside, router(x)[0])


def test_init_weights_is_a_function_of_the_seed(twin):
    config = families.read_config(twin("qwen3-moe-mixed")[0])
    one, same, other = (model.Transformer(config).init_weights(seed) for seed in (1, 1, 2))
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), same.parameters(), strict=True))
    assert not torch.equal(one.lm_head.weight, other.lm_head.weight)
    assert (one.model.norm.weight == 1).all() and one.lm_head.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert one(some_ids()).isfinite().all()


# ---------------------------------------------------------------------------------------------------------------------
# LinearNLL


class Largest(TorchDispatchMode):
    """Remembers the size of the largest tensor that any operation made."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        made = [t.numel() for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
        self.numel = max([self.numel, *made])
        return out


def nll_and_gradients(N, chunk, dtype, C=12, V=50):
    """LinearNLL and float64 cross_entropy on the same numbers: two triples (nll, d hidden, d weight)."""
    torch.manual_seed(N)
    hidden, weight = torch.randn(N, C).to(dtype), torch.randn(V, C).to(dtype)
    targets, scale = torch.randint(0, V, (N,)), torch.randn(N)
    found = []
    for exact in (False, True):
        h, w = (t.double() if exact else t.clone() for t in (hidden, weight))
        h.requires_grad_(), w.requires_grad_()
        nll = F.cross_entropy(h @ w.T, targets, reduction="none") if exact else model.LinearNLL.apply(
            h, w, targets, chunk)  # fmt: skip
        (nll * scale).sum().backward()
        found.append((nll, h.grad, w.grad))
    return found


@pytest.mark.parametrize("N, chunk", [(1, 1), (7, 1), (7, 7), (7, 100), (20, 7), (21, 7)])
def test_linear_nll_equals_float64_cross_entropy(N, chunk):
    ours, exact = nll_and_gradients(N, chunk, torch.float32)
    assert ours[0].dtype == torch.float32
    for a, b in zip(ours, exact, strict=True):
        close(a, b, 1e-6)


def test_linear_nll_in_bfloat16():
    ours, exact = nll_and_gradients(20, 7, torch.bfloat16)
    assert ours[0].dtype == torch.float32 and ours[1].dtype == ours[2].dtype == torch.bfloat16
    for a, b in zip(ours, exact, strict=True):
        close(a, b, 1e-2)


def test_linear_nll_of_no_rows_is_nothing():
    """A micro-batch without supervised tokens: gradients of zero, not None and not nan."""
    ours, _ = nll_and_gradients(0, 7, torch.float32)
    assert ours[0].shape == (0,) and ours[1].shape == (0, 12)
    assert torch.equal(ours[2], torch.zeros(50, 12))


def test_linear_nll_memory_does_not_grow_with_rows():
    C, V, chunk, seen = 2, 1000, 16, []
    for N in (32, 4096):
        hidden, weight = torch.randn(N, C, requires_grad=True), torch.randn(V, C, requires_grad=True)
        with Largest() as largest:
            model.LinearNLL.apply(hidden, weight, torch.zeros(N, dtype=torch.long), chunk).sum().backward()
        seen.append(largest.numel)
    assert seen == [chunk * V, chunk * V]


# ---------------------------------------------------------------------------------------------------------------------
# Folders


def hub_dialect(raw):
    """transformers 5's config.json as files on the hub are: rope_theta, rope_scaling (old key: type), torch_dtype."""
    raw = dict(raw)
    rope = raw.pop("rope_parameters")
    raw["rope_theta"], kind = rope.pop("rope_theta"), rope.pop("rope_type")
    raw["rope_scaling"] = None if kind == "default" else {"type": kind, **rope}
    raw["torch_dtype"] = raw.pop("dtype")
    if "num_local_experts" in raw:
        raw["num_experts"] = raw.pop("num_local_experts")
    return raw


@pytest.mark.parametrize("name", TWINS)
def test_both_config_dialects_and_a_round_trip_that_transformers_reads(twin, copy, tmp_path, name):
    folder, oracle = twin(name)
    ids, hub = some_ids(), copy(name)
    raw = json.loads((hub / "config.json").read_text())
    assert "rope_parameters" in raw and "dtype" in raw
    (hub / "config.json").write_text(json.dumps(hub_dialect(raw)))
    assert replace(families.read_config(hub), raw={}) == replace(families.read_config(folder), raw={})
    with torch.no_grad():
        expected = oracle(ids).logits
        for source, limit in ((folder, 5 * 10**9), (hub, 20_000)):
            out = tmp_path / "out"
            model.save(model.load(source), source, out, max_shard_bytes=limit)
            same_tensors(tensors(out), tensors(folder))
            written = json.loads((out / "config.json").read_text())
            assert written == json.loads((source / "config.json").read_text())
            again = AutoModelForCausalLM.from_pretrained(out)
            assert torch.equal(again(ids).logits, expected)
            assert torch.equal(model.load(out)(ids), model.load(folder)(ids))
    files = sorted(out.glob("*.safetensors"))  # of the second save: shards
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert len(files) > 2 and files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors(out).values())
    assert index["weight_map"] == {n: f.name for f in files for n in load_file(f)}
    for file in files:
        assert len(load_file(file)) == 1 or sum(t.nbytes for t in load_file(file).values()) <= 20_000


def test_shards_written_by_transformers(twin, tmp_path):
    folder, oracle = twin("qwen3")
    oracle.save_pretrained(tmp_path, max_shard_size="30KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert torch.equal(model.load(tmp_path)(some_ids()), model.load(folder)(some_ids()))


def test_bfloat16_in_and_out(twin, tmp_path):
    folder, oracle = twin("qwen2")
    student = model.load(folder, dtype=torch.bfloat16)
    assert {p.dtype for p in student.parameters()} == {torch.bfloat16}
    model.save(student, folder, tmp_path / "out")
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == "bfloat16"
    stored = tensors(tmp_path / "out")
    same_tensors(stored, {name: t.bfloat16() for name, t in tensors(folder).items()})
    for name, p in model.load(tmp_path / "out").named_parameters():  # float32: the same numbers
        assert torch.equal(p, stored[name].float())
    exact, rounded = oracle(some_ids()).logits, student(some_ids())
    assert rounded.dtype == torch.bfloat16
    close(rounded, exact, 0.1)
    assert student(some_ids(), targets=some_ids()).dtype == torch.float32


def test_save_copies_the_tokenizer_and_nothing_else(twin, copy, tmp_path):
    source, out = copy(), tmp_path / "out"
    wanted = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "merges.txt", "vocab.json",
              "generation_config.json", "special_tokens_map.json"}  # fmt: skip
    for name in wanted | {"pytorch_model.bin", "modeling_x.py", "optimizer.pt"}:
        (source / name).write_text("{}")
    model.save(model.load(source), source, out)
    assert {p.name for p in out.iterdir()} == wanted | {"config.json", "model.safetensors"}
    model.save(model.load(out), out, out)  # in place
    assert {p.name for p in out.iterdir()} == wanted | {"config.json", "model.safetensors"}
    same_tensors(tensors(out), tensors(source))


def test_save_erases_nothing_but_an_older_model(twin, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/config.json").write_text("{}")
    with pytest.raises(InputError, match="mine: holds other things .*; name another folder"):
        model.save(model.load(twin("qwen3")[0]), twin("qwen3")[0], tmp_path / "mine")
    assert (tmp_path / "mine/config.json").read_text() == "{}" and len(list(tmp_path.iterdir())) == 1


def test_a_save_that_fails_midway_leaves_the_old_folder(twin, tmp_path, monkeypatch):
    folder, out = twin("qwen3")[0], tmp_path / "out"
    student = model.load(folder)
    model.save(student, folder, out, max_shard_bytes=30_000)
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    calls = []

    def disk_full(*args, **kwargs):
        calls.append(args)
        if len(calls) == 2:
            raise OSError("No space left on device")
        return save_file(*args, **kwargs)

    monkeypatch.setattr(weights, "save_file", disk_full)
    with torch.no_grad():
        student.lm_head.weight.zero_()
    with pytest.raises(OSError, match="No space"):
        model.save(student, folder, out, max_shard_bytes=30_000)
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


# ---------------------------------------------------------------------------------------------------------------------
# Traps of real checkpoints


def test_tied_checkpoint_that_stores_an_lm_head_all_the_same(twin, copy):
    """Qwen3-1.7B's does. The embedding is the head, whatever lm_head.weight says."""
    folder = copy("qwen3-tied")
    save_file(tensors(folder) | {"lm_head.weight": torch.zeros(97, 48)}, folder / "model.safetensors")
    assert torch.equal(model.load(folder)(some_ids()), model.load(twin("qwen3-tied")[0])(some_ids()))


def test_untied_checkpoint_without_an_lm_head_is_an_error(copy):
    folder = copy("qwen3")
    save_file({n: t for n, t in tensors(folder).items() if n != "lm_head.weight"}, folder / "model.safetensors")
    refused(folder, "lm_head.weight is missing")


def test_sliding_window_counts_only_when_it_is_used(twin, copy):
    folder = copy("qwen2")
    edit_config(folder, sliding_window=4, use_sliding_window=False, max_window_layers=1)
    assert torch.equal(model.load(folder)(some_ids()), model.load(twin("qwen2")[0])(some_ids()))
    edit_config(folder, use_sliding_window=True)
    refused(folder, "use_sliding_window")


def test_stored_rope_tables_are_ignored(copy):
    folder = copy("llama")
    buffers = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(6) for i in range(2)}
    save_file(tensors(folder) | buffers, folder / "model.safetensors")
    model.load(folder)


@pytest.mark.parametrize("name, head_dim", [("qwen3", 128), ("qwen2", 12), ("llama3", 12), ("qwen3-moe", 12)])
def test_head_dim_that_config_does_not_say(copy, name, head_dim):
    folder = copy(name)
    edit_config(folder, remove=["head_dim"])
    theirs = AutoConfig.from_pretrained(folder)
    assert head_dim == (getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads)
    assert head_dim == families.read_config(folder).head_dim


def test_values_come_from_config(copy):
    folder = copy("llama")
    edit_config(folder, remove=["rope_parameters", "num_key_value_heads"], rms_norm_eps=0.125, rope_theta=1234.5)
    config = families.read_config(folder)
    assert (config.rms_norm_eps, config.rope_theta, config.num_key_value_heads) == (0.125, 1234.5, 4)
    assert not config.is_diffusion and config.attention == "causal" and config.mask_token_id is None


def test_end_tokens_from_both_files(copy):
    folder = copy("llama")
    assert families.read_config(folder).eos_token_ids == [3]
    edit_config(folder, eos_token_id=[9, 4])
    (folder / "generation_config.json").write_text('{"eos_token_id": [9, 7]}')
    assert families.read_config(folder).eos_token_ids == [4, 7, 9]
    edit_config(folder, eos_token_id=None)
    (folder / "generation_config.json").write_text('{"eos_token_id": 7}')
    assert families.read_config(folder).eos_token_ids == [7]


# Published sizes. What the hub's config.json says, and the number of parameters on the model's card.
QWEN3 = dict(model_type="qwen3", head_dim=128, vocab_size=151936, num_key_value_heads=8, rms_norm_eps=1e-6)
QWEN2 = dict(model_type="qwen2", vocab_size=151936, rms_norm_eps=1e-6)
LLAMA = dict(model_type="llama", vocab_size=128256, num_key_value_heads=8, rms_norm_eps=1e-5)
SMOL = dict(model_type="llama", vocab_size=49152, rms_norm_eps=1e-5)
QWEN_MOE = dict(model_type="qwen3_moe", head_dim=128, vocab_size=151936, num_key_value_heads=4, rms_norm_eps=1e-6,
                intermediate_size=6144, num_experts=128, num_experts_per_tok=8, norm_topk_prob=True)  # fmt: skip


def size(base, hidden, layers, heads, width, tied, **more):
    keys = dict(hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads, tie_word_embeddings=tied)
    return {"intermediate_size": width, **base, **keys, **more}


SIZES = {
    "Qwen3-0.6B": (596_049_920, size(QWEN3, 1024, 28, 16, 3072, True)),
    "Qwen3-1.7B": (1_720_574_976, size(QWEN3, 2048, 28, 16, 6144, True)),
    "Qwen3-4B": (4_022_468_096, size(QWEN3, 2560, 36, 32, 9728, True)),
    "Qwen3-8B": (8_190_735_360, size(QWEN3, 4096, 36, 32, 12288, False)),
    "Qwen3-14B": (14_768_307_200, size(QWEN3, 5120, 40, 40, 17408, False)),
    "Qwen3-32B": (32_762_123_264, size(QWEN3, 5120, 64, 64, 25600, False)),
    "Qwen2.5-0.5B": (494_032_768, size(QWEN2, 896, 24, 14, 4864, True, num_key_value_heads=2)),
    "Qwen2.5-1.5B": (1_543_714_304, size(QWEN2, 1536, 28, 12, 8960, True, num_key_value_heads=2)),
    "Qwen2.5-3B": (3_085_938_688, size(QWEN2, 2048, 36, 16, 11008, True, num_key_value_heads=2)),
    "Qwen2.5-7B": (
        7_615_616_512, size(QWEN2, 3584, 28, 28, 18944, False, num_key_value_heads=4, vocab_size=152064)),
    "Qwen2.5-14B": (
        14_770_033_664, size(QWEN2, 5120, 48, 40, 13824, False, num_key_value_heads=8, vocab_size=152064)),
    "Llama-3.1-8B": (8_030_261_248, size(LLAMA, 4096, 32, 32, 14336, False)),
    "Llama-3.2-1B": (1_235_814_400, size(LLAMA, 2048, 16, 32, 8192, True)),
    "Llama-3.2-3B": (3_212_749_824, size(LLAMA, 3072, 28, 24, 8192, True)),
    "SmolLM2-135M": (134_515_008, size(SMOL, 576, 30, 9, 1536, True, num_key_value_heads=3)),
    "SmolLM2-360M": (361_821_120, size(SMOL, 960, 32, 15, 2560, True, num_key_value_heads=5)),
    "SmolLM2-1.7B": (1_711_376_384, size(SMOL, 2048, 24, 32, 8192, True, num_key_value_heads=32)),
    "Qwen3-30B-A3B": (30_532_122_624, size(QWEN_MOE, 2048, 48, 32, 0, False, moe_intermediate_size=768)),
    "Qwen3-235B-A22B": (235_093_634_560, size(QWEN_MOE, 4096, 94, 64, 0, False, moe_intermediate_size=1536)),
}  # fmt: skip


def on_disk(student):
    """{name on disk: shape} that `save` would write."""
    shapes = {}
    for name, p in [*student.named_parameters(), *student.named_buffers()]:
        for disk_name, rows, index in families.disk_pieces(student.config, name):
            shape = list(p.shape if index is None else p.shape[1:])
            if rows is not None:
                assert rows.start == shapes.get(disk_name, [0])[0] and rows.stop - rows.start == shape[0]
                shape[0] = rows.stop
            shapes[disk_name] = shape
    return shapes


def on_meta(raw, folder):
    (folder / "config.json").write_text(json.dumps(raw))
    with torch.device("meta"):
        return model.Transformer(families.read_config(folder))


@pytest.mark.parametrize("name", SIZES)
def test_full_size_has_the_published_number_of_parameters(tmp_path, name):
    count, raw = SIZES[name]
    student = on_meta(raw, tmp_path)
    assert sum(p.numel() for p in student.parameters()) == count
    shapes = on_disk(student)
    assert sum(torch.Size(s).numel() for s in shapes.values()) == count
    if "Qwen3-30B" in name:  # 48 layers of 2 norms, 4 projections, 2 qk-norms, router, 128 experts of 3
        assert len(shapes) == 3 + 48 * (9 + 128 * 3)
        assert shapes["model.layers.47.mlp.experts.127.down_proj.weight"] == [2048, 768]
        assert shapes["model.layers.0.mlp.gate.weight"] == [128, 2048]
    elif name in ("Qwen3-4B", "Qwen2.5-0.5B", "Llama-3.1-8B", "SmolLM2-135M"):
        keys = {k: v for k, v in raw.items() if k != "model_type"}
        with torch.device("meta"):
            oracle = AutoModelForCausalLM.from_config(AutoConfig.for_model(raw["model_type"], **keys))
        assert shapes == {n: list(p.shape) for n, p in oracle.named_parameters()}


# ---------------------------------------------------------------------------------------------------------------------
# Bad input: one InputError, one line, with the file's name


def refused(folder, *words):
    with pytest.raises(InputError) as caught:
        model.load(folder)
    message = str(caught.value)
    assert "\n" not in message and str(folder) in message
    for word in words:
        assert word in message, message


def test_weights_missing_truncated_or_garbage(copy):
    folder = copy()
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    for damaged in (whole[:-1], whole[: len(whole) // 2], whole[:100], whole[:5], b"", b"not safetensors " * 99):
        file.write_bytes(damaged)
        refused(folder, "model.safetensors")
    file.unlink()
    refused(folder, "model.safetensors")
    (folder / "pytorch_model.bin").write_bytes(whole)  # never opened
    refused(folder, "model.safetensors")


NORM = "model.layers.1.post_attention_layernorm.weight"


@pytest.mark.parametrize(
    "change, words",
    [
        ({NORM: None}, (NORM, "missing")),
        ({NORM: torch.ones(47)}, (NORM, "[47]", "[48]")),
        ({"model.norm.weight": torch.ones(1, 48)}, ("model.norm.weight", "[1, 48]", "[48]")),
        ({"model.layers.2.input_layernorm.weight": torch.ones(48)}, ("model.layers.2.input_layernorm.weight",)),
        ({"model.layers.0.self_attn.q_proj.bias": torch.ones(64)}, ("q_proj.bias",)),
        ({NORM: torch.ones(48, dtype=torch.int32)}, (NORM, "I32")),
        ({NORM: torch.ones(48, dtype=torch.int8)}, (NORM, "I8")),
        ({NORM: torch.ones(48).to(torch.float8_e4m3fn)}, (NORM, "F8_E4M3")),
    ],
)
def test_tensors_that_do_not_fit(copy, change, words):
    folder = copy()
    changed = {n: t for n, t in (tensors(folder) | change).items() if t is not None}
    save_file(changed, folder / "model.safetensors")
    refused(folder, *words)


@pytest.mark.parametrize(
    "text, words",
    [
        (None, ("no such file",)),
        ("{", ("not JSON",)),
        ("\xff\xfe", ("not JSON",)),
        ('{"model_type": "mamba"}', ("mamba", "not supported")),
        ('{"hidden_size": 4}', ("model_type",)),
        (dict(hidden_size=None), ("wrong type",)),
        (dict(num_attention_heads=0, head_dim=None), ("num_attention_heads",)),
        *[({key: -4}, (f"{key} is -4", "at least 1")) for key in ("hidden_size", "num_attention_heads", "vocab_size")],
        (dict(hidden_act="gelu"), ("gelu",)),
        (dict(rope_parameters=dict(rope_type="longrope", rope_theta=1.0)), ("longrope",)),
        (dict(rope_parameters=dict(rope_type="yarn", rope_theta=1.0)), ("yarn", "factor")),
        (dict(rope_parameters=LLAMA3 | dict(low_freq_factor=None)), ("llama3", "low_freq_factor")),
        *[((key,), (key, "missing")) for key in ("vocab_size", "num_attention_heads")],
    ],
)
def test_config_that_cannot_be_read(copy, text, words):
    folder = copy()
    if isinstance(text, dict):
        edit_config(folder, **text)
    elif isinstance(text, tuple):
        edit_config(folder, remove=text)
    elif text is None:
        (folder / "config.json").unlink()
    else:
        (folder / "config.json").write_bytes(text.encode("latin-1"))
    refused(folder, "config.json", *words)


def sharded(twin, folder):
    student = model.load(twin("qwen3")[0])
    model.save(student, twin("qwen3")[0], folder, max_shard_bytes=30_000)
    index = folder / "model.safetensors.index.json"
    return index, json.loads(index.read_text())


@pytest.mark.parametrize("path", ["../{}", "{folder}/{}", "sub/{}", "link/{}", "./{}", "..", ".", "", "a\\{}", 7, None])
def test_an_index_opens_files_of_its_own_folder_only(twin, tmp_path, path):
    """Each path but the nonsensical ones leads to the real shard: only the rule stands in the way."""
    folder = tmp_path / "sharded"
    index, content = sharded(twin, folder)
    shard = content["weight_map"]["lm_head.weight"]
    shutil.copy(folder / shard, tmp_path)
    (folder / "sub").mkdir()
    shutil.copy(folder / shard, folder / "sub")
    (folder / "link").symlink_to(tmp_path)
    content["weight_map"]["lm_head.weight"] = path.format(shard, folder=folder) if isinstance(path, str) else path
    index.write_text(json.dumps(content))
    refused(folder, "lm_head.weight" if path != "" else "")


def test_index_and_shards_that_disagree(twin, tmp_path):
    index, content = sharded(twin, tmp_path)
    shards = sorted(set(content["weight_map"].values()))
    wrong = content["weight_map"] | {"lm_head.weight": shards[0]}
    assert content["weight_map"]["lm_head.weight"] != shards[0]
    index.write_text(json.dumps({"weight_map": wrong}))
    refused(tmp_path, shards[0], "lm_head.weight")
    index.write_text("{}")
    refused(tmp_path, "model.safetensors.index.json", "weight_map")
    index.write_text(json.dumps(content))
    model.load(tmp_path)
    whole = (tmp_path / shards[1]).read_bytes()
    (tmp_path / shards[1]).write_bytes(whole[:-7])
    refused(tmp_path, shards[1])
    (tmp_path / shards[1]).unlink()
    refused(tmp_path, shards[1], "missing")


def test_save_wants_a_source_that_exists(twin, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(InputError, match="nowhere: neither a folder nor a hub repository"):
        model.save(model.load(twin("qwen3")[0]), tmp_path / "nowhere", tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------------------------------------------------------------
# The hub


def offline(*args, **kwargs):
    raise OSError("no network\nin this test")


def test_only_weights_configs_and_tokenizers_are_fetched(twin, monkeypatch):
    asked = []

    def fetch(repo_id, **kwargs):
        asked.append((repo_id, kwargs))
        return str(twin("qwen3")[0])

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    assert torch.equal(model.load("org/name")(some_ids()), model.load(twin("qwen3")[0])(some_ids()))
    [(repo_id, kwargs)] = asked
    assert repo_id == "org/name" and list(kwargs) == ["allow_patterns"]
    assert set(kwargs["allow_patterns"]) == {"*.json", "*.safetensors", "*.jinja", "merges.txt"}
    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(InputError, match=r"^org/name: .*\(no network in this test\)$"):
        model.load("org/name")


def test_offline_hub_cache(twin, tmp_path):
    """The cache as huggingface_hub lays it out: files of a snapshot are links to blobs."""
    repo, folder = tmp_path / "hub/models--org--name", twin("qwen3")[0]
    snapshot = repo / "snapshots/0123456789abcdef0123456789abcdef01234567"
    for made in (snapshot, repo / "blobs", repo / "refs"):
        made.mkdir(parents=True)
    (repo / "refs/main").write_text(snapshot.name)
    for i, path in enumerate(folder.iterdir()):
        shutil.copy(path, repo / f"blobs/{i}")
        (snapshot / path.name).symlink_to(f"../../blobs/{i}")
    code = """if True:
        import model
        from plumbing.config import InputError
        print(sum(p.numel() for p in model.load("org/name").parameters()))
        try:
            model.load("org/other")
        except InputError as error:
            print(error)
    """
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "HF_HUB_CACHE": str(tmp_path / "hub")}
    root = Path(model.__file__).parent
    done = subprocess.run([sys.executable, "-c", code], cwd=root, env=environment, capture_output=True, text=True)
    count, error = done.stdout.splitlines()
    assert int(count) == sum(t.numel() for t in tensors(folder).values())
    assert error.startswith("org/other: neither a folder nor a hub repository within reach (")
