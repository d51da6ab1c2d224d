"""The report's page in a real browser: make test-browser."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from s2d2_lmeval.studies.report.page import write_report

from .test_report import POINTS, write_study

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(find_spec("PySide6") is None, reason="make test-browser installs PySide6"),
]

HEADLESS = {
    "QT_QPA_PLATFORM": "offscreen",
    "QTWEBENGINE_DISABLE_SANDBOX": "1",
}
SCHEMES = {"dark": 0, "light": 1}
"""Blink's numbers."""
LINES = "[...document.querySelectorAll('table[data-sortable] tr[data-row]')]"
NAMES = f"{LINES}.filter((line) => !line.hidden).map((line) => line.cells[0].textContent)"
CIRCLES = "[...document.querySelectorAll('svg[data-chart]')].map((svg) => svg.querySelectorAll('circle').length)"


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    swept = {
        f"dynamic confidence_threshold={value}": {
            "decoder": "dynamic",
            "right": range(right),
            "nfe": nfe,
            "seconds": 9.0 * nfe,
            "options": {"confidence_threshold": value},
            "texts": f"from {value}",
        }
        for value, right, nfe in ((0.5, 12, 3), (0.7, 14, 4), (0.9, 17, 5))
    }
    folder = write_study(tmp_path_factory.mktemp("study"), {"ar": POINTS["ar"], "s2d2": POINTS["s2d2"], **swept})
    return write_report(folder)[1][0]


def ask(page: Path, *questions: str, width: int = 1280, scheme: str = "light") -> list[Any]:
    script = [sys.executable, str(Path(__file__).with_name("browser.py")), str(page), str(width), "900"]
    flags = f"--disable-gpu --blink-settings=preferredColorScheme={SCHEMES[scheme]}"
    environment = {**os.environ, **HEADLESS, "QTWEBENGINE_CHROMIUM_FLAGS": flags}
    answered = subprocess.run(
        script, input=json.dumps(questions), env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert answered.returncode == 0, answered.stderr[-2000:]
    found = json.loads(answered.stdout)
    assert found["complaints"] == []
    return list(found["answers"])


def test_charts_show_every_configuration_and_nothing_is_fetched(page: Path) -> None:
    circles, fetched, names = ask(page, CIRCLES, "performance.getEntriesByType('resource').length", NAMES)
    assert circles == [5, 5, 3, 3]  # over forwards, over time, accuracy and forwards over the swept threshold
    assert fetched == 0
    assert names[:2] == ["ar", "s2d2"]


def test_a_slider_goes_through_the_steps(page: Path) -> None:
    shown = "[...document.querySelectorAll('.order')].map((one) => [...one.querySelectorAll('span:not(.open)')].length)"
    move = (
        "(() => {const slider = document.querySelector('input[data-steps]'); slider.value = 1; "
        "slider.dispatchEvent(new Event('input')); return document.querySelector('output').textContent})()"
    )
    whole, said, first, title = ask(page, shown, move, shown, "document.querySelector('.order span').title")
    assert whole == [10, 10, 10]
    assert (said, first) == ("1 of 3", [4, 4, 4])
    assert title == "step 1: accepted"


def test_a_click_on_a_header_sorts(page: Path) -> None:
    click = (
        "(() => {const head = [...document.querySelectorAll('thead button')].find((one) => one.textContent === "
        "'accuracy'); head.click(); return head.parentElement.getAttribute('aria-sort')})()"
    )
    down, best, up, worst = ask(page, click, f"{NAMES}[0]", click, f"{NAMES}[0]")
    assert (down, best, up) == ("descending", "s2d2", "ascending")
    assert worst in ("ar", "dynamic confidence_threshold=0.5")


def test_the_filter_takes_lines_and_points(page: Path) -> None:
    type_in = (
        "(() => {const box = document.querySelector('input[type=search]'); box.value = 'dynamic 0.7'; "
        "box.dispatchEvent(new Event('input')); return 0})()"
    )
    assert ask(page, type_in, NAMES, CIRCLES)[1:] == [["dynamic confidence_threshold=0.7"], [1, 1, 0, 0]]


def test_a_point_says_what_it_is(page: Path) -> None:
    focus = "(() => {document.querySelector('circle[data-row=\"1\"]').focus(); return 0})()"
    _, text, hidden, lit = ask(
        page,
        focus,
        "document.getElementById('tip').textContent",
        "document.getElementById('tip').hidden",
        "document.querySelector('tr.lit').cells[0].textContent",
    )
    assert text.startswith("s2d2\n95.0 %")
    assert "2.00 tokens/forward" in text
    assert (hidden, lit) == (False, "s2d2")


def test_documents_that_differ_are_shown_with_both_texts(page: Path) -> None:
    choose = (
        "(() => {const [one, two] = document.querySelectorAll('select[data-side]'); one.value = 2; two.value = 4; "
        "two.dispatchEvent(new Event('change')); return 0})()"
    )
    lines = "[...document.querySelector('tbody[data-documents]').rows]"
    cells = f"{lines}.map((line) => [...line.cells].map((cell) => cell.textContent))"
    _, shown, said = ask(page, choose, cells, "document.querySelector('[data-count]').textContent")
    assert [line[0] for line in shown] == [str(document) for document in range(12, 17)]
    assert shown[0][1:] == ["0.00", "from 0.5", "1.00", "from 0.9"]
    assert said.startswith("5 of ")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_can_read_it(page: Path, scheme: str) -> None:
    overflow, size, ground = ask(
        page,
        "document.documentElement.scrollWidth - innerWidth",
        "document.querySelector('svg text').getBoundingClientRect().height",
        "getComputedStyle(document.body).backgroundColor",
        width=390,
        scheme=scheme,
    )
    assert overflow <= 0
    assert size > 10
    assert (ground == "rgb(18, 23, 29)") is (scheme == "dark")
