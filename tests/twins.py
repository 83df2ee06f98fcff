"""Tiny random checkpoints that transformers wrote, one of every family and branch of the arithmetic.

conftest.py makes the fixtures `twin` and `copy` known; the rest is for comparing, and for bad input.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import model
from hf import families
from plumbing.config import InputError

SHAPE = dict(
    vocab_size=97,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    tie_word_embeddings=False,
    eos_token_id=3,
)

LLAMA3 = dict(
    rope_type="llama3",
    rope_theta=5e5,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=16,
)

YARN = dict(rope_type="yarn", rope_theta=1e4, factor=4.0, original_max_position_embeddings=512)

MOE = dict(head_dim=16, num_experts=8, num_experts_per_tok=3, moe_intermediate_size=24)

# Every family and every branch of its arithmetic: name -> (model_type, what differs from SHAPE).
# The eps are far apart, so that a hard-coded one would show.
TWINS = {
    "qwen3": ("qwen3", dict(head_dim=16, rms_norm_eps=1e-2)),  # 4 heads of 16 = 64, not hidden_size
    "qwen3-tied": ("qwen3", dict(head_dim=16, tie_word_embeddings=True)),
    "qwen2": (
        "qwen2",
        dict(rms_norm_eps=1e-5, attention_bias=True),
    ),  # o_proj has none all the same
    "qwen2-tied": ("qwen2", dict(tie_word_embeddings=True)),
    "llama": ("llama", dict(rms_norm_eps=1e-3)),
    "llama-biases": ("llama", dict(attention_bias=True, mlp_bias=True)),
    "llama3": ("llama", dict(head_dim=16, rope_parameters=LLAMA3)),
    "yarn": ("qwen3", dict(head_dim=16, rope_parameters=YARN)),
    "yarn-smooth": (
        "qwen2",
        dict(rope_parameters=YARN | dict(truncate=False, beta_fast=8, beta_slow=2)),
    ),
    "yarn-short": ("llama", dict(rope_parameters=YARN | dict(original_max_position_embeddings=16))),
    "yarn-factor": ("llama", dict(rope_parameters=YARN | dict(attention_factor=1.7))),
    "yarn-mscale": ("llama", dict(rope_parameters=YARN | dict(mscale=0.7, mscale_all_dim=1.3))),
    "smollm2": (
        "llama",
        dict(
            hidden_size=72, num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True
        ),
    ),
    "qwen3-moe": ("qwen3_moe", MOE | dict(norm_topk_prob=True)),
    "qwen3-moe-mixed": (
        "qwen3_moe",
        MOE | dict(num_hidden_layers=4, decoder_sparse_step=2, mlp_only_layers=[3]),
    ),
}


def randomize(network, seed=0):
    """Weights at which every term matters: norms around 1, biases that are not 0."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, p in network.named_parameters():
            p.normal_(0.0, 0.15 if p.dim() > 1 else 0.3).add_(
                1.0 if p.dim() == 1 and "bias" not in name else 0.0
            )
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
            # here, so that the other tests need not wait for this import
            from transformers import AutoConfig, AutoModelForCausalLM

            family, changes = TWINS[name]
            oracle = randomize(
                AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SHAPE | changes))
            )
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
    return torch.randint(
        0, SHAPE["vocab_size"], (B, T), generator=torch.Generator().manual_seed(seed)
    )


def edit_config(folder, remove=(), **changes):
    raw = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(
        json.dumps({k: v for k, v in raw.items() if k not in remove})
    )


def tensors(folder):
    return {
        name: t
        for file in sorted(folder.glob("*.safetensors"))
        for name, t in load_file(file).items()
    }


def same_tensors(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]), name


def oracle_gradients(oracle):
    """Under our names: transformers stacks gate and up of all experts in one tensor."""
    found = {}
    for name, p in oracle.named_parameters():
        if name.endswith("experts.gate_up_proj"):
            found[name.replace("gate_up", "gate")], found[name.replace("gate_up", "up")] = (
                p.grad.chunk(2, dim=1)
            )
        else:
            found[name] = p.grad
    return found


def refused(folder, *words):
    with pytest.raises(InputError) as caught:
        model.load(folder)
    message = str(caught.value)
    assert "\n" not in message and str(folder) in message
    for word in words:
        assert word in message, message


def on_disk(student):
    """{name on disk: shape} that `save` would write."""
    shapes = {}
    for name, p in [*student.named_parameters(), *student.named_buffers()]:
        for disk_name, rows, index in families.disk_pieces(student.config, name):
            shape = list(p.shape if index is None else p.shape[1:])
            if rows is not None:
                assert (
                    rows.start == shapes.get(disk_name, [0])[0]
                    and rows.stop - rows.start == shape[0]
                )
                shape[0] = rows.stop
            shapes[disk_name] = shape
    return shapes


def on_meta(raw, folder):
    (folder / "config.json").write_text(json.dumps(raw))
    with torch.device("meta"):
        return model.Transformer(families.read_config(folder))


def offline(*args, **kwargs):
    raise OSError("no network\nin this test")


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


class Largest(TorchDispatchMode):
    """Remembers the size of the largest tensor that any operation made."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        made = [t.numel() for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
        self.numel = max([self.numel, *made])
        return out
