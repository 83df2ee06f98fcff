"""The one builder of the small worlds that the tests train, sample and select in.

A test file asks for the fixtures of conftest.py:

    def test_something(here):          # the working folder, with data/toy-1 and the students of other families in it
        train.main(**worlds.KEYS)

and where the defaults below do not fit, it names its own, once for the file:

    WORLD = dict(teacher=3, unseen=12, cut=None, students=())

A file that needs runs in its world as well makes them in a `world` fixture of its own; `here` takes it from there:

    @pytest.fixture(scope="module")
    def world(tmp_path_factory):
        folder = make_world(tmp_path_factory.mktemp("world"), teacher=4)
        with inside(folder):
            train.main(run="sft", ...)
        return folder

`here` links what lies in the world: a test that changes a file of it copies that file first.
"""

import json
import os
import tempfile
from contextlib import contextmanager
from pathlib import Path

import torch

import data
import model
import toy
from hf import families
from plumbing.config import write_json

# One thread in every test: sums over several threads are rounded differently from sums over one, and OpenMP's threads
# do not survive the fork of a test that kills its child.
torch.set_num_threads(1)

# A short run of train.py in such a world: two micro-batches a step, everything recorded, saved and kept for a resume
KEYS = dict(
    model="data/toy-1/untrained",
    data="data/toy-1/teacher",
    eval_data="data/toy-1/unseen",
    steps=9,
    batch_size=4,
    micro_batch_size=2,
    lr=1e-3,
    weight_decay=0.1,
    record_every=3,
    save_every=4,
    resume_every=2,
    max_new_tokens=8,
    device="cpu",
)

# config.json of the students of other families; their vocabulary is the toy tokenizer's
IDS = dict(mask_token_id=3, eos_token_id=0, pad_token_id=0)
SHAPE = dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    rms_norm_eps=1e-6,
    rope_theta=1e4,
    max_position_embeddings=256,
    num_experts_per_tok=2,
    moe_intermediate_size=16,
)
FAMILIES = {
    "llada": dict(
        model_type="llada",
        d_model=32,
        mlp_hidden_size=48,
        n_layers=2,
        n_heads=4,
        n_kv_heads=4,
        rms_norm_eps=1e-5,
        rope_theta=1e4,
        max_sequence_length=256,
        **IDS,
    ),
    "llada2": dict(
        model_type="llada2_moe",
        num_experts=8,
        n_group=2,
        topk_group=1,
        num_shared_experts=1,
        first_k_dense_replace=1,
        partial_rotary_factor=0.5,
        routed_scaling_factor=1.0,
        block_length=8,
        **SHAPE,
        **IDS,
    ),
    "qwen3_moe": dict(
        model_type="qwen3_moe",
        num_experts=6,
        norm_topk_prob=True,
        eos_token_id=0,
        pad_token_id=0,
        **SHAPE,
    ),
}


@contextmanager
def inside(folder):
    """Work in `folder`, and be back afterwards whatever happened."""
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield Path(folder)
    finally:
        os.chdir(before)


def make_world(folder=".", teacher=9, unseen=3, cut=5, students=tuple(FAMILIES), seed=1, out="", **keys):
    """Write data/toy-<seed> (or `out`) and untrained students of other families into `folder` -> folder.

    teacher, unseen   how many problems
    cut               response i is cut to 6 + cut * i characters: equal lengths would hide a mean of means and padding
                      that is scored. None: whole responses, whose answers the verifier finds
    students          which of FAMILIES are written beside data/, each with the toy tokenizer
    keys              more keys of toy.py
    """
    with inside(folder):
        toy.main(seed=seed, out=out, teacher_problems=teacher, unseen_problems=unseen, pretrain_steps=1, **keys)
        home = Path(out or f"data/toy-{seed}")
        if cut is not None:
            cut_responses(home, cut)
        for name in students:
            write_student(name, home / "untrained")
    return Path(folder)


def cut_responses(home, cut):
    """Shorten the traces of home/teacher.jsonl to different lengths, and tokenise them again."""
    path = home / "teacher.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for i, line in enumerate(lines):
        line["response"] = line["response"][: 6 + cut * i]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    data.main(source=str(path), tokenizer=str(home / "untrained"), out=str(home / "teacher"), verifier="toy")


def write_student(name, tokenizer, std=0.1, **changes):
    """A Hugging Face folder `name` of that family: random weights, config.json with `changes`, `tokenizer`'s files."""
    size = families.read_config(tokenizer).vocab_size
    with tempfile.TemporaryDirectory() as folder:
        write_json(Path(folder) / "config.json", FAMILIES[name] | dict(vocab_size=size) | changes)
        student = model.Transformer(families.read_config(folder)).init_weights(0, std=std)
    model.save(student, tokenizer, name)
