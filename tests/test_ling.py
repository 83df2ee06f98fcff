"""Ling-2 (bailing_moe_v2), the causal sibling of LLaDA2: its arithmetic, and its choice of tokens for a LLaDA2.

The float64 loops of test_model_diffusion.py are the oracle of both.
"""

import shutil
from pathlib import Path

import pytest
import torch
import worlds
from safetensors.torch import save_file
from test_model_diffusion import LLADA2, brute_force, make_llada2
from twins import close, edit_config, refused, same_tensors, tensors

import data
import model
import train
from hf import families
from plumbing.config import InputError, load_select, read_json, write_json

WORLD = dict(students=("llada2",))
CAUSAL = [[j <= i for j in range(11)] for i in range(11)]
# what Ling's config.json has beside or instead of LLaDA2's
LING = {
    "model_type": "bailing_moe_v2",
    "architectures": ["BailingMoeV2ForCausalLM"],
    "mask_token_id": None,
}


def make_ling(folder, **changes):
    folder.mkdir(exist_ok=True)
    c, w = make_llada2(folder, **LING | changes)
    return c, w


@pytest.mark.parametrize("biases", [False, True])
def test_ling_equals_the_loops_with_a_causal_mask(tmp_path, biases):
    c, w = make_ling(tmp_path, use_qkv_bias=biases, use_bias=biases)
    student = model.load(tmp_path)
    assert not student.config.is_diffusion
    torch.manual_seed(4)
    ids = torch.randint(0, 61, (2, 11))
    exact = {name: t.double() for name, t in w.items()}
    logits = [brute_force(c, exact, row, range(11), CAUSAL) for row in ids.tolist()]
    close(student(ids).detach(), torch.stack(logits), 1e-4)


def test_a_llada2_with_a_causal_mask_gives_the_logits_of_its_ling_twin(tmp_path):
    make_ling(tmp_path / "ling")
    shutil.copytree(tmp_path / "ling", tmp_path / "llada2")
    edit_config(tmp_path / "llada2", **LLADA2)
    ling, llada2 = model.load(tmp_path / "ling"), model.load(tmp_path / "llada2")
    ids = torch.randint(0, 61, (2, 11), generator=torch.Generator().manual_seed(1))
    assert torch.equal(ling(ids), llada2(ids, attention="causal"))
    assert not torch.equal(ling(ids), llada2(ids))


def test_one_expert_of_a_token_keeps_its_own_score(tmp_path):
    """With one expert there is nothing to normalise over: its weight is its score, times the factor."""
    c, w = make_ling(tmp_path, num_experts_per_tok=1)
    router = model.load(tmp_path).model.layers[1].mlp.gate
    x = torch.randn(5, 32)
    weights, experts = router(x)
    scores = torch.sigmoid(x @ w["model.layers.1.mlp.gate.weight"].T)
    close(weights.detach(), 2.5 * scores.gather(1, experts))


def test_layers_that_predict_further_ahead_are_ignored_and_not_saved(tmp_path):
    c, w = make_ling(tmp_path / "ling")
    before = model.load(tmp_path / "ling")
    ahead = {
        f"model.layers.3.{name}": torch.randn(2, 2)
        for name in ("eh_proj.weight", "enorm.weight", "attention.dense.weight", "mlp.gate.weight")
    }
    save_file(w | ahead, tmp_path / "ling/model.safetensors")
    refused(tmp_path / "ling", "no place for model.layers.3.")
    edit_config(tmp_path / "ling", num_nextn_predict_layers=1)
    ids = torch.arange(11)[None]
    student = model.load(tmp_path / "ling")
    assert torch.equal(student(ids), before(ids))
    model.save(student, tmp_path / "ling", tmp_path / "out")
    same_tensors(tensors(tmp_path / "out"), w)
    assert read_json(tmp_path / "out/config.json")["num_nextn_predict_layers"] == 0
    assert torch.equal(model.load(tmp_path / "out")(ids), before(ids))


@pytest.mark.parametrize(
    "key",
    [
        "n_group",
        "topk_group",
        "routed_scaling_factor",
        "rms_norm_eps",
        "partial_rotary_factor",
        "rope_theta",
        "num_key_value_heads",
    ],
)
def test_a_key_on_whose_default_the_published_classes_disagree_is_required(tmp_path, key):
    make_ling(tmp_path)
    edit_config(tmp_path, remove=[key])
    refused(tmp_path, f"the key {key!r} is missing")


def test_stacked_experts_are_read_and_written_apart(tmp_path):
    """dFactory trains LLaDA2 from a copy that keeps all experts' matrices in one tensor."""
    (tmp_path / "apart").mkdir()
    c, w = make_llada2(tmp_path / "apart")
    stacked = {name: t for name, t in w.items() if ".experts." not in name}
    for layer in (1, 2):
        for matrix in ("gate_proj", "up_proj", "down_proj"):
            prefix = f"model.layers.{layer}.mlp.experts"
            parts = [w[f"{prefix}.{e}.{matrix}.weight"] for e in range(c["num_experts"])]
            stacked[f"{prefix}.{matrix}"] = torch.stack(parts)
    shutil.copytree(tmp_path / "apart", tmp_path / "stacked")
    save_file(stacked, tmp_path / "stacked/model.safetensors")
    edit_config(tmp_path / "stacked", model_type="llada2_moe_veomni")
    student = model.load(tmp_path / "stacked")
    ids = torch.arange(11)[None]
    assert torch.equal(student(ids), model.load(tmp_path / "apart")(ids))
    model.save(student, tmp_path / "stacked", tmp_path / "out")
    same_tensors(tensors(tmp_path / "out"), w)
    assert read_json(tmp_path / "out/config.json")["model_type"] == "llada2_moe"
    stacked["model.layers.2.mlp.experts.up_proj"] = stacked["model.layers.2.mlp.experts.up_proj"][
        1:
    ]
    save_file(stacked, tmp_path / "stacked/model.safetensors")
    refused(
        tmp_path / "stacked", "model.layers.2.mlp.experts.up_proj", "[15, 12, 32]", "[16, 12, 32]"
    )


