"""Worlds for the test files that do not make one of their own: `here`, a small student of every kind;
`toy_runs`, two runs of a shipped student that knows the toy world."""

import os
import shutil
from pathlib import Path

import faults
import pytest

import toy
from plumbing.config import write_json

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    before = os.getcwd()
    os.chdir(folder)
    faults.make_world()
    os.chdir(before)
    return folder


@pytest.fixture
def here(world, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in world.iterdir():
        (tmp_path / path.name).symlink_to(path)


@pytest.fixture(scope="session")
def toy_world(tmp_path_factory):
    """A folder with the shipped student 1's world, of 12 unseen problems."""
    folder = tmp_path_factory.mktemp("toy_world")
    before = os.getcwd()
    os.chdir(folder)
    try:
        toy.main(seed=1, teacher_problems=3, unseen_problems=12, pretrain_steps=1)
    finally:
        os.chdir(before)
    return folder


@pytest.fixture
def toy_runs(toy_world, tmp_path, monkeypatch):
    """A working folder with that data and two runs of one student: their checkpoints are copies of it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data/toy-1").symlink_to(toy_world / "data/toy-1")
    student = ROOT / "students/toy-1"
    keys_of_run = {
        "sft": dict(max_new_tokens=40, samples=2, seed=3),
        "t3s": dict(max_new_tokens=9),
    }
    for run, keys in keys_of_run.items():
        config = dict(
            model=str(student),
            data="data/toy-1/teacher",
            eval_data="data/toy-1/unseen",
            temperature=1.0,
        )
        write_json(Path("runs") / run / "config.json", {"config": config | keys})
        for step in (2, 4):
            shutil.copytree(student, Path("runs") / run / f"checkpoints/{step:06d}")
    return tmp_path
