"""config.py: keys from the command line, --help, one-line errors, files and folders that are whole or absent."""

import ast
import dataclasses
import importlib
import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from plumbing.config import load_select, parse, read_json, whole_file, whole_folder, write_json

ROOT = Path(__file__).parent.parent
COMMANDS = sorted(p.stem for p in ROOT.glob("*.py") if "\n    command(main, Config)" in p.read_text(encoding="utf-8"))


@dataclass
class Keys:
    # a heading
    name: str = ""  # a text
    steps: int = 50  # a number
    lr: float = 1e-5  # another
    compile: bool = False  # yes or no
    record_every: int = 0  # a long name


# ---------------------------------------------------------------------------------------------------------------------
# --key=value


def test_values_get_the_type_of_their_key_and_only_given_keys_come_back():
    words = ["--name=a=b c", "--steps=-3", "--lr=2e-4", "--compile=True"]
    assert parse(Keys, words) == {"name": "a=b c", "steps": -3, "lr": 2e-4, "compile": True}
    assert parse(Keys, []) == {}
    assert parse(Keys, ["--name=", "--compile=false"]) == {"name": "", "compile": False}
    assert parse(Keys, ["--name=first\nsecond"]) == {"name": "first\nsecond"}


def fields_by_ast(path, name="Config"):
    """[(key, default as written)] of a dataclass in the file, read without running it."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    cls = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name)
    return [(n.target.id, ast.unparse(n.value)) for n in cls.body if isinstance(n, ast.AnnAssign)]


@pytest.mark.parametrize("name", COMMANDS)
def test_help_names_every_key_with_default_and_meaning(name, capsys):
    module = load_select() if name == "select" else importlib.import_module(name)
    with pytest.raises(SystemExit) as stop:
        parse(module.Config, ["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0
    assert text.startswith(module.__doc__.strip().splitlines()[0]) and f"python {name}.py" in text
    lines = {line.split("=")[0]: line for line in text.splitlines() if line.startswith("  --") and "=" in line}
    written = fields_by_ast(ROOT / f"{name}.py")
    for base in filter(dataclasses.is_dataclass, module.Config.__mro__[1:]):  # such as sample.Sampling
        inherited = fields_by_ast(ROOT / f"{base.__module__}.py", base.__name__)
        written += [(key, default) for key, default in inherited if key not in dict(written)]
    assert {f.name for f in dataclasses.fields(module.Config)} == {key for key, _ in written}
    for key, default in written:
        shown, meaning = re.fullmatch(r'("[^"]*"|\S+)\s+(.*)', lines[f"  --{key}"].partition("=")[2]).groups()
        assert ast.literal_eval(shown) == ast.literal_eval(default), key
        assert meaning, f"--{key} has no meaning"


def test_the_commands_are_the_ones_we_know():
    assert {"data", "demo", "eval", "report", "select", "toy", "train"} <= set(COMMANDS)


# ---------------------------------------------------------------------------------------------------------------------
# Whole or absent


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def test_a_file_is_replaced_only_when_the_block_ends_well(tmp_path):
    path = tmp_path / "new" / "a.json"
    for text in ("one", "two"):
        with whole_file(path) as aside:
            assert aside != path and aside.parent == path.parent
            aside.write_text(text)
            assert not path.exists() if text == "one" else path.read_text() == "one"
        assert path.read_text() == text and names(path.parent) == ["a.json"]
    with pytest.raises(KeyboardInterrupt), whole_file(path) as aside:
        aside.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "two" and names(path.parent) == ["a.json"]


def test_a_folder_is_replaced_only_when_the_block_ends_well(tmp_path):
    path = tmp_path / "new" / "run"
    for name in ("one", "two"):
        with whole_folder(path) as aside:
            (aside / "deep").mkdir()
            (aside / "deep" / name).write_text(name)
            assert not path.exists() if name == "one" else names(path / "deep") == ["one"]
        assert names(path / "deep") == [name] and names(path.parent) == ["run"]
    with pytest.raises(ValueError), whole_folder(path) as aside:
        (aside / "half").write_text("half")
        raise ValueError
    assert names(path) == ["deep"] and names(path.parent) == ["run"]


def test_a_failing_rename_leaves_the_old_folder(tmp_path, monkeypatch):
    path, rename, calls = tmp_path / "run", os.rename, []
    with whole_folder(path) as aside:
        (aside / "old").touch()

    def failing(source, target):
        calls.append(target)
        if len(calls) == 2:
            raise OSError("the second rename")
        rename(source, target)

    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises(OSError, match="second"), whole_folder(path) as aside:
        (aside / "new").touch()
    assert not path.exists()  # as after a kill between the two
    with whole_folder(path) as aside:  # the next one puts it back first
        assert names(path) == ["old"]
        (aside / "newer").touch()
    assert names(path) == ["newer"] and names(tmp_path) == ["run"]


KILLED = """
import os, signal, sys
from plumbing import config
rename = os.rename
def dying(source, target):
    rename(source, target)
    if str(target).endswith(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
os.rename = dying
with config.whole_folder(sys.argv[1]) as aside:
    (aside / "new").write_text("new")
    if sys.argv[2] == "while writing":
        os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("moment, left", [("while writing", ["old"]), (".old", None), ("run", ["new"])])
def test_a_kill_at_any_moment_leaves_the_old_folder_or_the_new_one(tmp_path, moment, left):
    path = tmp_path / "run"
    with whole_folder(path) as aside:
        (aside / "old").touch()
    script = [sys.executable, "-c", KILLED, str(path), moment]
    assert subprocess.run(script, cwd=ROOT, timeout=60).returncode == -signal.SIGKILL
    assert (names(path) if path.exists() else None) == left
    with whole_folder(path) as aside:
        assert names(path) == (left or ["old"])
        (aside / "newest").touch()
    assert names(path) == ["newest"] and [n for n in names(tmp_path) if n.endswith(".old")] == []


def test_leftovers_of_a_killed_process_with_the_same_number_do_not_matter(tmp_path):
    left = tmp_path / f".run.{os.getpid()}.tmp"
    left.mkdir()
    (left / "half").touch()
    with whole_folder(tmp_path / "run") as aside:
        assert names(aside) == []
    left = tmp_path / f".a.{os.getpid()}.tmp"
    left.write_text("half of it, and longer")
    with whole_file(tmp_path / "a") as aside:
        aside.write_text("all")
    assert (tmp_path / "a").read_text() == "all" and names(tmp_path) == ["a", "run"]


def test_of_a_link_the_folder_behind_it_is_replaced(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "old").touch()
    (tmp_path / "run").symlink_to(tmp_path / "disk")
    with whole_folder(tmp_path / "run") as aside:
        (aside / "new").touch()
    assert names(tmp_path / "disk") == ["new"] and (tmp_path / "run").is_symlink()


# ---------------------------------------------------------------------------------------------------------------------
# JSON


def test_json_goes_round_and_is_whole(tmp_path):
    value = {"a": [1, 2.5, None, True], "ö": "日本"}
    write_json(tmp_path / "a.json", value)
    assert read_json(tmp_path / "a.json") == value and "日本" in (tmp_path / "a.json").read_text(encoding="utf-8")
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"a": object()})
    assert read_json(tmp_path / "a.json") == value and names(tmp_path) == ["a.json"]


def test_select_is_loaded_under_a_name_of_its_own():
    module = load_select()
    assert module is load_select() and Path(module.__file__) == ROOT / "select.py"
    assert json.loads(json.dumps(sorted(f.name for f in dataclasses.fields(module.Config))))
