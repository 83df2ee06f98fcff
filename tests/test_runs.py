"""plumbing/runs.py: selections as they lie on disk, and what a run's files say."""

from pathlib import Path

import numpy as np
import pytest

from plumbing import runs
from plumbing.config import InputError, read_json, write_json


class Examples:
    """What load_mask asks of data.Data: two examples of 5 tokens, 3 of each in the response."""

    folder = "data/traces"
    sha256 = "of the data"
    meta = {"tokenizer_hash": "of the tokenizer"}

    def response_mask(self):
        return np.array([0, 0, 1, 1, 1] * 2, dtype=bool)


@pytest.fixture
def saved(tmp_path):
    """A function that stores a mask as select.py does -> its folder."""

    def save(mask, kind="keep"):
        folder = tmp_path / kind
        folder.mkdir(exist_ok=True)
        np.save(folder / "mask.npy", mask)
        made = {"tokenizer_hash": "of the tokenizer", "sha256": "of the data", "kind": kind}
        write_json(folder / "config.json", made)
        return folder

    return save


@pytest.mark.parametrize("key, value", [
    ("template_hash", "another"), ("template_kwargs", {"enable_thinking": False}), ("date", "2026-11-25"),
])  # fmt: skip
def test_a_selection_made_under_another_chat_template_is_refused(saved, key, value):
    folder = saved(weights(1, 0, 1).astype(bool))
    made = read_json(folder / "config.json")
    write_json(folder / "config.json", made | {key: value})
    with pytest.raises(InputError, match=f"made under another chat template than data/traces .{key}"):
        runs.load_mask(folder, Examples())
    data_of_it = Examples()
    data_of_it.meta = Examples.meta | {key: value}
    assert runs.load_mask(folder, data_of_it).any()


def weights(*values):
    return np.array([0, 0, *values] * 2, dtype=np.float32)


def test_a_selection_comes_back_as_it_was_stored(saved):
    stored = weights(0.5, 0, 2).astype(bool)
    for kind in ("keep", "force"):
        found = runs.load_mask(saved(stored, kind), Examples(), kind)
        assert found.dtype == bool and np.array_equal(found, stored)
    stored = weights(0.5, 0, 2)
    found = runs.load_mask(saved(stored), Examples())
    assert found.dtype == np.float32 and np.array_equal(found, stored)


def test_the_hash_of_a_selection_tells_masks_and_weights_apart():
    mask, same = weights(1, 0, 1).astype(bool), weights(1, 0, 1).astype(bool)
    assert runs.mask_hash(mask) == runs.mask_hash(same) != runs.mask_hash(~mask)
    assert (
        runs.mask_hash(weights(1, 0, 1))
        != runs.mask_hash(weights(1, 0, 0.5))
        != runs.mask_hash(mask)
    )


CHECKPOINTS = [
    (-1, ("runs/a/checkpoints/000004", 4)),
    (2, ("runs/a/checkpoints/000002", 2)),
    (0, ("base", 0)),
]


@pytest.mark.parametrize("step, found", CHECKPOINTS)
def test_a_checkpoint_is_named_by_its_step(tmp_path, monkeypatch, step, found):
    monkeypatch.chdir(tmp_path)
    for kept in ("000002", "000004"):
        Path("runs/a/checkpoints", kept).mkdir(parents=True)
    assert runs.find_checkpoint("a", {"model": "base"}, step) == (Path(found[0]), found[1])
    with pytest.raises(InputError, match=r"no checkpoint of step 3 \(there: 2, 4\)"):
        runs.find_checkpoint("a", {"model": "base"}, 3)


@pytest.mark.parametrize("mask, kind, message", [
    (weights(1, -0.5, 1), "keep", "weights that are negative or not finite"),
    (weights(1, np.nan, 1), "keep", "weights that are negative or not finite"),
    (weights(1, np.inf, 1), "keep", "weights that are negative or not finite"),
    (weights(0.5, 1, 1), "force", "a force selection must be bool"),
    (weights(0, 0, 0), "keep", "the selection is empty"),
    (weights(1, 1, 1).astype(np.float64), "keep", "no mask of the response tokens"),
    (np.ones(10, dtype=np.float32), "keep", "no mask of the response tokens"),
])  # fmt: skip
def test_weights_that_no_loss_can_use_are_refused(saved, mask, kind, message):
    with pytest.raises(InputError, match=message) as error:
        runs.load_mask(saved(mask, kind), Examples(), kind)
    assert "\n" not in str(error.value)
