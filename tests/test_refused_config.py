"""plumbing/config.py: bad keys, files and folders are refused in one line."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from test_config import ROOT, Keys, names

from plumbing import config, runs
from plumbing.config import InputError, above, below, parse, read_json, require, whole_file, whole_folder


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



def test_what_is_no_folder_and_where_we_stand_is_never_replaced(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "home" / "work").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "home" / "work")
    for path in (tmp_path / "file", ".", "..", tmp_path / "home"):
        with pytest.raises(InputError, match="cannot replace"), whole_folder(path):
            raise AssertionError("the block must not begin")
    assert (tmp_path / "file").read_text() == "mine" and names(tmp_path / "home") == ["work"]



def test_a_folder_without_the_sign_belongs_to_the_user(tmp_path):
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



@pytest.mark.parametrize("key, value, allowed, says", [
    ("steps", 0, (1, None), "--steps=0: must be at least 1"),
    ("steps", 9, (1, 8), "--steps=9: must be at least 1 and at most 8"),
    ("lr", 0.0, (above(0), 1), "--lr=0.0: must be more than 0 and at most 1"),
    ("lr", 1.0, (0, below(1)), "--lr=1.0: must be at least 0 and less than 1"),
    ("lr", float("nan"), (0, None), "--lr=nan: must be at least 0"),
    ("name", "linear", ("cosine", "constant"), "--name=linear: must be cosine or constant"),
])  # fmt: skip
def test_a_value_that_is_not_allowed_is_named_with_what_is(key, value, allowed, says):
    with pytest.raises(InputError) as error:
        require(Keys(**{key: value}), **{key: allowed})
    assert str(error.value) == says


def test_the_ends_of_a_range_are_allowed():
    keys = Keys(name="cosine", steps=8, lr=1e-9)
    require(keys, name=("cosine", "constant"), steps=(8, 8), lr=(above(0), None))
    require(Keys(lr=1 - 1e-9), lr=(None, below(1)))
