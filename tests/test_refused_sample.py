"""sample.py: what cannot work is one line that names the key, before any forward pass."""

import math
from dataclasses import fields, replace

import pytest
import torch
from asking import ask
from conftest import ROOT
from test_diffusion import V, make_student
from test_sample import COMMAND, PROMPTS

import collect
import denoise
import eval as evaluation
import model
import own
import sample
import train
from plumbing.config import InputError
from sampling import MASKED_DIFFUSION, Sampling, check_used, next_token


def make_autoregressive():
    config = replace(make_student("full").config, model_type="llama", attention="causal")
    return model.Transformer(config).init_weights(0).eval()


WORLD = dict(teacher=3, students=("llada",))


@pytest.mark.parametrize("attention, keys, message", [
    ("full", dict(block_length=7), "--block_length=7 does not divide --max_new_tokens=24"),
    ("full", dict(block_length=8, denoising_steps=2), "--denoising_steps=2: must be a multiple of the 3 blocks"),
    ("full", dict(block_length=8, denoising_steps=10), "--denoising_steps=10"),
    ("block", dict(denoising_steps=5), "--denoising_steps=5: must be a multiple of the 6 blocks"),
    ("block", dict(cfg_scale=1.0), "only for LLaDA"),
    ("full", dict(remasking="left_to_right", threshold=0.5), "--threshold=0.5 and --remasking=left_to_right exclude"),
    ("full", dict(remasking="random", eos_rule="last"), "--eos_rule=last and --remasking=random exclude each other"),
    ("full", dict(remasking="random", threshold=0.5), "exclude each other"),
    ("full", dict(remasking="high"), "--remasking=high: must be low_confidence or random or left_to_right"),
    ("full", dict(threshold=1.5), "--threshold=1.5: must be at least 0.*and at most 1"),
    ("full", dict(temperature=-1.0), "--temperature=-1.0: must be at least 0"),
    ("full", dict(eos_rule="first"), "--eos_rule=first: must be free or last or never"),
    ("full", dict(max_new_tokens=128), "3 tokens and --max_new_tokens=128 are longer than the model's context of 128"),
    ("full", dict(max_new_tokens=0), "--max_new_tokens=0"),
])  # fmt: skip
def test_decoding_that_cannot_be(attention, keys, message):
    with pytest.raises(InputError, match=message):
        next(ask(denoise.generate, make_student(attention), [PROMPTS[0]], **{"max_new_tokens": 24, **keys}))


def test_prompts_that_cannot_be():
    student = make_student("full")
    for prompt in ([], [V], [-1]):
        with pytest.raises(InputError, match="prompt 1 is empty or has an id outside"):
            next(ask(denoise.generate, student, [[3], prompt], 8, block_length=8))
    with pytest.raises(InputError, match="prompt 0 of 130 tokens .* context of 128"):
        ask(sample.sample, student, [[5] * 130], 8, block_length=8)
    student.config = replace(student.config, mask_token_id=V)
    with pytest.raises(InputError, match="mask_token_id 50 is not one of"):
        next(ask(denoise.generate, student, [[3]], 8))
    with torch.no_grad():
        student = make_student("full")
        student.lm_head.weight[7] = torch.nan
    with pytest.raises(InputError, match="not finite"):
        next(ask(denoise.generate, student, [[3]], 8))


@pytest.mark.parametrize("argument, message", [
    ("--prompt=", "--prompt is missing"), ("--block_length=5", "does not divide"), ("--model=nowhere", "nowhere"),
    ("--device=foo", "--device=foo: not on"),
    ("--dtype=float16", "float32 or bfloat16"), ("--max_new_tokens=1000", "context of 256"),
    ("--model=data/toy-1", "config.json"),
])  # fmt: skip
def test_the_command_refuses_in_one_line(world, monkeypatch, argument, message):
    monkeypatch.chdir(world)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    given = dict(word[2:].split("=", 1) for word in [*COMMAND[2:5], COMMAND[6], "--block_length=8", argument])
    typed = {k: int(v) if k in ("max_new_tokens", "block_length") else v for k, v in given.items()}
    with pytest.raises(InputError, match=message) as error:
        sample.main(**typed)
    assert "\n" not in str(error.value)