# -------------------------------------------------------------------------------------------------
# A Ling selects for a LLaDA2


def make_selector(renamed):
    """ling/: a tiny Ling whose tokenizer calls one special token of llada2's by another name."""
    raw = read_json("llada2/config.json") | {"model_type": "bailing_moe_v2", "mask_token_id": None}
    write_json("raw/config.json", raw)
    made = model.Transformer(families.read_config("raw")).init_weights(1, std=0.1)
    shutil.copytree("llada2", "tokenizer")
    text = Path("tokenizer/tokenizer.json").read_text()
    Path("tokenizer/tokenizer.json").write_text(text.replace(renamed, "<|other|>"))
    settings = Path("tokenizer/tokenizer_config.json").read_text()
    Path("tokenizer/tokenizer_config.json").write_text(settings.replace(renamed, "<|other|>"))
    model.save(made, "tokenizer", "ling")


KEYS = worlds.KEYS | dict(
    steps=2, record_every=1, save_every=0, resume_every=0, eval_data="", device="cpu"
)


def test_what_a_ling_selects_a_llada2_trains_on(here):
    make_selector("<|mask|>")  # which is in no text
    data.main(source="data/toy-1/teacher.jsonl", tokenizer="ling", out="traces", verifier="toy")
    train.main(run="ling", **KEYS | dict(model="ling", data="traces"))
    trained = read_json("runs/ling/config.json")
    assert len(trained["weights_sha256"]) == 64
    folder = load_select().main(run="ling", rule="t3s", kind="force", bottleneck="2", show=0)
    train.main(run="llada2", model="llada2", selection=str(folder), steps=1, device="cpu")
    assert read_json("runs/llada2/config.json")["tokenizer_hash"] != trained["tokenizer_hash"]
    assert (Path("runs/llada2/checkpoints/000001") / "model.safetensors").exists()


def test_a_student_to_whom_a_token_of_the_data_means_something_else_is_refused(here):
    """The trap of these families: Ling's id of <|role_end|> is LLaDA2's mask."""
    make_selector("<|end|>")
    data.main(source="data/toy-1/teacher.jsonl", tokenizer="ling", out="traces", verifier="toy")
    with pytest.raises(
        InputError,
        match=r"token 0 is the added token '<\|other\|>' there and the added token "
        r"'<\|end\|>' here",
    ):
        train.main(run="llada2", model="llada2", data="traces", steps=1, device="cpu")
    assert not Path("runs/llada2").exists()
    shutil.rmtree("ling")  # without the tokenizer that made the data nothing can be looked up
    with pytest.raises(
        InputError, match="made with another tokenizer than the student's; run data.py again"
    ):
        train.main(run="llada2", model="llada2", data="traces", steps=1, device="cpu")


# -------------------------------------------------------------------------------------------------
# Weights have an identity


def test_a_selection_is_of_the_weights_it_was_made_on(here):
    shutil.copytree("data/toy-1/untrained", "student")
    keys = KEYS | dict(model="student", micro_batch_size=4)
    train.main(run="sft", **keys)
    folder = str(load_select().main(run="sft", rule="all", bottleneck="2", show=0))
    train.main(run="same", selection=folder)
    other = model.load("student")
    with torch.no_grad():
        other.model.norm.weight.mul_(1.01)
    model.save(other, "student", "student")
    with pytest.raises(
        InputError, match="--model=student: not the weights that runs/sft began with"
    ):
        train.main(run="t3s", selection=folder)
    assert not Path("runs/t3s").exists()
    with pytest.raises(InputError, match="not the run it was .*the student's weights: then"):
        train.main(run="same", resume=True)
    train.main(run="t3s", selection=folder, allow_changes=True)


def test_checkpoints_in_bfloat16_on_request(here):
    keys = KEYS | dict(steps=1, record_every=0)
    train.main(run="half", export_dtype="bfloat16", **keys)
    train.main(run="whole", **keys)
    half, whole = (tensors(Path(f"runs/{run}/checkpoints/000001")) for run in ("half", "whole"))
    same_tensors(half, {name: tensor.bfloat16() for name, tensor in whole.items()})
    with pytest.raises(InputError, match="--export_dtype=int8: must be float32 or bfloat16"):
        train.main(run="bad", export_dtype="int8", **keys)


def test_data_that_do_not_fit_the_student_are_refused_before_anything_is_written(here):
    raw = read_json("data/toy-1/untrained/config.json")
    largest = int(data.load("data/toy-1/teacher").tokens.max())
    for name, changes, message in (
        (
            "few-rows",
            {"vocab_size": largest},
            f"has the token {largest}, and the student's embedding has {largest} rows",
        ),
        (
            "short",
            {"max_position_embeddings": 9},
            "longer than the model's context of 9; leave such out",
        ),
    ):
        write_json(f"{name}-raw/config.json", raw | changes)
        made = model.Transformer(families.read_config(f"{name}-raw")).init_weights(0)
        model.save(made, "data/toy-1/untrained", name)
        with pytest.raises(InputError, match=message):
            train.main(run=name, **KEYS | dict(model=name))
        assert not Path(f"runs/{name}").exists()


def test_a_revision_becomes_a_part_of_the_model_s_name(monkeypatch):
    asked = []
    monkeypatch.setattr(train, "local_folder", lambda name: asked.append(name) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train.main(run="x", model="org/name", revision="abc", data="d", device="cpu")
    assert asked == ["org/name@abc"]
