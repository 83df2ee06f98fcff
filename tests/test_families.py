"""hf/families.py: every dialect of config.json, against transformers; published sizes; the hub."""

import itertools
import json
import os
import random
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM
from twins import (
    SHAPE,
    TWINS,
    close,
    edit_config,
    offline,
    on_disk,
    on_meta,
    randomize,
    refused,
    same_tensors,
    some_ids,
    tensors,
)

import model
from hf import families
from plumbing.config import InputError


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
    assert replace(families.read_config(hub), raw={}) == replace(
        families.read_config(folder), raw={}
    )
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
        assert (
            len(load_file(file)) == 1 or sum(t.nbytes for t in load_file(file).values()) <= 20_000
        )


@pytest.mark.parametrize(
    "name, head_dim", [("qwen3", 128), ("qwen2", 12), ("llama3", 12), ("qwen3-moe", 12)]
)
def test_head_dim_that_config_does_not_say(copy, name, head_dim):
    folder = copy(name)
    edit_config(folder, remove=["head_dim"])
    theirs = AutoConfig.from_pretrained(folder)
    assert head_dim == (
        getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads
    )
    assert head_dim == families.read_config(folder).head_dim


def test_values_come_from_config(copy):
    folder = copy("llama")
    edit_config(
        folder,
        remove=["rope_parameters", "num_key_value_heads"],
        rms_norm_eps=0.125,
        rope_theta=1234.5,
    )
    config = families.read_config(folder)
    assert (config.rms_norm_eps, config.rope_theta, config.num_key_value_heads) == (
        0.125,
        1234.5,
        4,
    )
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
QWEN3 = dict(
    model_type="qwen3", head_dim=128, vocab_size=151936, num_key_value_heads=8, rms_norm_eps=1e-6
)

QWEN2 = dict(model_type="qwen2", vocab_size=151936, rms_norm_eps=1e-6)

LLAMA = dict(model_type="llama", vocab_size=128256, num_key_value_heads=8, rms_norm_eps=1e-5)

SMOL = dict(model_type="llama", vocab_size=49152, rms_norm_eps=1e-5)

QWEN_MOE = dict(
    model_type="qwen3_moe",
    head_dim=128,
    vocab_size=151936,
    num_key_value_heads=4,
    rms_norm_eps=1e-6,
    intermediate_size=6144,
    num_experts=128,
    num_experts_per_tok=8,
    norm_topk_prob=True,
)


def size(base, hidden, layers, heads, width, tied, **more):
    keys = dict(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        tie_word_embeddings=tied,
    )
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
        7_615_616_512,
        size(QWEN2, 3584, 28, 28, 18944, False, num_key_value_heads=4, vocab_size=152064),
    ),
    "Qwen2.5-14B": (
        14_770_033_664,
        size(QWEN2, 5120, 48, 40, 13824, False, num_key_value_heads=8, vocab_size=152064),
    ),
    "Llama-3.1-8B": (8_030_261_248, size(LLAMA, 4096, 32, 32, 14336, False)),
    "Llama-3.2-1B": (1_235_814_400, size(LLAMA, 2048, 16, 32, 8192, True)),
    "Llama-3.2-3B": (3_212_749_824, size(LLAMA, 3072, 28, 24, 8192, True)),
    "SmolLM2-135M": (134_515_008, size(SMOL, 576, 30, 9, 1536, True, num_key_value_heads=3)),
    "SmolLM2-360M": (361_821_120, size(SMOL, 960, 32, 15, 2560, True, num_key_value_heads=5)),
    "SmolLM2-1.7B": (1_711_376_384, size(SMOL, 2048, 24, 32, 8192, True, num_key_value_heads=32)),
    "Qwen3-30B-A3B": (
        30_532_122_624,
        size(QWEN_MOE, 2048, 48, 32, 0, False, moe_intermediate_size=768),
    ),
    "Qwen3-235B-A22B": (
        235_093_634_560,
        size(QWEN_MOE, 4096, 94, 64, 0, False, moe_intermediate_size=1536),
    ),
}


