"""A draft adapter on an autoregressive checkpoint: the plain model's answers, and the drafts that are written out."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from s2d2_lmeval import BlockDiffusionModel, load
from s2d2_lmeval.cli import main
from s2d2_lmeval.errors import CheckpointError, ConfigError
from s2d2_lmeval.families import checkpoint_facts, load_checkpoint
from s2d2_lmeval.families.adapters import merge_adapter
from s2d2_lmeval.families.registry import FAMILIES
from s2d2_lmeval.runtime.graphs import upload
from s2d2_lmeval.runtime.passes import Layout
from s2d2_lmeval.runtime.shapes import Frame, Shape
from s2d2_lmeval.studies.bench.launches import count_launches
from s2d2_lmeval.training.adapter import AdaptedModel, Form
from s2d2_lmeval.training.anchors import draw
from s2d2_lmeval.training.data import Text

from .conftest import VOCABULARY, Adapter

FORMS = {"vectors": Form(6, 4), "noise": Form(6, 4, noise=(1, 50))}
PROMPTS = [[(5 * i + 3 * j) % VOCABULARY for j in range(1 + (7 * i) % 31)] for i in range(8)]
SAMPLED = {"do_sample": True, "temperature": 1.0}


def answers(model: BlockDiffusionModel, **options: Any) -> list[list[int]]:
    found = model.generate(PROMPTS, {"stop_token_ids": (), **options}, max_new_tokens=9)
    return [one.token_ids for one in found]


@pytest.mark.parametrize("sampling", [{}, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("form", FORMS)
def test_sliding_with_an_adapter_is_ar_without(
    checkpoint: Path, adapter: Adapter, form: str, sampling: dict[str, Any]
) -> None:
    expected = answers(load(checkpoint, device="cpu"), decoder="ar", **sampling)
    folder = adapter(FORMS[form])
    for rows, static in ((1, False), (8, False), (8, True)):
        model = load(checkpoint, device="cpu", draft_adapter=folder, max_batch=rows, static_shapes=static)
        assert model.facts.decoders[0] == "sliding"
        assert model.config({}).window == 6
        assert answers(model, draft_shape="chain" if rows == 1 else "tree", **sampling) == expected


@pytest.mark.parametrize("form", FORMS)
def test_in_bfloat16_too_where_it_is_exact(checkpoint: Path, adapter: Adapter, form: str) -> None:
    half: dict[str, Any] = {"device": "cpu", "dtype": "bfloat16", "exact": True}
    expected = answers(load(checkpoint, max_batch=1, **half), decoder="ar")
    for rows in (1, 8):
        model = load(checkpoint, draft_adapter=adapter(FORMS[form]), max_batch=rows, **half)
        assert answers(model, decoder="sliding") == expected


@pytest.mark.slow
@pytest.mark.parametrize("sampling", [{}, SAMPLED], ids=["greedy", "sampled"])
def test_five_hundred_random_prompts(checkpoint: Path, adapter: Adapter, sampling: dict[str, Any]) -> None:
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, VOCABULARY, rng.integers(1, 60)).tolist() for _ in range(500)]
    options = {"stop_token_ids": (), "max_new_tokens": 24, **sampling}
    expected = load(checkpoint, device="cpu").generate(prompts, {"decoder": "ar", **options})
    for form in FORMS.values():
        model = load(checkpoint, device="cpu", draft_adapter=adapter(form))
        found = model.generate(prompts, {"decoder": "sliding", **options})
        assert [one.token_ids for one in found] == [one.token_ids for one in expected]


def forward(model: BlockDiffusionModel, text: list[int], masks: list[int], causal: bool, gated: bool) -> torch.Tensor:
    """Logits of a text and of a window of ``masks`` after it, in one forward of the engine's."""
    runner, width = model._runner, len(text) + len(masks)
    layout = Layout(np.arange(1), np.array([width]))
    runner.reserve(1, width)
    frame = Frame(layout, Shape.tight(layout, width, runner.cache))
    told = upload(runner.device, frame.attention(runner.cache))
    if gated:
        told["gated"] = torch.tensor([0] * len(text) + [1 + place for place in range(len(masks))])
    visible = torch.ones(1, width, width, dtype=torch.bool).tril()
    if not causal:
        visible[:, len(text) :, len(text) :] = True
    with torch.inference_mode():
        return runner.run(torch.tensor(text + masks), torch.arange(width), torch.arange(width), visible, told, frame)


