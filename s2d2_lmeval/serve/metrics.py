"""Counts of an endpoint in Prometheus' text format."""

from __future__ import annotations

from s2d2_lmeval.serve.service import Service

COUNTED = {
    "new_tokens": "tokens decoded up to the end of answers",
    "prompt_tokens": "tokens of prompts",
    "nfe": "forwards that answers took part in",
    "drafted": "tokens submitted to a verifier",
    "accepted": "tokens that it accepted",
}


def in_text(service: Service, refused: int) -> str:
    """The page; ``refused`` requests were answered with an error before they were queued."""
    lines = []

    def say(name: str, kind: str, meaning: str, values: dict[str, float]) -> None:
        lines.extend([f"# HELP s2d2_{name} {meaning}", f"# TYPE s2d2_{name} {kind}"])
        lines.extend(f"s2d2_{name}{labels} {value:g}" for labels, value in values.items())

    outcomes = {f'{{outcome="{outcome}"}}': count for outcome, count in sorted(service.outcomes.items())}
    say("requests_total", "counter", "requests by outcome", {**outcomes, '{outcome="refused"}': refused})
    for name, meaning in COUNTED.items():
        say(f"{name}_total", "counter", meaning, {"": service.sums[name]})
    say("requests_waiting", "gauge", "requests in the queue", {"": service.waiting})
    say("requests_in_flight", "gauge", "requests being decoded", {"": service.in_flight})
    return "\n".join(lines) + "\n"
