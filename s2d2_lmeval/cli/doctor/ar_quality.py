"""How good is a checkpoint's autoregressive mode, compared with block decoding?

``sliding``, and ``ar`` itself, follow the model's distribution at block size one under token-causal attention. A
checkpoint trained on larger blocks may or may not be good at that. Both modes answer the same documents, with a paired
test of the difference.
"""

from __future__ import annotations

from collections.abc import Iterator

from s2d2_lmeval.cli.doctor.installation import NOTE, OK, Finding
from s2d2_lmeval.errors import ConfigError

_SECTION = "autoregressive mode"


def ar_quality(path: str | None, tasks: str | None, *, limit: int, rows: int) -> Iterator[Finding]:
    """Findings: the accuracy of both modes on each task, and the conclusion.

    Args:
        tasks: comma-separated names; None takes the toy's own tasks.

    Raises:
        ConfigError: without a checkpoint or tasks, or if no block decoder fits.
    """
    from s2d2_lmeval.cli import demo
    from s2d2_lmeval.cli.console import begin
    from s2d2_lmeval.families import checkpoint_facts
    from s2d2_lmeval.harness.filters import METRICS
    from s2d2_lmeval.registry import DECODERS
    from s2d2_lmeval.studies.evaluation import scores_of_documents
    from s2d2_lmeval.studies.report.statistics import paired_p_value
    from s2d2_lmeval.studies.report.tables import SIGNIFICANT

    begin()
    if path is None:
        raise ConfigError("--ar_quality compares two modes of a checkpoint: name one, as in doctor toy --ar_quality.")
    names = tasks.split(",") if tasks else demo.toy_tasks() if path == "toy" else []
    if not names:
        raise ConfigError("--ar_quality needs tasks: name one or more, as in --tasks s2d2_gsm8k.")
    facts = checkpoint_facts(path)
    blockwise = [decoder for decoder in facts.decoders if DECODERS[decoder].plain]
    if not blockwise or "ar" not in facts.decoders:
        raise ConfigError(f"{facts.family} checkpoints do not have two modes to compare: {', '.join(facts.decoders)}.")
    ran = {
        decoder: demo.evaluate(path, {"decoder": decoder}, names, limit=limit, rows=rows)
        for decoder in ("ar", blockwise[0])
    }
    verdicts = []
    for name in names:
        scored = [scores_of_documents(results, name) for results in ran.values()]
        metric = next(metric for metric in scored[0] if metric.partition(",")[0] not in METRICS)
        ar, block = ([[value] for _, value in sorted(documents[metric])] for documents in scored)
        p_value = paired_p_value(ar, block)
        means = [sum(document[0] for document in mode) / len(mode) for mode in (ar, block)]
        verdicts.append(0 if p_value >= SIGNIFICANT else 1 if means[0] > means[1] else -1)
        value = (
            f"{metric.partition(',')[0]} {means[0]:.3f} by ar, {means[1]:.3f} by {blockwise[0]} on {len(ar)} documents "
            f"(paired test: p = {p_value:.2g})"
        )
        yield Finding(_SECTION, name, value, NOTE if verdicts[-1] < 0 else OK)
    yield Finding(_SECTION, "so", _CONCLUSIONS[min(verdicts)], NOTE if min(verdicts) < 0 else OK)


_CONCLUSIONS = {
    -1: "block decoding is more accurate: decoders equal to the autoregressive mode (sliding, ar) give that up",
    0: "no difference found: on this many documents, the autoregressive mode is an equally good reference",
    1: "the autoregressive mode is more accurate than block decoding: sliding keeps that, and is faster than ar",
}
