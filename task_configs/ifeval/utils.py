"""Data of IFEval; scored by the harness's own checkers."""

from __future__ import annotations

from typing import Any

from datasets import DatasetDict

from s2d2_lmeval.errors import ConfigError
from s2d2_lmeval.harness.filters import with_decoding_metrics
from s2d2_lmeval.tasks.data import load_documents

# Google's only split is called train.
FILES = {"train": ("ifeval/input_data.jsonl", "input_data.jsonl")}


def load(s2d2_data_dir: Any = None, **_: Any) -> DatasetDict:
    """The only split, ``train``; refuses to start where the answers could not be scored."""
    _checkers()
    return load_documents(("google/IFEval",), FILES, s2d2_data_dir)


def _checkers() -> Any:
    """The harness's module of checkers.

    Raises:
        ConfigError: when what they need is not installed: they would fail document by document, after decoding.
    """
    try:
        import langdetect
        import nltk
        from lm_eval.tasks.ifeval import utils  # downloads NLTK's sentence splitter if it can
    except ImportError as error:
        raise ConfigError(
            f"IFEval's checkers need another package ({error}): pip install 's2d2-lmeval[sweep]'."
        ) from None
    try:
        nltk.data.find("tokenizers/punkt_tab")
    except LookupError:
        raise ConfigError(
            "IFEval's checkers need NLTK's sentence splitter punkt_tab, which is not on this machine and could not be "
            "downloaded. Where there is a connection run `python -m nltk.downloader -d DIR punkt_tab`, copy DIR here, "
            "and set NLTK_DATA=DIR."
        ) from None
    langdetect.DetectorFactory.seed = 0  # it draws at random otherwise
    return utils


@with_decoding_metrics
def process_results(doc: dict[str, Any], results: list[Any]) -> dict[str, Any]:
    """Which instructions were followed, strictly and loosely."""
    return dict(_checkers().process_results(doc, results))


def agg_inst_level_acc(items: list[list[bool]]) -> float:
    """Share of all instructions that were followed."""
    followed = [one for several in items for one in several]
    return sum(followed) / len(followed)
