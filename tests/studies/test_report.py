"""From point files to tables, figures and a page."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from s2d2_lmeval.cli import main
from s2d2_lmeval.errors import StudyError
from s2d2_lmeval.harness.identity import of_plain
from s2d2_lmeval.studies.report.page import headline, write_report
from s2d2_lmeval.studies.report.page_data import order_of
from s2d2_lmeval.studies.report.results import _notes, read_results
from s2d2_lmeval.studies.report.tables import COLUMNS, cells, columns_of, latex, markdown, timed
from s2d2_lmeval.studies.report.varied import aup_by_decoder, model_args, varied_options
from s2d2_lmeval.studies.store import PointStore

ENVIRONMENT = {"device": "a machine", "torch": "2"}


def write_study(folder: Path, points: Mapping[str, Mapping[str, Any]], **manifest: Any) -> Path:
    """A folder of results: decoding -> right (documents answered rightly), nfe, seconds and what differs otherwise."""
    listed = {}
    for number, (name, about) in enumerate(points.items()):
        definition = {"number": number}
        digest = of_plain(definition)
        decoder = about.get("decoder", name)
        for_point = {"model": "m", "task": about.get("task", "t"), "decoding": name.partition("#")[0]}
        listed[digest] = {
            **for_point,
            "options": {"decoder": decoder, **about.get("options", {})},
            "seed": about.get("seed", 0),
            "repeat": about.get("repeat", 0),
        }
        with PointStore(folder / "points" / f"{digest}.jsonl") as store:
            store.append("point", definition=definition)
            for _ in range(segments := about.get("segments", 1)):
                environment = about.get("environment", ENVIRONMENT)
                store.begin_segment(environment=environment, rows=8, decoding={"decoder": decoder})
            right = about["right"]
            for document in range(20):
                stats = {"new_tokens": 10, "nfe": about["nfe"], "draft_forwards": about["nfe"], "verify_forwards": 0}
                stats |= {"drafted": 8, "accepted": 6} if decoder == "s2d2" else {"drafted": 0, "accepted": 0}
                order = [[5 + place, place // 4, 1 + place % 2] for place in range(10)]
                elapsed = about["seconds"] * (document + 1) / 20
                content = {"accepted": [6] if decoder == "s2d2" else [], "order": order if document < 2 else None}
                content |= {"pieces": [f" t{place}" for place in range(10)] if document < 2 else None}
                content |= {
                    "stats": stats,
                    "segment": document % segments,
                    "elapsed": elapsed,
                    "document": document,
                    "text": about.get("texts", ""),
                }
                store.append("sample", name=str(document), **content)
            if about.get("failure"):
                store.append("failure", error=about["failure"], traceback="")
            elif about.get("complete", True):
                scores = [[document, float(document in right)] for document in range(20)]
                metrics = {"exact,none": len(right) / 20, "other,none": 0.25, "nfe,decode": 1.0}
                documents = {"exact,none": scores}
                names = {"metric_list": ["exact", "other", "nfe"], "filters": ["none", "decode"]}
                names["samples"] = [str(document) for document in range(20)]
                store.append("result", settings={}, metrics=metrics, documents=documents, **names)
    content = {"name": "x", "code": "1", "models": {"m": "i"}, "baselines": {}, "metrics": {}, "study": {}}
    (folder / "study.json").write_text(json.dumps({**content, "points": listed, **manifest}))
    return folder


POINTS: dict[str, dict[str, Any]] = {
    "ar": {"right": range(12), "nfe": 10, "seconds": 20.0},
    "dynamic 0.9": {"decoder": "dynamic", "right": range(10), "nfe": 4, "seconds": 8.0},
    "dynamic 0.5": {"decoder": "dynamic", "right": range(4), "nfe": 2, "seconds": 4.0},
    "s2d2": {"right": range(19), "nfe": 5, "seconds": 5.0},
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_study(tmp_path, POINTS)


def test_rows(folder: Path) -> None:
    rows = {row.decoding: row for row in read_results(folder).rows}
    s2d2 = rows["s2d2"]
    assert (s2d2.metric, s2d2.documents, s2d2.accuracy) == ("exact,none", 20, 0.95)
    assert s2d2.low < 0.95 < s2d2.high
    assert (s2d2.tokens_per_forward, s2d2.tokens_per_second, s2d2.nfe) == (2.0, 40.0, 5.0)
    assert (s2d2.acceptance, s2d2.acceptance_lengths) == (0.75, {6: 20})
    assert rows["ar"].acceptance is None
    assert (s2d2.speedup_over_ar, s2d2.speedup_over_baseline) == (4.0, 1.6)
    assert {name for name, row in rows.items() if row.on_front} == {"s2d2", "dynamic 0.5"}


def test_the_baseline_is_the_most_accurate_without_verification(folder: Path) -> None:
    rows = {row.decoding: row for row in read_results(folder).rows}
    assert rows["s2d2"].baseline == "dynamic 0.9"
    assert rows["s2d2"].difference == pytest.approx(0.45)
    assert rows["s2d2"].p_value == pytest.approx(3 * 2 * 0.5**9)  # McNemar, three comparisons
    assert rows["dynamic 0.9"].p_value is None
    named = json.loads((folder / "study.json").read_text())
    named["baselines"] = {"dynamic": "dynamic 0.5", "ar": "dynamic 0.9"}
    (folder / "study.json").write_text(json.dumps(named))
    row = next(row for row in read_results(folder).rows if row.decoding == "s2d2")
    assert (row.baseline, row.speedup_over_ar) == ("dynamic 0.5", 1.6)


def test_seeds_are_taken_together(tmp_path: Path) -> None:
    points = {"ar": POINTS["ar"], "ar#2": {**POINTS["ar"], "decoder": "ar", "right": range(4), "seed": 1}}
    (row,) = read_results(write_study(tmp_path, points)).rows
    assert (row.seeds, row.accuracy, row.documents) == ((0, 1), 0.4, 20)
    assert row.scores[5] == [1.0, 0.0]


def test_speed_on_other_hardware_is_not_compared(tmp_path: Path) -> None:
    points = {**POINTS, "s2d2": {**POINTS["s2d2"], "environment": {"device": "another"}}}
    rows = {row.decoding: row for row in read_results(write_study(tmp_path, points)).rows}
    assert (rows["s2d2"].speedup_over_ar, rows["s2d2"].speedup_over_baseline) == (None, None)
    assert rows["s2d2"].difference is not None


def test_what_is_missing_or_doubtful_is_said(tmp_path: Path) -> None:
    points = {
        **POINTS,
        "broken": {**POINTS["ar"], "failure": "logits are not finite"},
        "unfinished": {**POINTS["ar"], "complete": False},
        "interrupted": {**POINTS["ar"], "decoder": "ar", "segments": 3},
    }
    folder = write_study(tmp_path, points)
    (folder / "points" / "stray.jsonl").write_text("{}\n")
    first = next(iter(json.loads((folder / "study.json").read_text())["points"]))
    with (folder / "points" / f"{first}.jsonl").open("a") as file:
        file.write("garbage\n")
    results = read_results(folder)
    said = " ".join(results.problems)
    for expected in (
        "broken, seed 0 failed: logits",
        "unfinished, seed 0 is not complete (20",
        "1 unreadable",
        "1 files",
    ):
        assert expected in said
    assert {row.decoding for row in results.rows} == {*POINTS, "interrupted"}
    assert "interrupted 2 times" in next(row for row in results.rows if row.decoding == "interrupted").notes[0]


@pytest.mark.parametrize(
    ("metric", "value"), [("other", 0.25), ("other,none", 0.25), (None, 0.6)], ids=["name", "name and filter", "none"]
)
def test_metrics_by_name(tmp_path: Path, metric: str | None, value: float) -> None:
    folder = write_study(tmp_path, {"ar": POINTS["ar"]}, metrics={"t": metric})
    assert read_results(folder).rows[0].accuracy == value


def test_a_metric_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match=r"no metric accuracy; the task has: exact,none"):
        read_results(write_study(tmp_path, {"ar": POINTS["ar"]}, metrics={"t": "accuracy"}))


def test_folders_without_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path)]) == 2
    assert "run `s2d2-lmeval sweep` first" in capsys.readouterr().err
    with pytest.raises(StudyError, match="no complete point"):
        read_results(write_study(tmp_path, {"ar": {**POINTS["ar"], "complete": False}}))


def test_tables(folder: Path) -> None:
    rows = read_results(folder).rows
    assert cells(COLUMNS, rows)[1][3][:4] == ["s2d2", "95.0", "76.4–99.1", "+45.0"]
    lines = markdown(rows).splitlines()
    assert (
        lines[0].count("|") == lines[-1].count("|") == len(COLUMNS) - 4 + 1
    )  # three kinds of forwards did not occur, timed once
    assert lines[-1].startswith("| **s2d2** | 95.0 |")
    text = latex(rows)
    assert r"\textbf{s2d2} & 95.0 & 76.4--99.1" in text
    assert r"75 \%" in text
    assert "prefill" not in text  # empty in every row
    assert text.count(r"\begin{") == text.count(r"\end{") == 2
    body = text[text.index(r"\midrule") :]
    assert {line.count("&") for line in body.splitlines() if line.endswith(r"\\")} == {
        next(line for line in text.splitlines() if line.startswith("decoding")).count("&")
    }


def test_the_headline_is_no_worse_than_the_baseline(folder: Path) -> None:
    found = headline(read_results(folder).rows)
    assert found["speed"] == "2.00× ar's tokens/forward"
    assert found["text"] == "s2d2: accuracy 95.0 %; timed once: 40 tokens/s, 4.00× ar's"


def test_the_page_needs_nothing_else(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(folder)]) == 0
    assert "s2d2" in capsys.readouterr().out
    page = (folder / "report" / "index.html").read_text(encoding="utf-8")
    assert len(re.findall(r'src="data:image/svg\+xml;base64,', page)) == 1
    assert re.findall(r'(?:src|href)="(?!data:|#)', page) == []
    assert "◆" in page
    figures = {path.name for path in (folder / "report" / "figures").glob("*.png")}
    expected = ("m_accuracy_and_tokens_per_second", "m_accuracy_and_tokens_per_forward", "m_t_acceptance", "m_t_order")
    assert figures == {f"{name}.png" for name in expected}
    written = json.loads((folder / "report" / "results.json").read_text())
    assert [row["decoding"] for row in written["rows"]] == list(POINTS)


def test_what_was_varied_is_a_column_and_a_line_to_copy(tmp_path: Path) -> None:
    found = {"decoder": "dynamic", "right": range(9), "nfe": 4, "seconds": 8.0}
    points = {
        "ar": POINTS["ar"],
        "trial 0": {**found, "options": {"confidence_threshold": 0.5, "block_length": 8}},
        "trial 1": {**found, "options": {"confidence_threshold": 0.25, "block_length": 8}},
    }
    models = {"m": {"pretrained": "a/b", "dtype": "bfloat16"}}
    results = read_results(write_study(tmp_path, points, study={"models": models}))
    assert varied_options(results.rows) == ["confidence_threshold"]
    header, lines = cells(columns_of(results.rows), results.rows)
    assert header[:2] == ["decoding", "accuracy"]
    assert header[-1] == "confidence_threshold"
    assert [line[-1] for line in lines] == ["", "0.5", "0.25"]
    arguments = model_args(results.rows[2], results.models)
    assert arguments == "pretrained=a/b,dtype=bfloat16,decoder=dynamic,confidence_threshold=0.25,block_length=8"
    assert f"Copy --model_args {arguments}" in write_report(tmp_path)[1][0].read_text(encoding="utf-8")


def test_the_same_forwards_are_the_same_pace(tmp_path: Path) -> None:
    same = {"decoder": "dynamic", "right": range(12), "nfe": 4}
    points = {"ar": POINTS["ar"], "a": {**same, "seconds": 8.0}, "b": {**same, "seconds": 10.0}}
    rows = {row.decoding: row for row in read_results(write_study(tmp_path, points)).rows}
    assert (rows["a"].tokens_per_second, rows["b"].tokens_per_second) == (25.0, 20.0)
    assert rows["a"].pace == rows["b"].pace == 22.5
    assert {name for name, row in rows.items() if row.on_front} == {"a", "b"}


def test_accuracy_under_parallelism_is_per_decoder(folder: Path) -> None:
    entries = {entry["decoder"]: entry for entry in aup_by_decoder(read_results(folder).rows)}
    assert list(entries) == ["s2d2", "dynamic", "ar"]
    assert entries["s2d2"]["aup"] == pytest.approx(2.0 * 95)
    assert (entries["dynamic"]["settings"], entries["dynamic"]["left_out"]) == (2, 1)
    assert "Accuracy under parallelism" in (write_report(folder)[1][1]).read_text(encoding="utf-8")


def test_names_are_escaped(tmp_path: Path) -> None:
    folder = write_study(tmp_path, {"<b> & a_b|c": {**POINTS["ar"], "decoder": "ar"}})
    write_report(folder)
    page = (folder / "report" / "index.html").read_text(encoding="utf-8")
    assert "<b> &" not in page
    assert "&lt;b&gt; &amp; a_b|c" in page
    assert r"a_b\|c" in (folder / "report" / "tables.md").read_text()
    assert r"$<$b$>$ \& a\_b" in (folder / "report" / "tables.tex").read_text()


def test_shared_budgets_of_sliding_are_said() -> None:
    def noted(**decoding: object) -> tuple[str, ...]:
        return _notes([], [{"environment": {}, "decoding": decoding}])

    assert "rows share their budgets" in noted(decoder="sliding", share_budget=True, acceptance="keyed")[0]
    assert not noted(decoder="sliding", share_budget=False, acceptance="keyed")
    assert not noted(decoder="sliding", share_budget=True, acceptance="rejection")
    assert not noted(decoder="ar")


def test_repeated_timings_make_an_interval_and_overlaps_are_ties(tmp_path: Path) -> None:
    timings = {"slow": (20.0, 21.0, 19.0), "even": (10.1, 9.9, 10.0), "better": (10.3, 9.7, 10.2)}
    right = {"slow": 12, "even": 10, "better": 11}
    points = {
        f"{name}#{repeat}": {"right": range(right[name]), "nfe": place + 2, "seconds": seconds, "repeat": repeat}
        for place, (name, several) in enumerate(timings.items())
        for repeat, seconds in enumerate(several)
    }
    results = read_results(write_study(tmp_path, {one: {"decoder": "dynamic", **more} for one, more in points.items()}))
    rows = {row.decoding: row for row in results.rows}
    assert [len(row.timings) for row in rows.values()] == [3, 3, 3]
    even = rows["even"]
    assert even.documents == 20
    assert even.tokens_per_second == pytest.approx(20.0)
    assert even.paces == pytest.approx((19.504, 20.497), abs=0.01)
    # "even" may be faster than "better" by a hair; the intervals overlap, so the more accurate one counts.
    assert {name for name, row in rows.items() if row.on_front} == {"slow", "better"}
    header, lines = cells(columns_of(results.rows), results.rows)
    assert lines[1][header.index("95 % of tokens/s")] == "19.5–20.5"
    assert timed(results.rows) == "timed 3 times in turn"
    told = headline(results.rows)["text"]
    assert "timed 3 times in turn: 10 tokens/s (9–11)" in told


def test_repeats_with_other_answers_are_told(tmp_path: Path) -> None:
    points = {
        f"a#{repeat}": {**POINTS["ar"], "decoder": "ar", "repeat": repeat, "texts": str(repeat)} for repeat in (0, 1)
    }
    (row,) = read_results(write_study(tmp_path, points)).rows
    assert row.notes == ("20 answers differ between repeats: the first one's count",)


def test_the_page_tells_which_token_each_step_decided(folder: Path) -> None:
    rows = read_results(folder).rows
    told = order_of(rows)
    assert told is not None
    assert [rows[entry["number"]].decoder for entry in told["rows"]] == ["dynamic", "s2d2", "ar"]
    assert told["rows"][0]["places"][:5] == [[1, 1, " t0"], [1, 2, " t1"], [1, 1, " t2"], [1, 2, " t3"], [2, 1, " t4"]]
    page = write_report(folder)[1][0].read_text(encoding="utf-8")
    assert page.count('data-order="') == 3
    assert "m_t order" not in page  # the figure stays a file
    for row in rows:
        row.pieces = {}
    assert order_of(rows) is None
