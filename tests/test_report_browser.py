"""plumbing/page.html in a headless Chromium: it opens, colours follow the slider, keys work, nothing is logged.

Needs the Python package playwright and a Chromium: Debian's (apt-get install chromium), or playwright's own
(python -m playwright install chromium). Without them these tests are skipped and say so.
"""

import shutil

import numpy as np
import pytest
import test_report

import data
import report
from plumbing.config import write_json

cycle = test_report.cycle
here = test_report.here
playwright = pytest.importorskip("playwright.sync_api", reason="the browser tests need: pip install playwright")


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        own = shutil.which("chromium") or shutil.which("google-chrome")
        try:
            started = driver.chromium.launch(executable_path=own, args=["--no-sandbox"])
        except playwright.Error as error:
            pytest.skip(f"no Chromium to test the page in: apt-get install chromium ({str(error).splitlines()[0]})")
        yield started
        started.close()


@pytest.fixture
def page(here, browser):
    report.main(run="sft,t3s", selection="t3s,random")
    opened = browser.new_page()
    opened.said = []
    opened.on("console", lambda message: opened.said.append(message.text))
    opened.on("pageerror", lambda error: opened.said.append(str(error)))
    opened.on("request", lambda request: opened.said.append(request.url) if "report.html" not in request.url else None)
    opened.goto((here / "runs/sft/report.html").as_uri())
    opened.wait_for_selector("html[data-ready=yes]", timeout=60_000)
    yield opened
    assert opened.said == []  # no error, no warning, no request
    opened.close()


def marks(page, column=0):
    """The class attribute of every token that is shown."""
    return page.locator(".text").nth(column).locator(".t").evaluate_all("all => all.map((t) => t.className)")


def deltas(example, step):
    train_set = data.load("data/traces")
    _, a, b = train_set.spans[example]
    start, then = (np.load(f"runs/sft/trajectory/{s:06d}.npz")["logprob"][a:b] for s in (0, step))
    return then - start


def test_colours_follow_the_slider(page):
    def expected(delta):
        level = sum(abs(delta) >= least for least in (0.01, 0.05, 0.2, 0.5, 2))
        return f"{'up' if delta > 0 else 'down'} l{level}" if level else ""

    for at, step in ((1, 2), (0, 0), (2, 4)):
        page.locator("#step").fill(str(at))
        assert page.locator("#at").inner_text() == f"{step}" + (" (bottleneck)" if step == 2 else "")
        for found, delta in zip(marks(page), deltas(0, step), strict=True):
            edge = min(abs(abs(delta) / least - 1) for least in (0.01, 0.05, 0.2, 0.5, 2))
            if edge > 1e-3:  # rounded to four digits: on the very edge of a shade either is right
                words = [w for w in found.split() if w in ("up", "down") or w[0] == "l"]
                assert " ".join(words) == expected(delta)


def test_the_two_selections_are_marked_side_by_side(page):
    _, a, b = data.load("data/traces").spans[0]
    for column, name in enumerate(("t3s", "random")):
        kept = np.load(f"runs/sft/selection/{name}/mask.npy")[a:b]
        assert ["out" not in found.split() for found in marks(page, column)] == kept.tolist()
    assert page.locator("#columns h3").all_inner_texts() == [
        "example 0, selection t3s", "example 0, selection random"]  # fmt: skip
    page.locator("#both").uncheck()
    assert page.locator(".text").count() == 1


def test_keys_move_token_example_step_and_filter(page):
    press = page.keyboard.press
    press("ArrowRight")
    press("ArrowRight")
    assert [i for i, found in enumerate(marks(page)) if "here" in found.split()] == [2]
    assert "(3 of" in page.locator("#panel").inner_text()
    delta = float(deltas(0, 2)[2])
    assert page.locator("#delta").inner_text() == f"delta {'−' if delta < 0 else '+'}{abs(delta):.3f} nats"
    press("[")
    assert page.locator("#at").inner_text() == "0" and "+0.000 nats" in page.locator("#delta").inner_text()
    press("]")
    press("f")
    risers = deltas(0, 2)
    clear = [i for i, found in enumerate(marks(page)) if "faint" not in found.split()]
    few = max(1, round(0.05 * len(risers)))
    assert sorted(clear) == sorted(np.argsort(-risers)[:few].tolist())
    press("f")
    press("f")
    assert page.locator("#filter").input_value() == "out"
    assert all(("out" in found.split()) != ("faint" in found.split()) for found in marks(page))
    press("ArrowDown")
    assert page.locator("#columns h3").first.inner_text() == "example 1, selection t3s"
    press("ArrowUp")
    press("ArrowUp")  # there is none before the first
    assert page.locator("#example").input_value() == "1"


def test_hostile_text_is_shown_and_not_run(page):
    page.locator("#example").fill("5")
    page.keyboard.press("Enter")
    shown = page.locator(".text").first.inner_text()
    assert test_report.HOSTILE in shown.replace("\u22c5", "") and "<b>evil</b>" in page.locator("h3").first.inner_text()
    assert page.locator("#columns img, #columns b, #columns script").count() == 0


def test_charts_show_intervals_and_the_bottleneck(page):
    captions = page.locator("figcaption").all_inner_texts()
    for words in ("accuracy on unseen problems", "loss", "bifurcation", "label-free", "delta at the bottleneck"):
        assert any(caption.startswith(words) for caption in captions), words
    first = page.locator("#charts figure").first
    assert first.locator("path.interval").count() == 2 and first.locator("line.mark").count() == 1
    assert "bottleneck: step 2" in first.locator("line.mark title").text_content()
    assert page.locator("rect.bin").count() == 49


def test_gradients_are_drawn_if_mechanism_py_has_measured_them(here, page):
    curves = {"steps": [0, 2, 4], "ratio": [17.0, 2.0, 3.0], "cosine": [0.1, -0.4, 0.2]}
    losses = {"steps": [0, 2, 4], "others_by_anchors": [0.0, 0.1, 0.0], "anchors_by_others": [0.0, 0.2, 0.0]}
    found = {"bottleneck_step": 2, "gradients": curves, "interventions": losses}
    before = page.locator("figcaption").count()
    write_json(here / "runs/sft/mechanism.json", found)
    report.main(run="sft,t3s")
    page.reload()
    page.wait_for_selector("html[data-ready=yes]", timeout=60_000)
    captions = page.locator("figcaption").all_inner_texts()
    assert len(captions) == before + 3
    assert [caption for caption in captions if caption.startswith("gradients of anchors and others")]
    drawn = page.locator("figure", has_text="cosine")
    assert "cosine, step 2: -0.400" in drawn.locator("circle title").nth(1).text_content()


def test_dark_mode_and_print_have_their_own_paper(page):
    def paper():
        return page.evaluate("getComputedStyle(document.body).backgroundColor")

    page.emulate_media(color_scheme="light")
    assert paper() == "rgb(255, 255, 255)"
    page.emulate_media(color_scheme="dark")
    assert paper() == "rgb(20, 22, 26)"
    page.emulate_media(media="print", color_scheme="dark")
    assert paper() == "rgb(255, 255, 255)" and not page.locator(".bar").is_visible()
