"""report.py on a tiny cycle: the numbers of the files, in one page that asks the network for nothing."""

import base64
import json
import math
import re
import shutil
import zlib
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
from plumbing.config import load_select, read_json, write_json

ROOT = Path(__file__).parent.parent
HOSTILE = "</pre></script><script>alert(1)</script><img src=http://example.org/x onerror='a'>&amp;\"5"


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
        student = str(ROOT / "students/toy-1")
        train.main(run="sft", model=student, data="data/traces", eval_data="data/toy-1/unseen", **keys)
        select = load_select()
        select.main(run="sft", bottleneck=2, show=0)
        select.main(run="sft", bottleneck=2, rule="random", show=0)
        select.main(run="sft", bottleneck=4, kind="force", name="forced", show=0)
        train.main(run="t3s", selection="runs/sft/selection/t3s")
    return folder


@pytest.fixture
def here(cycle, tmp_path, monkeypatch):
    """A copy of the runs that a test may damage."""
    shutil.copytree(cycle / "runs", tmp_path / "runs")
    (tmp_path / "data").symlink_to(cycle / "data")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def content(path):
    """What fill_page put into the page."""
    packed = re.search(r'<script id="content" type="text/plain">([^<]*)</script>', Path(path).read_text())[1]
    return json.loads(zlib.decompress(base64.b64decode(packed, validate=True)))


def unpack(text, kind):
    return np.frombuffer(zlib.decompress(base64.b64decode(text)), dtype=kind)


def nats(codes, tokens):
    """The inverse of report.quantise, in float64."""
    most = 32767 if codes.dtype == np.int16 else 127
    scale = math.log1p(tokens["highest"] / tokens["lowest"]) / most
    return np.sign(codes) * tokens["lowest"] * np.expm1(np.abs(codes.astype(np.float64)) * scale)


class Page(HTMLParser):
    """What a browser would see before any script runs."""

    def __init__(self, path):
        super().__init__()
        self.tags = []
        self.feed(Path(path).read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))


def test_one_file_that_asks_the_network_for_nothing(here, capsys):
    assert report.main(run="sft,t3s") == Path("runs/sft/report.html")
    text = Path("runs/sft/report.html").read_text()
    for tag, attributes in Page("runs/sft/report.html").tags:
        assert not {"src", "href", "action", "onclick", "onerror"} & set(attributes), tag
    policies = re.findall(r"content=\"(default-src[^\"]*)\"", text)
    assert policies == ["default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"]
    for word in ("url(", "@import", "import(", "fetch(", "XMLHttpRequest", "innerHTML", "eval("):
        assert word not in text, word
    png = Path("runs/sft/report.png").read_bytes()
    assert png.startswith(b"\x89PNG\r\n\x1a\n") and png.endswith(b"IEND\xaeB`\x82")
    width, height = (int.from_bytes(png[at : at + 4], "big") for at in (16, 20))
    assert width > 1.5 * height > 1000
    assert re.fullmatch(r"runs/sft/report.html \(0.\d MB\) and runs/sft/report.png\n", capsys.readouterr().out)


def test_hostile_text_is_only_ever_data(here):
    report.main(run="sft")
    assert "alert(1)" not in Path("runs/sft/report.html").read_text()
    tokens = content("runs/sft/report.html")["tokens"]
    evil = tokens["examples"][-1]
    assert evil["id"] == "<b>evil</b>" and f"<|user|>{HOSTILE}?" in evil["prompt"]
    shown = "".join(tokens["pieces"][i] for i in unpack(tokens["which"], "<u4"))
    assert f"{HOSTILE}é>7" in shown  # the é is two tokens of this tokenizer, and one character here


def test_every_token_carries_its_own_numbers(here):
    report.main(run="sft", selection="t3s,random")
    tokens, train_set = content("runs/sft/report.html")["tokens"], data.load("data/traces")
    response = np.flatnonzero(train_set.response_mask())
    tracks = {step: np.load(f"runs/sft/trajectory/{step:06d}.npz")["logprob"][response] for step in (0, 2, 4)}
    assert tokens["steps"] == [0, 2, 4] and tokens["dropped_steps"] == 0 and tokens["bits"] == 16
    start = nats(unpack(tokens["start"], "<i2"), tokens)
    assert start == pytest.approx(tracks[0], rel=2e-4, abs=1e-6)
    for step, packed in zip(tokens["steps"], tokens["delta"], strict=True):
        codes = unpack(packed, "<i2")
        exact = tracks[step] - tracks[0]
        assert nats(codes, tokens) == pytest.approx(exact, rel=2e-4, abs=1e-6)
        assert (np.sign(codes) == np.sign(exact))[np.abs(exact) > 1e-6].all()
    for name in ("t3s", "random"):
        mask = np.load(f"runs/sft/selection/{name}/mask.npy")[response]
        assert unpack(tokens["picked"][name], "<f4").tolist() == mask.astype(float).tolist()
    tokenizer = tokenizer_file.load_tokenizer(Path("data/toy-1/untrained"))
    which = unpack(tokens["which"], "<u4")
    at = 0
    for i, example in enumerate(tokens["examples"]):
        texts = [tokens["pieces"][w] for w in which[at : at + example["tokens"]]]
        assert "".join(texts) == tokenizer.decode(train_set.response(i))
        assert len(texts) == len(train_set.response(i))
        at += example["tokens"]


