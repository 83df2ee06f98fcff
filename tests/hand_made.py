"""A run folder written by hand: what select.py reads of a run, without training one."""

import functools
import tempfile
from pathlib import Path

import numpy as np
from worlds import make_world

import data
from plumbing.config import write_json

WORLD = dict(teacher=6, unseen=2, cut=None, students=())
CORRECT = {0: [1, 1, 1, 1, 0, 0], 2: [0, 0, 0, 1, 0, 0], 4: [1, 0, 1, 0, 0, 0]}


@functools.cache
def small_world():
    """A toy world of six teacher's traces with an untrained student, made once -> its folder."""
    folder = make_world(tempfile.mkdtemp(), **WORLD)
    return folder / "data/toy-1"


class Run:
    """runs/sft in the current folder, recorded at steps 0, 2 and 4 with random confidences."""

    def __init__(self):
        Path("data").mkdir()
        Path("data/toy-1").symlink_to(small_world())
        self.train_set = data.load("data/toy-1/teacher")
        self.response = self.train_set.response_mask()
        self.tokenizer_folder = Path("data/toy-1/untrained")
        Path("runs/sft/trajectory").mkdir(parents=True)
        keys = {"model": "data/toy-1/untrained", "data": "data/toy-1/teacher"}
        write_json("runs/sft/config.json", {"config": keys})
        rng = np.random.default_rng(0)
        for step, correct in CORRECT.items():
            self.write(step, -rng.exponential(size=len(self.response)), np.array(correct, float))

    def write(self, step, logprob, correct, **changes):
        arrays = {
            "logprob": np.where(self.response, logprob, np.nan).astype(np.float32),
            "correct": correct,
            "accuracy": correct.mean(),
            "step": step,
            "sha256": self.train_set.sha256,
            "tokenizer_hash": self.train_set.meta["tokenizer_hash"],
        }
        np.savez(f"runs/sft/trajectory/{step:06d}.npz", **arrays | changes)

    def logprob(self, step):
        """(n_tokens,) as recorded."""
        return np.load(f"runs/sft/trajectory/{step:06d}.npz")["logprob"]