TEXT = Text([3, 1, 4, 1, 5], [9, 2, 6, 5, 3, 5, 8, 9, 7])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("form", FORMS)
def test_text_is_that_of_the_plain_model_bit_for_bit(checkpoint: Path, adapter: Adapter, form: str, dtype: str) -> None:
    plain = load(checkpoint, device="cpu", dtype=dtype)
    adapted = load(checkpoint, device="cpu", dtype=dtype, draft_adapter=adapter(FORMS[form]))
    text, masks = [*TEXT.prompt, *TEXT.answer], [7, 8, 9, 10, 11]
    without, within = (forward(model, text, masks, False, model is adapted) for model in (plain, adapted))
    assert torch.equal(within[: len(text)], without[: len(text)])
    assert (within[len(text) :] - without[len(text) :]).abs().amax(1).min() > 0.01


def test_drafts_in_the_form_of_uno_are_those_of_a_written_out_forward(checkpoint: Path, adapter: Adapter) -> None:
    """The text runs through the plain weights; the noise through weights that the adapter was merged into, after it."""
    folder = adapter(FORMS["noise"])
    text, noise = [*TEXT.prompt, *TEXT.answer], [7, 33, 2, 41, 18]
    plain, merged = (load_checkpoint(checkpoint, device="cpu")[0] for _ in range(2))
    merge_adapter(merged, FAMILIES["llama"], folder)
    with torch.inference_mode():
        cache = plain(torch.tensor([text]), use_cache=True).past_key_values
        expected = merged(torch.tensor([noise]), past_key_values=cache).logits[0]
    model = load(checkpoint, device="cpu", draft_adapter=folder)
    found = forward(model, text, noise, causal=True, gated=True)[len(text) :]
    assert (found - expected).abs().max() < 1e-4


@pytest.mark.parametrize("form", FORMS)
def test_training_sees_what_decoding_sees(checkpoint: Path, adapter: Adapter, form: str) -> None:
    """The windows of a training step are those that the engine runs after the same text."""
    folder, of = adapter(FORMS[form]), FORMS[form]
    adapted = AdaptedModel(*load_checkpoint(checkpoint, device="cpu"), of, seed=3)
    tensors = load_file(folder / "adapter_model.safetensors")
    if of.noise is None:
        tensors |= {
            f"base_model.model.{name}": one for name, one in load_file(folder / "s2d2_draft.safetensors").items()
        }
    for name, parameter in adapted.parameters.items():
        parameter.data = tensors[f"base_model.model.{name}"].float()
    windows = draw([Text([8] * 4, [9] * 3), TEXT], of.window - 1, 3, Random(0), "cpu")
    drafted, taught = adapted.forward(windows, torch.Generator().manual_seed(1))
    low, high = of.noise or (0, 1)
    tokens = torch.randint(low, high, (len(drafted),), generator=torch.Generator().manual_seed(1)).tolist()
    model, start = load(checkpoint, device="cpu", draft_adapter=folder), 7
    for number, place in enumerate(windows.starts.tolist()):
        if place < start:
            continue
        text = windows.tokens[start:place].tolist()
        rows = slice(number * windows.masks, (number + 1) * windows.masks)
        found = forward(model, text, tokens[rows], causal=adapted.causal, gated=True)[len(text) :]
        assert (adapted.head(drafted[rows]) - found).abs().max() < 1e-4
    assert taught.shape == drafted.shape


