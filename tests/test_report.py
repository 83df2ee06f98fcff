"""report.py on a tiny cycle: one file without scripts, hostile text escaped, the files' numbers, one-line errors."""

import base64
import json
import math
import os
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from worlds import inside, make_world

import data
import report
import train
from hf import tokenizer as tokenizer_file
from plumbing import runs
from plumbing.config import InputError, load_select, read_json, write_json

ROOT = Path(__file__).parent.parent
HOSTILE = "</pre><script>alert(1)</script><img src=http://example.org/x onerror='a'>&amp;\"5"


@pytest.fixture(scope="module")
def cycle(tmp_path_factory):
    """Two runs of student 1 on five traces, one of them hostile, recorded at steps 0, 2 and 4."""
    folder = make_world(tmp_path_factory.mktemp("cycle"), teacher=4, unseen=4, cut=None, students=())
    with inside(folder):
        lines = Path("data/toy-1/teacher.jsonl").read_text()
        line = json.dumps({"id": "<b>evil</b>", "prompt": HOSTILE + "?", "response": f"{HOSTILE}é>7", "answer": 7})
        Path("traces.jsonl").write_text(lines + line + "\n")
        data.main(source="traces.jsonl", tokenizer="data/toy-1/untrained", out="data/traces", verifier="toy")
        keys = dict(steps=4, batch_size=0, lr=2e-3, schedule="constant", record_every=2, max_new_tokens=50)
        train.main(run="sft", model=str(ROOT / "students/toy-1"), data="data/traces", eval_data="data/toy-1/unseen",
                   **keys)  # fmt: skip
        load_select().main(run="sft", bottleneck=2, show=0)
        load_select().main(run="sft", bottleneck=4, kind="force", name="forced", show=0)
        train.main(run="t3s", selection="runs/sft/selection/t3s")
    return folder


@pytest.fixture
def here(cycle, tmp_path, monkeypatch):
    """A copy of the runs that a test may damage."""
    shutil.copytree(cycle / "runs", tmp_path / "runs")
    (tmp_path / "data").symlink_to(cycle / "data")
    monkeypatch.chdir(tmp_path)
    return tmp_path