@pytest.mark.parametrize("name", SIZES)
def test_full_size_has_the_published_number_of_parameters(tmp_path, name):
    count, raw = SIZES[name]
    student = on_meta(raw, tmp_path)
    assert sum(p.numel() for p in student.parameters()) == count
    shapes = on_disk(student)
    assert sum(torch.Size(s).numel() for s in shapes.values()) == count
    if (
        "Qwen3-30B" in name
    ):  # 48 layers of 2 norms, 4 projections, 2 qk-norms, router, 128 experts of 3
        assert len(shapes) == 3 + 48 * (9 + 128 * 3)
        assert shapes["model.layers.47.mlp.experts.127.down_proj.weight"] == [2048, 768]
        assert shapes["model.layers.0.mlp.gate.weight"] == [128, 2048]
    elif name in ("Qwen3-4B", "Qwen2.5-0.5B", "Llama-3.1-8B", "SmolLM2-135M"):
        keys = {k: v for k, v in raw.items() if k != "model_type"}
        with torch.device("meta"):
            oracle = AutoModelForCausalLM.from_config(
                AutoConfig.for_model(raw["model_type"], **keys)
            )
        assert shapes == {n: list(p.shape) for n, p in oracle.named_parameters()}


def test_sliding_window_counts_only_when_it_is_used(twin, copy):
    folder = copy("qwen2")
    edit_config(folder, sliding_window=4, use_sliding_window=False, max_window_layers=1)
    assert torch.equal(model.load(folder)(some_ids()), model.load(twin("qwen2")[0])(some_ids()))
    edit_config(folder, use_sliding_window=True)
    refused(folder, "use_sliding_window")


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "qwen3-moe"])
def test_a_factor_of_another_family_is_refused(twin, copy, name):
    """transformers ignores it in these families, which is not what the file means; 1 means nothing."""
    folder = copy(name)
    edit_config(folder, residual_multiplier=1.0, logits_scaling=None, final_logit_softcapping=None)
    assert torch.equal(model.load(folder)(some_ids()), model.load(twin(name)[0])(some_ids()))
    for key, value in (
        ("residual_multiplier", 0.22),
        ("attention_multiplier", 1.0),
        ("embedding_multiplier", 12),
        ("logits_scaling", 8.0),
        ("logit_scale", 0.0625),
        ("attn_logit_softcapping", 50.0),
        ("ssm_multipliers", [0.5, 1.0]),
    ):
        edit_config(folder, **{key: value})
        refused(folder, key)
        edit_config(folder, **{key: None})


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
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(tmp_path),
        "HF_HUB_CACHE": str(tmp_path / "hub"),
    }
    root = Path(model.__file__).parent
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, env=environment, capture_output=True, text=True
    )
    count, error = done.stdout.splitlines()
    assert int(count) == sum(t.numel() for t in tensors(folder).values())
    assert error.startswith("org/other: neither a folder nor a hub repository within reach (")