def test_prompts_and_keys_that_no_autoregressive_student_can_use():
    ours = make_autoregressive()
    for prompt in ([], [V], [-1], [5, 200]):
        with pytest.raises(InputError, match="prompt 1 is empty or has an id outside"):
            ask(sample.sample, ours, [[5], prompt], 4)
    for keys in (dict(temperature=-1), dict(top_p=0.0), dict(top_p=1.5), dict(top_k=-1), dict(batch_size=0)):
        with pytest.raises(InputError, match=f"--{list(keys)[0]}=.*: must be"):
            ask(sample.sample, ours, [[5]], 4, **keys)
    with pytest.raises(InputError, match="--max_new_tokens=0: must be at least 1"):
        ask(sample.sample, ours, [[5]], 0)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0, 1.0])
def test_logits_that_are_not_finite_are_refused(bad, temperature):
    logits = torch.zeros(2, 5)
    logits[1, 3] = bad
    with pytest.raises(InputError, match="not finite"):
        next_token(logits, torch.full((2,), 0.5), Sampling(temperature=temperature))


def test_an_autoregressive_student_fills_no_gaps(world, monkeypatch):
    monkeypatch.chdir(world)
    with pytest.raises(InputError, match="qwen3 is autoregressive: only masked-diffusion students fill gaps"):
        sample.main(model="data/toy-1/untrained", prompt="3+░=8", device="cpu")


@pytest.mark.parametrize("key, value", [
    ("block_length", 8), ("denoising_steps", 4), ("threshold", 0.9), ("remasking", "random"), ("cfg_scale", 1.0),
    ("eos_rule", "never"), ("edit_threshold", 0.5),
])  # fmt: skip
def test_keys_that_no_autoregressive_student_has_are_not_ignored(world, monkeypatch, key, value):
    monkeypatch.chdir(world)
    message = f"--{key}={value} is about masked-diffusion students, and qwen3 is autoregressive"
    with pytest.raises(InputError, match=message):
        sample.main(model="data/toy-1/untrained", prompt="3+5?", device="cpu", **{key: value})
    autoregressive, diffusion = make_autoregressive().config, make_student("full").config
    given = Sampling(**{key: value})
    with pytest.raises(InputError, match=f"--{key}={value} is about masked-diffusion"):
        check_used([autoregressive, autoregressive], given)
    check_used([autoregressive, diffusion], given)  # one table for both kinds
    assert set(MASKED_DIFFUSION) <= {field.name for field in fields(Sampling)}


@pytest.mark.parametrize("key", [dict(top_p=0.9), dict(top_k=5)])
def test_keys_that_greedy_sampling_ignores_are_refused_if_given(tmp_path, monkeypatch, key):
    """In sample.py, whose default is greedy, and where --temperature=0 stands beside them."""
    student = str(ROOT / "students/toy-1")
    monkeypatch.chdir(tmp_path)
    [name] = key
    says = f"--{name}={key[name]} has no effect at temperature 0"
    with pytest.raises(InputError, match=says):
        sample.main(model=student, prompt="7*2", **key)
    with pytest.raises(InputError, match=says):
        evaluation.main(model=student, data="data", temperature=0.0, **key)
    with pytest.raises(InputError, match=says):
        train.main(run="r", model=student, data="data", temperature=0.0, **key)
    with pytest.raises(InputError, match=says):
        own.main(model=student, data="data", out="own.jsonl", temperature=0.0, **key)
    with pytest.raises(InputError, match=says):
        collect.main(source="prompts.jsonl", model=student, out="t.jsonl", temperature=0.0, **key)