def test_a_step_launches_no_more_than_the_adapters_part(
    checkpoint: Path, adapter: Adapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Captured as without an adapter: one upload, one read, all in the graph; in it three kernels per projection."""
    monkeypatch.setattr("s2d2_lmeval.runtime.runner.fuse", lambda model, fused, attention: False)
    rows = []
    for gated in (False, True):
        model = load(checkpoint, device="cpu", draft_adapter=adapter(FORMS["vectors"]))
        if not gated:
            monkeypatch.setattr(model.hf_model, "s2d2_draft_factors", None)
        rows.append(count_launches(model, {"max_new_tokens": 8}, 1, PROMPTS[3:5]))
    for row in rows:
        assert row.get("error") is None
        assert row["capture_faults"] == row["device_mismatches"] == row["races"] == 0
        assert row["same_tokens"]
        assert row["launches_outside"] <= 4
        assert row["uploads"] <= 1
        assert row["reads"] <= 1
        assert row["blocking"] == 0
        assert row["replayed_share"] >= 0.98
    # Means over steps would compare drafts of different sizes; the widest step is the same in both.
    assert 0 < rows[1]["most_replayed"] - rows[0]["most_replayed"] <= 3 * 14 + 5


# ---- what an adapter says of itself ----


def changed(folder: Path, tmp_path: Path, **record: Any) -> Path:
    copied = tmp_path / "copied"
    shutil.copytree(folder, copied)
    about = json.loads((copied / "s2d2_draft.json").read_text())
    (copied / "s2d2_draft.json").write_text(json.dumps({**about, **record}))
    return copied


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({"window": 1}, "window=1"),
        ({"window": "8"}, "window='8'"),
        ({"sight": "left"}, "sight='left'"),
        ({"noise": [5, 5]}, "without a token"),
        ({"noise": [1, VOCABULARY + 1]}, "vocabulary of 61"),
        ({"base": 7}, "base=7"),
        ({"base": "f00"}, "other weights"),
        ({"stride": 4}, "stride"),
    ],
)
def test_what_cannot_be_is_refused(
    checkpoint: Path, adapter: Adapter, tmp_path: Path, record: dict[str, Any], said: str
) -> None:
    with pytest.raises(CheckpointError, match=said):
        load(checkpoint, device="cpu", draft_adapter=changed(adapter(FORMS["noise"]), tmp_path, **record))


def test_adapters_for_other_models_are_refused(checkpoint: Path, adapter: Adapter, tmp_path: Path) -> None:
    folder = adapter(FORMS["vectors"])
    copied = changed(folder, tmp_path, base=None)
    save_file({"masks": torch.zeros(5, 16)}, copied / "s2d2_draft.safetensors")
    with pytest.raises(CheckpointError, match=r"needed is masks \[places, 32\]"):
        load(checkpoint, device="cpu", draft_adapter=copied)
    (copied / "s2d2_draft.safetensors").unlink()
    with pytest.raises(CheckpointError, match="it cannot draft"):
        load(checkpoint, device="cpu", draft_adapter=copied)
    (copied / "s2d2_draft.json").unlink()
    with pytest.raises(CheckpointError, match="write one"):
        load(checkpoint, device="cpu", draft_adapter=copied)
    config = json.loads((copied / "adapter_config.json").read_text())
    for more in ({"use_dora": True}, {"modules_to_save": ["embed_tokens"]}):
        (folder.parent / "odd").mkdir(exist_ok=True)
        for file in folder.iterdir():
            shutil.copy(file, folder.parent / "odd")
        (folder.parent / "odd" / "adapter_config.json").write_text(json.dumps({**config, **more}))
        with pytest.raises(CheckpointError, match=next(iter(more))):
            load(checkpoint, device="cpu", draft_adapter=folder.parent / "odd")
    with pytest.raises(ConfigError, match="by its path"):
        load(load_checkpoint(checkpoint, device="cpu")[0], draft_adapter=folder)
    with pytest.raises(CheckpointError, match=r"adapter_config\.json"):
        load(checkpoint, device="cpu", draft_adapter=tmp_path)


def test_published_adapters_of_uno_are_known_by_their_vocabulary(tmp_path: Path, adapter: Adapter) -> None:
    """In a subfolder, without a file of ours; the folder of the base says the rest."""
    base = tmp_path / "base"
    base.mkdir()
    config = {"model_type": "qwen3", "vocab_size": 151936, "architectures": ["Qwen3ForCausalLM"]}
    (base / "config.json").write_text(json.dumps(config))
    shutil.copytree(adapter(FORMS["noise"]), tmp_path / "uno" / "adapter")
    (tmp_path / "uno" / "adapter" / "s2d2_draft.json").unlink()
    facts = checkpoint_facts(base, draft_adapter=tmp_path / "uno")
    assert facts.draft_adapter is not None
    assert (facts.draft_adapter.noise, facts.draft_adapter.window) == ((1, 151669), 16)
    assert facts.window_causal
    assert facts.decoders == ("sliding", "ar")


def test_a_longer_window_than_trained_is_allowed(checkpoint: Path, adapter: Adapter) -> None:
    model = load(checkpoint, device="cpu", draft_adapter=adapter(FORMS["vectors"]))
    assert answers(model, window=9) == answers(model, decoder="ar")


def test_masks_come_after_what_they_were_trained_after(checkpoint: Path, adapter: Adapter) -> None:
    model = load(checkpoint, device="cpu", draft_adapter=adapter(FORMS["vectors"]))
    with pytest.raises(ConfigError, match="was trained on masks after clean text"):
        answers(model, decoder="sliding", draft_context="published")


def test_doctor_says_what_it_is(checkpoint: Path, adapter: Adapter, capsys: pytest.CaptureFixture[str]) -> None:
    main(["doctor", str(checkpoint), "--option", f"draft_adapter={adapter(FORMS['noise'])}"])
    said = " ".join(capsys.readouterr().out.split())
    assert "only drafts go through it" in said
    assert "random tokens from 1 to 49" in said