# -------------------------------------------------------------------------------------------------
# Any mixture of keys: the same logits as transformers, or a refusal

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LINEAR = {"rope_type": "linear", "factor": 3.0}
ROPES = (
    None,
    {},
    LINEAR,
    {"type": "linear", "factor": 2.0},
    {"rope_type": "default"},
    {"rope_type": "dynamic", "factor": 2.0},
    LINEAR | {"rope_theta": 500.0},
    LINEAR | {"partial_rotary_factor": 0.5},
    LLAMA3,
    LLAMA3 | {"original_max_position_embeddings": 16, "rope_theta": 1e5},
    YARN,
    {**YARN, "beta_fast": 4, "beta_slow": 2, "truncate": False},
    {**YARN, "beta_fast": 1, "beta_slow": 8, "truncate": False},
    {**YARN, "attention_factor": 1.5},
    {**YARN, "mscale": 0.7, "mscale_all_dim": 1.3},
    {"type": "yarn", "factor": 2.0},
    {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8, "factor": 2.0},
    {"full_attention": {"rope_type": "default", "rope_theta": 100.0}},
)
ABSENT = object()  # the key is not in the file
VALUES = {
    "rope_scaling": ROPES,
    "rope_parameters": (*ROPES, {"rope_type": "default", "rope_theta": 333.0}),
    "rope_theta": (ABSENT, 100.0, 10000.0, 1000000),
    "partial_rotary_factor": (0.5, 1.0),
    "original_max_position_embeddings": (8, 32),
    "max_position_embeddings": (ABSENT, 32, 512),
    "head_dim": (ABSENT, None, 8, 16),
    "num_key_value_heads": (ABSENT, None, 1, 2, 4),
    "rms_norm_eps": (ABSENT, 1e-2, 1e-5),
    "hidden_act": (ABSENT, "silu", "swish", "gelu", "relu"),
    "attention_bias": (False, True),
    "mlp_bias": (False, True),
    "tie_word_embeddings": (ABSENT, False, True),
    "use_sliding_window": (False, True),
    "sliding_window": (None, 4, 4096),
    "max_window_layers": (0, 1, 2),
    "layer_types": (None, ["full_attention"] * 2, ["full_attention", "sliding_attention"]),
    "is_causal": (True, False),
    "decoder_sparse_step": (1, 2),
    "mlp_only_layers": (None, [], [0], [1]),
    "norm_topk_prob": (ABSENT, False, True),
    "pretraining_tp": (1, 2),
    "attention_dropout": (0.0, 0.5),
    "attention_multiplier": (0.5,),
    "embedding_multiplier": (2.0,),
    "logits_scaling": (2.0,),
    "residual_multiplier": (0.5,),
    "scale_attn_weights": (False,),
    "use_qk_norm": (False, True),
    "qk_layernorm": (True,),
    "qkv_bias": (False, True),
    "use_mrope": (False,),
    "logit_scale": (0.1,),
    "final_logit_softcapping": (3.0,),
    "attn_logit_softcapping": (3.0,),
    "attention_chunk_size": (4,),
    "no_rope_layers": ([0, 1],),
}
ALWAYS_COMPUTED = {
    "rms_norm_eps",
    "rope_theta",
    "tie_word_embeddings",
    "attention_bias",
    "pretraining_tp",
}


def transformers_logits(folder, raw, ids):
    """The logits of random weights, which `folder` then holds beside `raw`; None: it cannot either."""
    (folder / "config.json").write_text(json.dumps(raw))
    try:
        oracle = randomize(AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)))
        with torch.no_grad():
            logits = oracle(ids, use_cache=False).logits
    except Exception:  # whatever a file without sense makes it do
        return None
    oracle.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(raw))
    return logits if logits.isfinite().all() else None


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "qwen3_moe"])
def test_any_mixture_of_keys_gives_the_logits_of_transformers_or_a_refusal(tmp_path, family):
    draw = random.Random(family)
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
    base = SHAPE | {"model_type": family, "hidden_size": 32} | experts
    ids = some_ids(T=40)
    computed, refusals = Counter(), Counter()
    for case in range(60):
        # every key alone first, then up to four of them
        names = list(VALUES)
        keys = [names[case]] if case < len(names) else draw.sample(names, draw.randint(2, 4))
        changes = {key: draw.choice(VALUES[key]) for key in keys}
        raw = {key: value for key, value in (base | changes).items() if value is not ABSENT}
        folder = tmp_path / str(case)
        folder.mkdir()
        expected = transformers_logits(folder, raw, ids)
        try:
            ours = model.load(folder)(ids) if expected is not None else None
        except InputError as error:
            assert "\n" not in str(error)
            refusals.update(keys)
            assert not ALWAYS_COMPUTED.issuperset(keys), (changes, str(error))
            continue
        if expected is not None:
            close(ours.detach(), expected, 1e-4)
            computed.update(keys)
    assert computed.total() > 40 and refusals.total() > 5


def test_every_stretched_rope_gives_the_logits_of_transformers_or_a_refusal(tmp_path):
    ids = some_ids(T=40)
    base = SHAPE | {"model_type": "qwen3", "head_dim": 16}
    refusals = []
    for i, (scaling, other) in enumerate(
        itertools.product(ROPES, (None, YARN | {"rope_theta": 1e3}))
    ):
        folder = tmp_path / str(i)
        folder.mkdir()
        raw = base | {"rope_scaling": scaling, "rope_parameters": other}
        expected = transformers_logits(folder, raw, ids)
        try:
            ours = model.load(folder)(ids).detach()
        except InputError as error:
            refusals.append(str(error))
            continue
        if expected is not None:
            close(ours, expected, 1e-4)
    assert 6 <= len(refusals) <= 10, refusals
