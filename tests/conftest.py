"""The fixtures that test files share: a small world and a working folder in it; two runs of a shipped student.

worlds.py says how a test file shapes its world.
"""

import shutil
import signal
from pathlib import Path

import pytest
from twins import copy, twin  # noqa: F401 (fixtures)
from worlds import make_world

from plumbing.config import write_json

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def world(tmp_path_factory, request):
    """The folder of a world made with the keys of the test file's WORLD; tests must not write into it."""
    return make_world(tmp_path_factory.mktemp("world"), **getattr(request.module, "WORLD", {}))


@pytest.fixture
def here(world, tmp_path, monkeypatch):
    """An empty working folder into which everything in the world is linked."""
    monkeypatch.chdir(tmp_path)
    for path in world.iterdir():
        (tmp_path / path.name).symlink_to(path)
    return tmp_path


@pytest.fixture(scope="session")
def toy_world(tmp_path_factory):
    """A folder with the shipped student 1's world, of 12 unseen problems."""
    return make_world(tmp_path_factory.mktemp("toy_world"), teacher=3, unseen=12, cut=None, students=())


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


@pytest.fixture(scope="session", autouse=True)
def ctrl_c_is_heard():
    """A shell starts background jobs with SIGINT ignored, and every child of the tests would inherit that."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
