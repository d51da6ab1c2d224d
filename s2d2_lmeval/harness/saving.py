"""Results that cannot be written end a run with an error, whoever started it.

The harness catches every error of saving, logs that it "could not save", and exits with 0: hours of results are gone,
and nothing shows it. The log message is the one thing that it says, so a filter on its logger turns it into an error.
What would have been written is printed first.
"""

from __future__ import annotations

import logging
import sys

from s2d2_lmeval.errors import S2D2Error

_LOGGER = "lm_eval.loggers.evaluation_tracker"
_SAYS = "Could not save"


class ResultsLost(S2D2Error):
    """Results that the harness could not write."""


def refuse_to_lose_results() -> None:
    """From now on a result that cannot be saved is an error in this process; idempotent."""
    source = logging.getLogger(_LOGGER)
    source.setLevel(logging.WARNING)  # at a higher level of the harness's loggers nothing would be said
    if _raise_if_lost not in source.filters:
        source.addFilter(_raise_if_lost)


def _raise_if_lost(record: logging.LogRecord) -> bool:
    if not record.getMessage().startswith(_SAYS):
        return True
    error = sys.exc_info()[1]
    frame = sys._getframe()
    while frame is not None and not frame.f_code.co_name.startswith("save_results"):
        frame = frame.f_back  # type: ignore[assignment]
    if frame is not None and "results" in frame.f_locals:
        from lm_eval.utils import make_table

        print(make_table(frame.f_locals["results"]))
    raise ResultsLost(
        f"{record.getMessage()}: {error}. The results are not on disk, or in part; make room or choose another "
        "--output_path, and run again (with --use_cache, answers are kept)."
    ) from None
