"""Checkpoints that are refused: one InputError, one line, with the file's name."""

import json
import shutil

import huggingface_hub
import pytest
import torch
from safetensors.torch import save_file
from twins import LLAMA3, edit_config, offline, refused, tensors

import model
from hf import families
from plumbing.config import InputError


def test_untied_checkpoint_without_an_lm_head_is_an_error(copy):
    folder = copy("qwen3")
    save_file(
        {n: t for n, t in tensors(folder).items() if n != "lm_head.weight"},
        folder / "model.safetensors",
    )
    refused(folder, "lm_head.weight is missing")


def test_weights_missing_truncated_or_garbage(copy):
    folder = copy()
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    for damaged in (
        whole[:-1],
        whole[: len(whole) // 2],
        whole[:100],
        whole[:5],
        b"",
        b"not safetensors " * 99,
    ):
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
        (
            {"model.layers.2.input_layernorm.weight": torch.ones(48)},
            ("model.layers.2.input_layernorm.weight",),
        ),
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
        *[
            ({key: -4}, (f"{key} is -4", "at least 1"))
            for key in ("hidden_size", "num_attention_heads", "vocab_size")
        ],
        (dict(hidden_act="gelu"), ("gelu",)),
        (dict(quantization_config={"quant_method": "fp8"}), ("quantized", "fp8")),
        (dict(tie_word_embeddings="false"), ("tie_word_embeddings", "wrong type")),
        (dict(num_key_value_heads=3), ("num_key_value_heads 3", "multiple")),
        (dict(head_dim=15), ("15", "rotated")),
        (dict(vocab_size=97.5), ("vocab_size", "wrong type")),
        (dict(partial_rotary_factor=0.5), ("partial_rotary_factor 0.5",)),
        (dict(layer_types=["sliding_attention"] * 2), ("layer_types",)),
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


@pytest.mark.parametrize(
    "path", ["../{}", "{folder}/{}", "sub/{}", "link/{}", "./{}", "..", ".", "", "a\\{}", 7, None]
)
def test_an_index_opens_files_of_its_own_folder_only(twin, tmp_path, path):
    """Each path but the nonsensical ones leads to the real shard: only the rule stands in the way."""
    folder = tmp_path / "sharded"
    index, content = sharded(twin, folder)
    shard = content["weight_map"]["lm_head.weight"]
    shutil.copy(folder / shard, tmp_path)
    (folder / "sub").mkdir()
    shutil.copy(folder / shard, folder / "sub")
    (folder / "link").symlink_to(tmp_path)
    content["weight_map"]["lm_head.weight"] = (
        path.format(shard, folder=folder) if isinstance(path, str) else path
    )
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


def test_a_folder_with_an_adapter_only_says_how_to_merge_it(copy):
    folder = copy()
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}')
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    refused(folder, "LoRA adapter", "merge")
    (folder / "config.json").unlink()
    refused(folder, "LoRA adapter", "merge")


def test_what_the_hub_says_reaches_the_user_in_one_line(monkeypatch):
    def gated(*args, **kwargs):
        raise OSError(
            "403 Client Error. (Request ID: Root=1)\n\nCannot access gated repo for url https://x/y.\n"
            "Access to model org/gated is restricted. Visit https://x/org/gated to ask for access."
        )

    monkeypatch.setattr(huggingface_hub, "snapshot_download", gated)
    with pytest.raises(InputError) as caught:
        model.load("org/gated")
    assert "\n" not in str(caught.value) and "Visit https://x/org/gated to ask" in str(caught.value)


def test_a_revision_is_for_hub_ids(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(
        huggingface_hub,
        "snapshot_download",
        lambda *a, **k: asked.append((a, k["revision"])) or tmp_path,
    )
    name = families.at_revision("org/name", "abc123")
    assert families.local_folder(name) == tmp_path and asked == [(("org/name",), "abc123")]
    assert families.at_revision("org/name", "") == "org/name"
    for model_name in (str(tmp_path), "org/name@main"):
        with pytest.raises(InputError, match="revision"):
            families.at_revision(model_name, "abc123")
