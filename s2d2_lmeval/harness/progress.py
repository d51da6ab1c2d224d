"""The progress bar of a generation run."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from tqdm import tqdm


class DecodingProgress:
    """Finished of all requests, with new tokens per second (all rows together) and per forward (as a request sees
    it).
    """

    def __init__(self, total: int, *, disable: bool) -> None:
        self._bar = tqdm(total=total, disable=disable, desc="Decoding", unit="req")
        self._started = time.perf_counter()
        self._new_tokens = 0.0
        self._nfe = 0.0

    def finished(self, stats: Mapping[str, Any]) -> None:
        """Count a request."""
        self._new_tokens += stats.get("new_tokens", 0)
        self._nfe += stats.get("nfe", 0)
        rate = self._new_tokens / max(time.perf_counter() - self._started, 1e-9)
        shown = {"tok/s": f"{rate:.1f}"}
        if self._nfe:
            shown["tok/fwd"] = f"{self._new_tokens / self._nfe:.2f}"
        self._bar.set_postfix(shown, refresh=False)
        self._bar.update(1)

    def close(self) -> None:
        """Leave the bar as it stands."""
        self._bar.close()