def test_a_forced_selection_and_few_examples(here):
    report.main(run="sft", selection="forced", out="out/forced.html", examples=3)
    found = content("out/forced.html")
    assert found["bottleneck"] == 4 and found["selections"]["forced"]["kind"] == "force"
    assert len(found["tokens"]["examples"]) == 3 and Path("out/forced.png").exists()


def test_long_data_lose_bits_then_steps_but_never_the_bottleneck(here):
    train_set = data.load("data/traces")
    tokenizer = tokenizer_file.load_tokenizer(Path("data/toy-1/untrained"))
    n = len(train_set.tokens)
    rng = np.random.default_rng(0)
    trajectory = {step: {"logprob": rng.normal(size=n).astype(np.float32)} for step in range(0, 40, 2)}
    masks = {"t3s": np.ones(n, dtype=bool)}
    cells = 20 * int(train_set.response_mask().sum())
    for most, bits, steps in ((2 * cells, 16, 20), (cells, 8, 20), (cells // 2, 8, 10), (1, 8, 3)):
        packed = report.pack_tokens(train_set, tokenizer, trajectory, masks, 99, 26, most)
        assert packed["bits"] == bits and len(packed["steps"]) == len(packed["delta"]) <= steps
        assert {0, 26, 38} <= set(packed["steps"]) and packed["dropped_steps"] == 20 - len(packed["steps"])
    delta = trajectory[26]["logprob"] - trajectory[0]["logprob"]
    exact = delta[train_set.response_mask()]
    coarse = nats(unpack(packed["delta"][packed["steps"].index(26)], "<i1"), packed)
    assert coarse == pytest.approx(exact, rel=0.05, abs=1e-3)


def test_the_tables_say_what_the_files_say(here):
    report.main(run="sft,t3s")
    found = content("runs/sft/report.html")
    assert found["stats"] == read_json("runs/sft/selection/t3s/stats.json")
    assert found["stats"]["label_free"].keys() == found["stats"]["accuracy"].keys() == {"0", "2", "4"}
    for run in ("sft", "t3s"):
        logged = [json.loads(line) for line in Path(f"runs/{run}/log.jsonl").read_text().splitlines()]
        logged = [line for line in logged if line.get("event") == "record"]
        shown = found["runs"][run]
        assert shown["steps"] == [line["step"] for line in logged] and shown["problems"] == "unseen"
        for line, (p, low, high), (nll, below, above) in zip(logged, shown["accuracy"], shown["nll"], strict=True):
            assert p == line["eval_accuracy"] and low <= p <= high and high - low > 0.3  # of 4 problems
            assert nll == line["nll"] and below < nll < above


def test_the_loss_interval_is_the_spread_of_a_bootstrap_over_examples(here):
    train_set = data.load("data/traces")
    half = report.loss_spread("sft", "data/traces")
    rng = np.random.default_rng(0)
    for step in (0, 2, 4):
        logprob = np.load(f"runs/sft/trajectory/{step:06d}.npz")["logprob"]
        parts = [-logprob[a:b] for _, a, b in train_set.spans]
        means = []
        for _ in range(4000):
            drawn = [parts[i] for i in rng.integers(len(parts), size=len(parts))]
            means.append(np.concatenate(drawn).mean())
        # five examples of unequal length: the linearised error is right to about a third
        assert half[step] == pytest.approx(1.96 * np.std(means), rel=0.4)


def test_wilson_against_the_root_of_its_equation():
    """The ends are the p whose distance from the estimate is z standard errors of that p."""
    for k, n in ((0, 30), (3, 30), (15, 30), (30, 30)):
        low, high = report.wilson(k / n, n)
        for end in {low, high} - {0.0, 1.0}:
            assert abs(k / n - end) == pytest.approx(1.959964 * math.sqrt(end * (1 - end) / n), rel=1e-6)
        assert low < high and (low == 0) == (k == 0) and (high == 1) == (k == n)


def test_the_histogram_counts_every_token_once():
    delta = np.array([0.0, 1e-4, -1e-4, 0.5, -0.5, 3.0, 1000.0, -1000.0])
    found = report.histogram(delta, delta > 0.1)
    assert sum(found["tokens"]) == 8 and sum(found["picked"]) == 3
    middle = len(found["tokens"]) // 2
    assert found["tokens"][middle] == 3 and found["edges"][middle] == -found["edges"][middle + 1] == -report.LOWEST
    assert found["tokens"][0] == found["tokens"][-1] == 1


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


def test_more_runs_than_colours_are_all_drawn(here):
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


def test_the_gradients_of_mechanism_are_in_the_page_if_they_were_measured(here):
    report.main(run="sft")
    assert content("runs/sft/report.html")["mechanism"] == {}
    found = {"bottleneck_step": 2, "gradients": {"steps": [0, 2], "ratio": [17.0, 2.0], "cosine": [-0.4, 0.1]}}
    write_json(Path("runs/sft/mechanism.json"), found)
    report.main(run="sft")
    assert content("runs/sft/report.html")["mechanism"] == found
