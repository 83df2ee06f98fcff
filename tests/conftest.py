"""A small world with a student of every kind, for the test files that do not make one of their own."""

import os

import faults
import pytest


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