class Page(HTMLParser):
    """What a browser would see: the tags with their attributes, and the text."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.text = [], []
        self.feed(Path(path).read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes), len(self.text)))

    def handle_data(self, text):
        self.text.append(text)

    def spans(self):
        """(attributes, text) of every span: the prompts and the tokens."""
        return [(attributes, self.text[at]) for tag, attributes, at in self.tags if tag == "span"]


def test_one_file_that_refers_to_nothing(here, capsys):
    assert report.main(run="sft,t3s") == Path("runs/sft/report.html")
    page, png = Page("runs/sft/report.html"), Path("runs/sft/report.png").read_bytes()
    assert {tag for tag, _, _ in page.tags} == {
        "html", "meta", "title", "style", "h1", "h2", "h3", "p", "img", "table", "tr", "th", "td", "code", "div", "pre",
        "span"}  # fmt: skip
    names = {name for _, attributes, _ in page.tags for name in attributes}
    assert names == {"lang", "charset", "alt", "src", "class", "style", "title"}  # no href, no on...
    [image] = [attributes["src"] for tag, attributes, _ in page.tags if tag == "img"]
    assert base64.b64decode(image.removeprefix("data:image/png;base64,"), validate=True) == png
    assert png.startswith(b"\x89PNG\r\n\x1a\n") and png.endswith(b"IEND\xaeB`\x82")
    width, height = (int.from_bytes(png[at : at + 4], "big") for at in (16, 20))
    assert width > 2.5 * height > 1000
    assert "url(" not in Path("runs/sft/report.html").read_text() and "@import" not in "".join(page.text)
    assert capsys.readouterr().out == "runs/sft/report.html and runs/sft/report.png\n"


def test_hostile_text_stays_text(here):
    report.main(run="sft")
    page = Page("runs/sft/report.html")
    seen = "".join(text for attributes, text in page.spans() if "title" in attributes)
    assert HOSTILE.replace("é", "") in seen and f"<|user|>{HOSTILE}?" in "".join(page.text)
    assert "example <b>evil</b>" in "".join(page.text)


def test_every_token_carries_its_own_numbers(here):
    report.main(run="sft")
    tokens = [(attributes, text) for attributes, text in Page("runs/sft/report.html").spans() if "title" in attributes]
    train_set, mask = data.load("data/traces"), np.load("runs/sft/selection/t3s/mask.npy")
    start, bottom = (np.load(f"runs/sft/trajectory/{step:06d}.npz")["logprob"] for step in (0, 2))
    tokenizer = tokenizer_file.load_tokenizer(Path("data/toy-1/untrained"))
    response = np.flatnonzero(train_set.response_mask())
    assert len(tokens) == len(response)
    for (attributes, text), t in zip(tokens, response, strict=True):
        delta = bottom[t] - start[t]
        assert text == tokenizer.decode([train_set.tokens[t]])
        assert attributes["title"] == (f"p {math.exp(start[t]):.3f} at step 0, {math.exp(bottom[t]):.3f} at step 2; "
                                       f"delta {delta:+.3f}")  # fmt: skip
        assert attributes.get("class") == (None if mask[t] else "keep") and mask[t] == (delta <= 0)
        red, green, blue = map(int, re.fullmatch(r"background:rgb\((\d+),(\d+),(\d+)\)", attributes["style"]).groups())
        assert blue == 255 if delta > 0 else red == 255
        assert all(0 <= c <= 255 for c in (red, green, blue)) and (abs(delta) < 1e-3 or min(red, green, blue) < 255)


def test_forced_tokens_are_the_marked_ones(here):
    """A selection for diffusion students, of another bottleneck."""
    report.main(run="sft", selection="forced", out="out/forced.html", examples=3)
    page, mask = Page("out/forced.html"), np.load("runs/sft/selection/forced/mask.npy")
    tokens = [attributes.get("class") for attributes, _ in page.spans() if "title" in attributes]
    train_set = data.load("data/traces")
    response = np.flatnonzero(train_set.response_mask())
    shown = response[response < train_set.spans[2, 2]]
    assert tokens == ["force" if forced else None for forced in mask[shown]] and "force" in tokens
    text = "".join(page.text)
    assert f"{mask[response].mean():.1%} are always masked" in text and "Underlined: always masked" in text
    assert "Bottleneck at step 4" in text and Path("out/forced.png").exists()


def test_the_tables_say_what_the_files_say(here):
    report.main(run="sft,t3s")
    text = Path("runs/sft/report.html").read_text()
    stats = read_json("runs/sft/selection/t3s/stats.json")
    assert f"Of {stats['response_tokens']:,} response tokens {stats['share']:.1%} stay in the loss" in text
    for t in stats["anchor_tokens"] + stats["yet_to_learn_tokens"]:
        row = f"<td>{t['count']}</td><td>{t['seen']}</td><td>{t['mean_delta']:+.3f}</td>"
        assert row in text
    for run in ("sft", "t3s"):
        logged = [json.loads(line) for line in Path(f"runs/{run}/log.jsonl").read_text().splitlines()]
        logged = [line for line in logged if line.get("event") == "record"]
        lowest = min(logged, key=lambda line: line["eval_accuracy"])
        cells = "".join(f"<td>{line['eval_accuracy']:.1%}</td><td>{line['nll']:.3f}</td>"
                        for line in (logged[0], lowest, logged[-1]))  # fmt: skip
        assert f"<tr><td>{run}</td>{cells}<td>{lowest['step']}</td></tr>" in text


def test_records_and_bifurcation_against_the_files(here):
    curve = runs.records("sft")
    assert curve["step"].tolist() == [0, 2, 4] and set(curve) == {"step", "nll", "accuracy", "eval_accuracy"}
    tracks = [np.load(f"runs/sft/trajectory/{step:06d}.npz")["logprob"] for step in (0, 2, 4)]
    response = data.load("data/traces").response_mask()
    assert curve["nll"] == pytest.approx([-t[response].mean() for t in tracks], abs=1e-4)
    steps, anchors, falling, low = report.bifurcation("sft", Path("runs/sft/selection/t3s"))
    assert steps == [0, 2, 4] and low == 2
    for found, sign in ((anchors, 1), (falling, -1)):
        for value, track in zip(found, tracks, strict=True):
            moved = [float(track[t] - tracks[0][t]) for t in np.flatnonzero(response)
                     if sign * (tracks[1][t] - tracks[0][t]) > 0]  # fmt: skip
            assert value == pytest.approx(np.mean(moved), abs=1e-5)
    assert anchors[0] == falling[0] == 0 and anchors[1] > 0 > falling[1]


def test_more_runs_than_colours(here):
    """Eight curves: none is left out without a word."""
    import matplotlib.pyplot as plt

    drawn, close = [], plt.close
    for i in range(8):
        shutil.copytree("runs/t3s", f"runs/copy-{i}")
    names = [f"copy-{i}" for i in range(8)]
    plt.close = lambda fig: drawn.append([line.get_label() for line in fig.axes[0].get_lines()]) or close(fig)
    try:
        report.figure({name: [name] for name in names}, ["sft"], "all.png", Path("runs/sft/selection/t3s"))
    finally:
        plt.close = close
    assert drawn == [[*names, "bottleneck of pass 1"]]


def test_several_seeds_are_a_mean_and_a_band(here):
    shutil.copytree("runs/sft", "runs/again")
    groups = {"sft": ["sft", "again"], "t3s": ["t3s"]}
    report.figure(groups, groups["sft"], "two.png", Path("runs/sft/selection/t3s"))
    assert Path("two.png").read_bytes().startswith(b"\x89PNG")


def damaged(path, text):
    Path(path).write_text(text)


@pytest.mark.parametrize("damage, keys, message", [
    (None, dict(), "--run is missing"),
    (None, dict(run="nobody"), "runs/nobody/selection/t3s: no such selection; run select.py --run=nobody first"),
    (None, dict(run="sft", selection="inverse"), "no such selection"),
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


def edit(path, key, **changes):
    whole = read_json(path)
    write_json(path, whole | {key: whole[key] | changes})
