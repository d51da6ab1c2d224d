"""Renders chat templates in a process of its own, under limits: a line of JSON in, a line out.

This file is run as a program by :mod:`s2d2_lmeval.harness.templates`, and imports nothing of this package.
"""

from __future__ import annotations

import json
import sys
from typing import Any

LONGEST = 16 << 20
"""Characters of a rendered conversation."""
MEMORY = 1 << 30
"""Bytes beyond those that the empty process takes."""

try:
    import resource
except ImportError:  # Windows has no such limits
    resource = None  # type: ignore[assignment]


def limit_memory() -> None:
    """Keep this process from taking more than :data:`MEMORY` beside what it has."""
    if resource is None or not sys.platform.startswith("linux"):
        return
    with open("/proc/self/statm") as stream:
        size = int(stream.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, size + MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def limit_time(seconds: int) -> None:
    """Let the system end this process when it has used that much more processor time, whatever it does."""
    if resource is None:
        return
    usage = resource.getrusage(resource.RUSAGE_SELF)
    used = int(usage.ru_utime + usage.ru_stime)
    resource.setrlimit(resource.RLIMIT_CPU, (used + 2 + seconds, resource.getrlimit(resource.RLIMIT_CPU)[1]))


def answer(job: dict[str, Any]) -> dict[str, Any]:
    """The rendered conversations, or what went wrong."""
    from jinja2 import TemplateError
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        rendered, _ = render_jinja_template(**job)
        if sum(map(len, rendered)) > LONGEST:
            return {"error": f"it writes more than {LONGEST} characters"}
        return {"rendered": rendered}
    except MemoryError:
        return {"error": f"it takes more than {MEMORY >> 20} MiB of memory"}
    except Exception as error:
        said = str(error)[:300] or type(error).__name__
        return {"error": said, "by_template": isinstance(error, TemplateError)}


def main() -> None:
    """Answer until the input ends."""
    import transformers.utils.chat_template_utils  # noqa: F401  (takes memory and time, but not the template's)

    limit_memory()
    for line in sys.stdin:
        request = json.loads(line)
        limit_time(request["seconds"])
        print(json.dumps(answer(request["job"])), flush=True)


if __name__ == "__main__":
    sys.path.pop(0)  # this folder, whose modules have names that others have too
    main()
