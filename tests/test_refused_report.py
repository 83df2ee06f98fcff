"""report.py says in one line what cannot work, and then writes nothing."""

import os
import shutil
from pathlib import Path

import pytest
import test_report

import report
from plumbing.config import InputError, read_json, write_json

cycle = test_report.cycle
here = test_report.here


def damaged(path, text):
    Path(path).write_text(text)


def edit(path, key, **changes):
    whole = read_json(path)
    write_json(path, whole | {key: whole[key] | changes})


@pytest.mark.parametrize("damage, keys, message", [
    (None, dict(), "--run is missing"),
    (None, dict(run="nobody"), "runs/nobody/selection/t3s: no such selection; run select.py --run=nobody first"),
    (None, dict(run="sft", selection="inverse"), "no such selection"),
    (None, dict(run="sft", selection="t3s,inverse"), "no such selection"),
    (None, dict(run="sft", selection="t3s,random,forced"), "name one selection, or two"),
    (None, dict(run="sft", selection=","), "name one selection, or two"),
    (None, dict(run="sft", examples=0), "--examples=0: must be at least 1"),
    (None, dict(run="sft,nobody"), "runs/nobody/log.jsonl: no such file; is nobody the name of a run?"),
    (None, dict(run="sft,../sft"), "--run=../sft: must be the name of a folder in runs/"),
    (None, dict(run="sft", out="report.png"), "names the HTML file"),
    (lambda: damaged("runs/t3s/log.jsonl", '{"step": 1}\n'), dict(run="sft,t3s"), "nothing was recorded"),
    (lambda: damaged("runs/t3s/log.jsonl", '{"step": \n'), dict(run="sft,t3s"), "runs/t3s/log.jsonl: not JSON lines"),
    (lambda: os.unlink("runs/sft/trajectory/000002.npz"), dict(run="sft"), "steps 0 and 2 of data/traces are not both"),
    (lambda: damaged("runs/sft/trajectory/000004.npz", "x"), dict(run="sft"), "not a complete trajectory file"),
    (lambda: shutil.rmtree("runs/sft/trajectory"), dict(run="sft"), "no trajectory"),
    (lambda: edit("runs/sft/config.json", "config", data="data/toy-1/teacher"), dict(run="sft"), "another data set"),
    (lambda: edit("runs/sft/config.json", "config", data="data/none"), dict(run="sft"), "data/none: no such folder"),
])  # fmt: skip
def test_what_cannot_work_is_one_line_and_writes_nothing(here, damage, keys, message):
    if damage:
        damage()
    with pytest.raises(InputError) as error:
        report.main(**keys)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not [path for path in here.rglob("*") if path.suffix in (".html", ".png", ".tmp")]
