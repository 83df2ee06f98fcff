"""diffusion.py: objectives, noise levels and models that do not go together are one line that names the key."""

from dataclasses import replace

import pytest
from test_diffusion import ALL, LONGEST, SET, V, batch_of, make_student

from diffusion import Corruption, corrupt_batch
from plumbing.config import InputError


@pytest.mark.parametrize("attention, keys, message", [
    ("full", dict(objective="block"), "not for llada"), ("block", dict(objective="llada"), "not for llada2_moe"),
    ("full", dict(objective="mdlm"), "must be one of llada_pretrain, llada, block"),
    ("full", dict(weighting="mean"), "only block objectives"), ("block", dict(weighting="t"), "must be mean or 1/t"),
    ("full", dict(forced_weight="2"), "must be one or t"), ("full", dict(t_min=0.0), "t_min"),
    ("block", dict(t_min=0.9), "t_min"), ("block", dict(t_max=1.5), "t_max"), ("block", dict(t_max=-3.0), "t_max"),
    ("full", dict(length=3), "length 3 is less than the 18 tokens"),
])  # fmt: skip
def test_objectives_that_cannot_be(attention, keys, message):
    with pytest.raises(InputError, match=message):
        batch_of(make_student(attention), **keys)


def test_models_that_cannot_be_trained_like_this():
    for changes, message in ((dict(mask_token_id=V), "50 ids"), (dict(mask_token_id=None), "mask_token_id None"),
                             (dict(attention="causal"), "no masked-diffusion model"),
                             (dict(pad_token_id=None, eos_token_ids=[]), "cannot be padded")):  # fmt: skip
        with pytest.raises(InputError, match=message):
            config = replace(make_student("full").config, **changes)
            corrupt_batch(config, SET, ALL, Corruption(), seed=0, step=0, length=LONGEST)
