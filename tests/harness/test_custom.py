"""Decoding functions of the user's own: finding them, calling them, reading what they return."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from s2d2_lmeval.errors import ConfigError, RequestError
from s2d2_lmeval.harness.arguments import sort_arguments
from s2d2_lmeval.harness.custom import CustomFunction, load_object

FILE = """
from beside_it import ANSWER


def named(model, input_ids, attention_mask=None, gen_length=8, max_gen_toks=None, threshold=0.9,
          stopping_criteria_idx=None, return_forward_stats=False, tokenizer=None):
    ...


def open_ended(model, input_ids, **options):
    return ANSWER


def lengthless(model, input_ids):
    ...
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "beside_it.py").write_text("ANSWER = [[1, 2, 3]]")
    (tmp_path / "mine.py").write_text(FILE)
    return tmp_path / "mine.py"


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))


def test_objects_by_file_and_by_module(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_object(f"{file}:open_ended")(None, None) == [[1, 2, 3]]
    monkeypatch.chdir(file.parent)
    assert load_object("mine.py:named") is load_object(f"{file}:named")
    assert load_object("json:dumps").__module__ == "json"


def test_files_of_this_package_are_imported_as_such() -> None:
    import s2d2_lmeval.custom_generate as package

    path = Path(package.__path__[0]) / "sdar.py"
    assert load_object(f"{path}:block_diffusion_generate").__module__ == "s2d2_lmeval.custom_generate.sdar"


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("nowhere.py:f", "nowhere.py is not a file"),
        ("no_such_module_here:f", "there is no module no_such_module_here"),
        ("{file}:opn_ended", r"has no opn_ended. Did you mean open_ended\?"),
        ("just_a_name", "write path/to/file.py:name or module:name"),
        ("{broken}:f", "broken.py cannot be imported: ZeroDivisionError"),
    ],
)
def test_what_cannot_be_found(file: Path, spec: str, message: str) -> None:
    broken = file.with_name("broken.py")
    broken.write_text("1 / 0")
    with pytest.raises(ConfigError, match=message):
        load_object(spec.format(file=file, broken=broken))


def test_options_follow_the_signature(file: Path) -> None:
    function = CustomFunction.load(f"{file}:named")
    options = function.options({"threshold": 0.5, "do_sample": False}, [7, 8], "tokenizer")
    assert options == {
        "threshold": 0.5,
        "stopping_criteria_idx": [7, 8],
        "return_forward_stats": True,
        "tokenizer": "tokenizer",
    }
    given = {"stopping_criteria_idx": [1], "return_forward_stats": False}
    assert function.options(given, [7], None) == {**given, "tokenizer": None}
    with pytest.raises(ConfigError, match=r"top_k is not a parameter of .*named"):
        function.options({"top_k": 5}, [], None)


def test_model_arguments_follow_the_signature(file: Path) -> None:
    accepted = sort_arguments("x", {"custom_generate": f"{file}:named", "threshold": 0.5, "attention": "sdpa"})
    assert accepted.decoding == {"threshold": 0.5}
    hint = r"confidence_threshold is not a parameter of .*named.* Did you mean threshold\?"
    with pytest.raises(ConfigError, match=hint):
        sort_arguments("x", {"custom_generate": f"{file}:named", "confidence_threshold": 0.5})
    anything = sort_arguments("x", {"custom_generate": f"{file}:open_ended", "confidence_threshold": 0.5})
    assert anything.decoding == {"confidence_threshold": 0.5}
    with pytest.raises(ConfigError, match=r"confidense is not an option of --model s2d2. Did you mean"):
        sort_arguments("x", {"custom_generate": f"{file}:open_ended", "confidense": 0.5})


def test_what_is_no_decoding_function(file: Path) -> None:
    with pytest.raises(ConfigError, match="takes no max_gen_toks"):
        CustomFunction.load(f"{file}:lengthless")
    with pytest.raises(ConfigError, match="is not a function"):
        CustomFunction.load("beside_it:ANSWER")
    with pytest.raises(ConfigError, match="is not a function"):
        CustomFunction.load("pathlib:Path")


@pytest.mark.parametrize(
    ("extras", "statistics"),
    [
        ((), {}),
        (({"nfe": 3},), {"nfe": 3}),
        (({"total_forward_steps": 4, "decoding_order": [["|", 0]]},), {"nfe": 4, "decoding_order": [["|", 0]]}),
        (([["|", 0]],), {"decoding_order": [["|", 0]]}),
    ],
)
def test_answers_with_and_without_statistics(extras: tuple[Any, ...], statistics: dict[str, Any]) -> None:
    def generate(model: Any, input_ids: torch.Tensor, max_gen_toks: int) -> Any:
        ids = torch.cat([input_ids, torch.tensor([[5, 6, 7, 8]])], dim=1)
        return (ids, *extras) if extras else ids

    tokens, stats = CustomFunction.load(generate)(Model(), [1, 2], 3, {})
    assert tokens == [5, 6, 7]
    assert stats == statistics


def test_other_shapes_and_budget_names() -> None:
    def generate(model: Any, input_ids: torch.Tensor, max_new_tokens: int, **options: Any) -> list[int]:
        return [*input_ids[0].tolist(), *range(max_new_tokens)]

    assert CustomFunction.load(generate)(Model(), [9], 2, {"x": 1}) == ([0, 1], {})


@pytest.mark.parametrize("answer", [[[3, 4, 5]], "text", [[1.5]], None])
def test_answers_that_break_the_convention(answer: Any) -> None:
    def generate(model: Any, input_ids: torch.Tensor, max_gen_toks: int) -> Any:
        return answer

    with pytest.raises(RequestError, match=r"did not return the prompt|in place of token ids"):
        CustomFunction.load(generate)(Model(), [1, 2], 3, {})
