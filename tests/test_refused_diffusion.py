"""diffusion.py: objectives, noise levels and models that do not go together are one line that names the key."""

from dataclasses import replace

import pytest
from test_diffusion import ALL, LONGEST, MASK, SET, V, batch_of, make_set, make_student

from diffusion import Corruption, check_data, check_selection, confidence, corrupt_batch
from plumbing.config import InputError


@pytest.mark.parametrize("attention, keys, message", [
    ("full", dict(objective="block"), "not for llada"), ("block", dict(objective="llada"), "not for llada2_moe"),
    ("full", dict(objective="mdlm"), "must be one of llada_pretrain, llada, block"),
    ("full", dict(weighting="mean"), "only block objectives"), ("block", dict(weighting="t"), "must be mean or 1/t"),
    ("full", dict(forced_weight="2"), "must be one or t"), ("full", dict(t_min=0.0), "t_min"),
    ("block", dict(t_min=0.9), "t_min"), ("block", dict(t_max=1.5), "t_max"), ("block", dict(t_max=-3.0), "t_max"),
    ("full", dict(length=3), "length 3 is less than the 18 tokens"),
    ("full", dict(anchors="gone"), "--anchors=gone: must be visible or unscored"),
    ("full", dict(forced_odds=0.5), "--forced_odds=0.5: must be 0 .always masked. or at least 1"),
    ("full", dict(forced_odds=-1.0), "--forced_odds=-1.0: must be at least 0"),
    ("full", dict(forced_budget="more"), "--forced_budget=more has no effect without --forced_odds"),
    ("full", dict(forced_below=0.0), "--forced_below=0.0: must be more than 0"),
    ("block", dict(forced_below=0.3), "--forced_below=0.3: no noise level lies below it"),
    ("block", dict(forced_weight="t"), "--forced_weight=t has no effect: objective block with weighting mean"),
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


@pytest.mark.parametrize("key, value, kind", [
    ("anchors", "unscored", "keep"), ("forced_odds", 2.0, "force"), ("forced_below", 0.5, "force"),
    ("forced_weight", "t", "force"),
])  # fmt: skip
def test_keys_about_a_selection_that_is_not_there(key, value, kind):
    given = Corruption(**{key: value})
    selections = {"keep": (None, SET.response_mask()), "force": (SET.response_mask(), None)}
    with pytest.raises(InputError, match=f"--{key}={value} has no effect without a --selection of kind {kind}"):
        check_selection(given, *next(both for other, both in selections.items() if other != kind))
    check_selection(given, *selections[kind])
    check_selection(Corruption(), None, None)


def test_a_mask_in_training_text_is_named():
    """It could not be told from noise: the model would be asked nothing there, and shown a lie."""
    train_set = make_set()
    at = int(train_set.spans[1, 0]) + 4
    train_set.tokens[at] = MASK
    student = make_student("full")
    message = "token 4 of example x1 is the mask .id 48., which training text must not contain"
    for try_it in (lambda: check_data(student.config, train_set), lambda: batch_of(student, train_set=train_set),
                   lambda: confidence(student, train_set, ALL)):  # fmt: skip
        with pytest.raises(InputError, match=message):
            try_it()


def test_examples_longer_than_the_context_are_named():
    for attention in ("full", "block"):
        config = make_student(attention).config
        train_set = make_set([(3, 5), (60, 69)])
        message = "example x1 of 129 tokens is longer than the model's context of 128; .*--max_tokens=128"
        with pytest.raises(InputError, match=message):
            check_data(config, train_set)
        with pytest.raises(InputError, match=message):
            batch_of(make_student(attention), train_set=train_set, examples=[1], length=129)
        check_data(replace(config, max_position_embeddings=129), train_set)
        check_data(replace(config, max_position_embeddings=0), train_set)  # it says nothing of a limit
