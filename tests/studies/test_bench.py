"""`s2d2-lmeval bench`: what is measured, beside what, and that it says what it did. No test looks at a clock."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from s2d2_lmeval import load
from s2d2_lmeval.cli import main
from s2d2_lmeval.runtime.runner import Runner
from s2d2_lmeval.studies.bench import launches
from s2d2_lmeval.studies.bench import measuring as bench
from s2d2_lmeval.studies.bench import random_weights as shapes
from s2d2_lmeval.studies.bench.measuring import PLAIN
from s2d2_lmeval.studies.bench.plain import PlainS2D2
from s2d2_lmeval.studies.bench.random_weights import Script, follow_script

TINY: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 64,
}


@pytest.fixture(autouse=True)
def tiny_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(shapes.SHAPES, "tiny", TINY)
    monkeypatch.setattr(bench, "copy_bandwidth", lambda device: 1e9)


def run(tmp_path: Path, *arguments: str) -> dict[str, Any]:
    output = tmp_path / "deep" / "bench.json"
    small = ["--model", "tiny", "--prompts", "3", "--prompt-length", "6", "--new-tokens", "8", "--repeats", "1"]
    assert main(["bench", *small, "--block-length", "4", "--output", str(output), "--device", "cpu", *arguments]) == 0
    return json.loads(output.read_text())


def test_a_table_and_a_file_with_everything(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = run(tmp_path, "--batch", "1,2")
    names = [one["name"] for one in report["measurements"]]
    entries = ["ar", "dynamic", "s2d2", "s2d2:reference", "s2d2:lookahead", "sliding"]
    generate = [f"transformers generate, {kind} cache" for kind in ("dynamic", "static")]
    assert names == [*generate, *generate, PLAIN, *(entry for entry in entries for _ in range(2))]
    assert {one["batch"] for one in report["measurements"] if one["name"] == "s2d2"} == {1, 2}
    for one in report["measurements"]:
        assert one["tokens_per_second"] > 0
        assert one["over_plain"] == one["tokens_per_second"] / report["measurements"][4]["tokens_per_second"]
    for one in report["measurements"][5:]:
        assert one["decode_tokens_per_second"] >= one["tokens_per_second"]
        assert one["tokens_per_forward"] == pytest.approx(3 * 8 / sum(one["forwards"].values()))
        assert one["milliseconds"] > 0
        assert one["over_floor"] == pytest.approx(one["milliseconds"] / report["floor_milliseconds"])
        assert 0 < one["outside"] < 1
    ar = next(one for one in report["measurements"] if one["name"] == "ar")
    assert ar["tokens_per_forward"] == 1
    reference = next(one for one in report["measurements"] if one["name"] == "s2d2:reference")
    assert reference["forwards"]["commit"] == 3 * 3  # three blocks hold six and eight tokens, all but the first place
    assert report["environment"]["device_type"] == "cpu"
    assert report["environment"]["dtype"] == "float32"
    assert report["environment"]["torch"] == torch.__version__
    assert not report["scripted"]
    out = " ".join(capsys.readouterr().out.split())
    assert "sliding" in out
    assert "The floor reads the weights once" in out
    assert "Scripted" not in out


def test_scripted_acceptance_is_said_and_followed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    entries = "s2d2:reference+acceptance=greedy+do_verify_policy=mask_span_length"
    found = {}
    for rate in ("0.0", "1.0"):
        report = run(tmp_path, "--decoders", entries, "--batch", "2", "--scripted-acceptance", rate)
        assert report["scripted"]
        assert f"{float(rate):.0%} of drafted tokens are correct" in " ".join(capsys.readouterr().out.split())
        found[rate] = report["measurements"][-1]["tokens_per_forward"]
    assert found["1.0"] > 1.2 * found["0.0"]


def test_baselines_may_be_left_out(tmp_path: Path) -> None:
    report = run(tmp_path, "--decoders", "ar", "--batch", "1", "--no-baselines")
    assert [one["name"] for one in report["measurements"]] == ["ar"]
    assert report["measurements"][0]["over_plain"] is None


def test_a_plot(tmp_path: Path) -> None:
    path = tmp_path / "new" / "bench.svg"
    run(tmp_path, "--decoders", "ar,dynamic", "--batch", "1,2", "--no-baselines", "--plot", str(path))
    assert "batch 2" in path.read_text() or path.stat().st_size > 5000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--batch", "1,many"], "whole numbers separated by commas"), (["--decoders", "greedy"], "decoder='greedy'")],
)
def test_wrong_arguments(
    tmp_path: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    small = ["--model", "tiny", "--prompts", "2", "--new-tokens", "4", "--no-baselines", "--device", "cpu"]
    assert main(["bench", *small, *arguments]) != 0
    assert message in " ".join(capsys.readouterr().err.split())


def test_more_tokens_than_the_context_holds(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--new_tokens", "500", "--prompts", "1"]) == 2
    assert "asks for 500 more, but the context holds 512" in " ".join(capsys.readouterr().err.split())


def test_the_floor_reads_every_weight_but_the_embedding_table() -> None:
    plain = shapes.random_model("tiny", torch.device("cpu"), torch.float32)
    weights = sum(weight.numel() for weight in plain.parameters())
    assert bench.floor_milliseconds(plain) == pytest.approx(1000 * 4 * (weights - 64 * 32) / 1e9)
    plain.lm_head.weight = plain.model.embed_tokens.weight
    assert bench.floor_milliseconds(plain) == pytest.approx(1000 * 4 * (weights - 64 * 32) / 1e9)


def test_the_plain_loop_writes_what_the_engine_writes() -> None:
    """The loop that speed is measured against is right: same tokens, one forward per draft, verification and commit."""
    plain = shapes.random_model("tiny", torch.device("cpu"), torch.float32)
    engine = load(
        shapes.random_model("tiny", torch.device("cpu"), torch.float32), family="sdar", mask_token_id=63, block_length=4
    )

    def no_mask(logits: torch.Tensor, position: torch.Tensor, draft: bool, cached: int) -> torch.Tensor:
        logits[:, 63] = -torch.inf
        return logits

    options = {
        "block_length": 4,
        "max_new_tokens": 10,
        "acceptance": "greedy",
        "do_verify_policy": "mask_span_length",
        "remasking_strategy": "low_confidence_static",
        "schedule": "reference",
        "cache_ver": True,
        "draft_ver": True,
    }
    for prompt in ([5, 7, 9], [1, 2, 3, 4], list(range(11))):
        loop = PlainS2D2(plain, 63, 4, no_mask)
        expected = engine.generate([prompt], options)[0]
        assert loop.generate(prompt, 10)[:10] == expected.token_ids
        assert loop.forwards == expected.stats["nfe"]


def test_a_script_accepts_at_its_rate() -> None:
    plain = shapes.random_model("tiny", torch.device("cpu"), torch.float32)
    model = load(plain, family="sdar", mask_token_id=63, block_length=4, max_batch=4)
    for rate in (0.3, 0.9):
        scripted = follow_script(model, Script(rate, 64))
        options = {
            "block_length": 16,
            "max_new_tokens": 64,
            "acceptance": "greedy",
            "do_verify_policy": "mask_span_length",
        }
        scripted.generate([[1, 2, 3]] * 20, options, seeds=list(range(20)))
        totals = scripted.trace.totals()
        # An accepted prefix ends at the first wrong token: of n drafts the expected share follows from the rate alone.
        assert totals["accepted"] / (totals["accepted"] + totals["verify_forwards"]) == pytest.approx(rate, abs=0.12)


@pytest.mark.parametrize(
    ("in_turn", "expected"),
    [(True, ["a0", "b0", "a1", "b1", "a1", "b1"]), (False, ["a0", "a1", "a1", "b0", "b1", "b1"])],
)
def test_contenders_run_in_turn_or_one_after_the_other(in_turn: bool, expected: list[str]) -> None:
    ran, told = [], []

    def contender(name: str) -> bench.Contender:
        seconds = iter((100.0, 1.0, 4.0))

        def run(warms_up: bool) -> dict[str, Any]:
            ran.append(f"{name}{int(not warms_up)}")
            return {"tokens_per_second": next(seconds), "forwards": {"all": 3}, "outside": None}

        return bench.Contender(name, 2, run)

    found = bench.measure_all([contender("a"), contender(PLAIN)], 2, in_turn, told.append)
    assert ran == [one.replace("b", PLAIN) for one in expected]
    median = {"batch": 2, "tokens_per_second": 2.5, "forwards": {"all": 3}, "outside": None, "over_plain": 1.0}
    assert found == [{"name": "a", **median}, {"name": PLAIN, **median}], "warming up does not count"
    assert told[0] == "a, batch 2, warming up"
    assert told[-1] == f"{PLAIN}, batch 2, 2 of 2"


def test_answers_are_scored_and_compared(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    written = tmp_path / "answers.json"
    decoders = "ar,sliding,dynamic+confidence_threshold=0.3"
    command = ["bench", "--answers", "--prompts", "3", "--batch", "4", "--decoders", decoders, "--output", str(written)]
    assert main(command) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any("sliding" in line and "9 of 9" in line for line in lines)
    found = {(one["name"], one["corpus"]): one for one in json.loads(written.read_text())["answers"]}
    assert len(found) == 9
    assert found["ar", "programs"]["tokens_per_forward"] == 1.0
    assert found["ar", "programs"]["accuracy"] == found["sliding", "programs"]["accuracy"]
    assert found["sliding", "programs"]["tokens_per_forward"] > 2
    assert main(["bench", "--answers", "--model", "sdar-100m"]) == 2


def test_launches(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "launches.json"
    few = ["bench", "--launches", "--model", "tiny", "--batch", "1,2", "--new_tokens", "6", "--output", str(output)]
    assert main([*few, "--decoders", "ar,s2d2:lookahead+block_length=8"]) == 0
    rows = json.loads(output.read_text())["launches"]
    assert [(row["decoder"], row["schedule"], row["batch"]) for row in rows] == [
        *(("ar", None, batch) for batch in (1, 2)),
        *(("s2d2", "lookahead", batch) for batch in (1, 2)),
    ]
    for row in rows:
        assert row["same_tokens"]
        assert row["captures"] > 0
        assert row["replayed_share"] > 0
        assert row["launches_replayed"] > 0
        assert row["uploads"] > 0
        assert row["reads"] == 1
        assert row["capture_faults"] == row["device_mismatches"] == row["races"] == 0
    shown = capsys.readouterr().out
    assert "s2d2:lookahead" in shown
    assert "outside graphs" in shown
    assert main([*few, "--repeats", "2", "--device", "cuda"]) == 2
    assert "does not take --repeats, --device" in capsys.readouterr().err


def test_a_random_drafter_for_random_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = run(tmp_path, "--draft", "random", "--decoders", "ar,ddtree,dflash", "--batch", "2")
    assert [one["name"] for one in report["measurements"]] == ["ar", "ddtree", "dflash"]
    assert report["measurements"][1]["forwards"]["drafter"] > 0
    assert main(["bench", "--model", "tiny", "--draft", "toy"]) == 2
    assert "give random" in capsys.readouterr().err


def test_launches_of_everything_that_fits() -> None:
    entries = launches.every_entry(load("toy"))
    assert {entry.partition(":")[0] for entry in entries} == set(load("toy").facts.decoders)
    assert {"s2d2:reference", "s2d2:fused", "s2d2:lookahead", "sliding"} <= set(entries)
    assert {"ddtree:fused", "dflash:fused"} <= set(launches.every_entry(load("toy", draft="toy")))


def test_what_a_gpu_stumbles_over_is_in_the_row(monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(shapes.random_model("tiny", torch.device("cpu"), torch.float32), mask_token_id=63, block_length=4)
    real = Runner.run

    def run_pass(self: Any, *arguments: Any) -> torch.Tensor:
        logits: torch.Tensor = real(self, *arguments)
        return logits + torch.zeros(1, logits.shape[1], device="cpu")

    monkeypatch.setattr(Runner, "run", run_pass)
    row = launches.count_launches(model, {"decoder": "ar", "max_new_tokens": 4}, 1, [[1, 2, 3]])
    assert "same device" in row["error"]
    assert row["device_mismatches"] == 1
