"""doctor --ar-quality: the paired comparison of the autoregressive mode with block decoding, and what it concludes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from s2d2_lmeval.cli import demo, main
from s2d2_lmeval.cli.doctor.ar_quality import ar_quality
from s2d2_lmeval.errors import ConfigError


def results(scores: Sequence[float]) -> dict[str, Any]:
    """What the harness logs of a task with two answer filters and one of decoding statistics."""
    samples = [
        {
            "doc_id": document,
            "filter": name,
            "metrics": ["exact_match"],
            "exact_match": score if name == "strict" else 1,
        }
        for name in ("strict", "flexible")
        for document, score in enumerate(scores)
    ]
    samples += [{"doc_id": i, "filter": "decode", "metrics": ["nfe"], "nfe": 3.0} for i in range(len(scores))]
    return {"samples": {"some_task": samples}}


@pytest.mark.parametrize(
    ("ar", "dynamic", "said"),
    [
        ([1.0] * 20, [1.0] * 8 + [0.0] * 12, "the autoregressive mode is more accurate"),
        ([1.0] * 8 + [0.0] * 12, [1.0] * 20, "block decoding is more accurate"),
        ([1.0] * 20, [1.0] * 18 + [0.0] * 2, "no difference found"),
    ],
)
def test_what_it_concludes(monkeypatch: pytest.MonkeyPatch, ar: list[float], dynamic: list[float], said: str) -> None:
    asked: list[Any] = []

    def evaluate(path: str, options: dict[str, str], tasks: list[str], **_: int) -> dict[str, Any]:
        asked.append((path, options["decoder"], tasks))
        return results(list({"ar": ar, "dynamic": dynamic}[options["decoder"]]))

    monkeypatch.setattr(demo, "evaluate", evaluate)
    task, so = ar_quality("toy", "some_task", limit=20, rows=8)
    assert asked == [("toy", "ar", ["some_task"]), ("toy", "dynamic", ["some_task"])]
    assert f"exact_match {sum(ar) / 20:.3f} by ar, {sum(dynamic) / 20:.3f} by dynamic on 20 documents" in task.value
    assert said in so.value
    assert so.state == ("note" if "block decoding is more accurate" in said else "ok")


def test_refusals(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match="name one, as in doctor toy"):
        list(ar_quality(None, None, limit=1, rows=1))
    with pytest.raises(ConfigError, match="--tasks s2d2_gsm8k"):
        list(ar_quality("some/folder", None, limit=1, rows=1))
    assert main(["doctor", "--ar-quality"]) == 2
    assert "name one" in capsys.readouterr().err
