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
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest

from plumbing import config, runs
from plumbing.config import InputError, load_select, parse, read_json, whole_file, whole_folder, write_json

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


@pytest.mark.parametrize("word, says", [
    ("--step=3", "unknown key --step; did you mean --steps?"),
    ("--learning_rate=3", "unknown key --learning_rate (--help lists the keys)"),  # near to none
    ("--recordevery=3", "unknown key --recordevery; did you mean --record_every?"),
    ("--zzz=3", "unknown key --zzz (--help"),
    ("--steps=many", "--steps=many: the value must be a whole number"),
    ("--steps=1.5", "--steps=1.5: the value must be a whole number"),
    ("--steps=", "--steps=: the value must be a whole number"),
    ("--lr=fast", "--lr=fast: the value must be a finite number"),
    ("--lr=nan", "--lr=nan: the value must be a finite number"),
    ("--lr=inf", "--lr=inf: the value must be a finite number"),
    ("--compile=1", "--compile=1: the value must be true or false"),
    ("--compile", "cannot read '--compile': every argument is --key=value"),
    ("steps=3", "cannot read 'steps=3'"),
    ("-steps=3", "cannot read '-steps=3'"),
    ("--9=3", "cannot read '--9=3'"),
])  # fmt: skip
def test_a_word_that_cannot_be_read_is_named(word, says):
    with pytest.raises(InputError) as error:
        parse(Keys, [word])
    assert str(error.value).startswith(says) and "\n" not in str(error.value)


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


@pytest.mark.parametrize("name", ["data", "select"])
def test_help_and_errors_of_a_shell(name, tmp_path):
    def run(*words):
        return subprocess.run([sys.executable, str(ROOT / f"{name}.py"), *words], capture_output=True, text=True,
                              cwd=tmp_path, timeout=60)  # fmt: skip

    shown = run("--help")
    assert shown.returncode == 0 and "Keys and defaults:" in shown.stdout and shown.stderr == ""
    for words in (["--rn=sft", "--sourc=x"], [], ["help"]):
        failed = run(*words)
        assert failed.returncode == 1 and failed.stdout == ""
        assert failed.stderr.startswith("error: ") and failed.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_errors_become_one_line_and_an_exit_code(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["x.py"])

    def failing(error):
        def main(**given):
            raise error

        return main

    for error, code, line in (
        (InputError("a\nb"), 1, "error: a b\n"),
        (FileNotFoundError(2, "not there", "x"), 1, "error: [Errno 2] not there: 'x'\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ):
        with pytest.raises(SystemExit) as stop:
            config.command(failing(error), Keys)
        assert stop.value.code == code and capsys.readouterr().err == line
    with pytest.raises(ZeroDivisionError):  # a defect of ours keeps its traceback
        config.command(failing(ZeroDivisionError()), Keys)


# ---------------------------------------------------------------------------------------------------------------------
# Whole or absent


def test_under_torchrun_the_others_let_process_0_speak_first(capsys, monkeypatch):
    def fail(**given):
        raise InputError("no such thing")

    waited = []
    monkeypatch.setattr(sys, "argv", ["train.py"])
    monkeypatch.setattr(config.time, "sleep", lambda seconds: waited.append((seconds, capsys.readouterr().err)))
    for number in ("0", "1"):
        monkeypatch.setenv("RANK", number)
        with pytest.raises(SystemExit) as stop:
            config.command(fail, Keys)
        assert stop.value.code == 1 and capsys.readouterr().err == "error: no such thing\n"
    assert waited == [(10, "")]


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


def test_what_is_no_folder_and_where_we_stand_is_never_replaced(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "home" / "work").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "home" / "work")
    for path in (tmp_path / "file", ".", "..", tmp_path / "home"):
        with pytest.raises(InputError, match="cannot replace"), whole_folder(path):
            raise AssertionError("the block must not begin")
    assert (tmp_path / "file").read_text() == "mine" and names(tmp_path / "home") == ["work"]


def test_a_folder_without_the_sign_is_somebodys(tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    for _ in range(2):  # empty, then with the sign
        with whole_folder(home, "*.sign") as aside:
            (aside / "a.sign").touch()
    (home / "a.sign").rename(home / "a")
    with pytest.raises(InputError, match="home: holds other things .no .*sign., which would be lost"):
        with whole_folder(home, "*.sign"):
            raise AssertionError("the block must not begin")
    assert names(home) == ["a"] and names(tmp_path) == ["home"]


def test_of_a_link_the_folder_behind_it_is_replaced(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "old").touch()
    (tmp_path / "run").symlink_to(tmp_path / "disk")
    with whole_folder(tmp_path / "run") as aside:
        (aside / "new").touch()
    assert names(tmp_path / "disk") == ["new"] and (tmp_path / "run").is_symlink()


@pytest.mark.parametrize("whole", [whole_file, whole_folder])
def test_where_nothing_can_be_written_one_line_says_so(whole):
    with tempfile.TemporaryDirectory() as name:
        closed, file, user = Path(name) / "closed", Path(name) / "file", os.geteuid()
        file.touch()
        closed.mkdir()
        closed.chmod(0o555)
        Path(name).chmod(0o755)
        try:
            if user == 0:
                os.seteuid(65534)  # root may write anywhere
            for path in (closed / "a", closed / "b" / "c", file / "a"):
                with pytest.raises(InputError) as error, whole(path):
                    raise AssertionError("the block must not begin")
                assert str(error.value).startswith(f"{path}: cannot be written (")
                assert "\n" not in str(error.value)
        finally:
            os.seteuid(user)
        assert names(closed) == []


# ---------------------------------------------------------------------------------------------------------------------
# JSON


def test_json_goes_round_and_is_whole(tmp_path):
    value = {"a": [1, 2.5, None, True], "ö": "日本"}
    write_json(tmp_path / "a.json", value)
    assert read_json(tmp_path / "a.json") == value and "日本" in (tmp_path / "a.json").read_text(encoding="utf-8")
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"a": object()})
    assert read_json(tmp_path / "a.json") == value and names(tmp_path) == ["a.json"]


@pytest.mark.parametrize("content, says", [
    (None, "no such file"), (b"", "not JSON"), (b'{"a": 1', "not JSON"), (b'{"a": "\xff"}', "not JSON"),
    (b"[1]", "not a JSON object but list"), (b"3", "not a JSON object but int"), (b"[" * 100_000, "not JSON"),
    (b'{"a": ' + b"9" * 5000 + b"}", "not JSON"),
])  # fmt: skip
def test_json_that_cannot_be_read_is_named(tmp_path, content, says):
    path = tmp_path / "a.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError) as error:
        read_json(path)
    assert str(error.value).startswith(f"{path}: {says}") and "\n" not in str(error.value)


def test_select_is_loaded_under_a_name_of_its_own():
    module = load_select()
    assert module is load_select() and Path(module.__file__) == ROOT / "select.py"
    assert json.loads(json.dumps(sorted(f.name for f in dataclasses.fields(module.Config))))


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "/x", "x/../../y", "x/.."])
def test_a_run_lies_in_runs(name):
    with pytest.raises(InputError, match="must be the name of a folder in runs/"):
        runs.run_folder(name)
    assert runs.run_folder("a/b") == Path("runs/a/b") and runs.run_folder("..a") == Path("runs/..a")


def test_a_config_json_that_is_no_runs(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "qwen3"}')
    with pytest.raises(InputError, match="config.json: not a run's config.json"):
        runs.run_keys(tmp_path)
    (tmp_path / "config.json").write_text('{"config": {"lr": 1}}')
    assert runs.run_keys(tmp_path) == {"lr": 1}
