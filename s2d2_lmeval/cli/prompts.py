"""Prompts named on the command line: of a file, or of tasks of the harness."""

from __future__ import annotations

import random
from contextlib import suppress
from pathlib import Path
from typing import Any

from s2d2_lmeval.errors import RequestError, first_line, shown


def read_prompts(path: Path, limit: int, messages: bool = False) -> list[Any]:
    """Up to ``limit`` prompts of a file: its lines, or the "prompt" of each object of a .jsonl file; with ``messages``
    the "messages" of a chat, where an object has them.

    Raises:
        RequestError: if there is none.
    """
    from s2d2_lmeval.families.files import parse_json, read_text
    from s2d2_lmeval.prompts import is_text

    def of_line(line: str) -> Any:
        record = parse_json(line)
        return record["messages"] if messages and "messages" in record else record["prompt"]

    try:
        lines = read_text(path).replace("\r\n", "\n").split("\n")  # str.splitlines also cuts at U+2028 within a line
    except (OSError, ValueError) as error:
        raise RequestError(f"--prompts {shown(str(path))} cannot be read ({first_line(error)}).") from None
    lines = [line for line in lines if line.strip()]
    prompts: list[Any] = [None]
    with suppress(ValueError, KeyError, TypeError):
        prompts = [of_line(line) for line in lines] if path.suffix == ".jsonl" else lines
    if not all(isinstance(prompt, str) or (messages and is_text(prompt)) for prompt in prompts):
        or_chat = ', or the "messages" of a chat' if messages else ""
        raise RequestError(f'--prompts {path}: every line must be an object with the text of its "prompt"{or_chat}.')
    if not prompts:
        raise RequestError(f"--prompts {path} holds no prompt.")
    return prompts[:limit]


def task_prompts(names: str, limit: int) -> list[str]:
    """Up to ``limit`` prompts of the harness's tasks ``names``, in equal parts; the same ones every time.

    Raises:
        RequestError: if a task generates nothing.
    """
    from s2d2_lmeval.studies.tasks import load_tasks, task_manager

    named = names.split(",")
    manager = task_manager(None, (), named)
    tasks = {name: task for one in named for name, task in load_tasks(manager, one).items()}
    share = -(-limit // len(tasks))
    texts: list[str] = []
    for name, task in tasks.items():
        task.build_all_requests(limit=None, rank=0, world_size=1)
        asked = [request.args[0] for request in task.instances if request.request_type == "generate_until"]
        if not asked:
            raise RequestError(f"Task {name} generates nothing; calibrate on tasks that do.")
        texts += random.Random(0).sample(asked, min(share, len(asked)))
    return texts[:limit]


def training_prompts(names: str, limit: int, data_dir: str | None) -> list[str]:
    """Up to ``limit`` prompts of the documents that the tasks ``names`` have for training, in equal parts, in turn.

    Raises:
        RequestError: a task without such documents.
    """
    from s2d2_lmeval.studies.tasks import load_tasks, task_manager

    named = names.split(",")
    manager = task_manager(data_dir, (), named)
    tasks = {name: task for one in named for name, task in load_tasks(manager, one).items()}
    share, of_tasks = -(-limit // len(tasks)), []
    for name, task in tasks.items():
        if not task.has_training_docs():
            raise RequestError(
                f"task {name} has no documents for training, and those that it measures on are not for it: give a file "
                "of prompts."
            )
        documents = list(task.training_docs())
        chosen = random.Random(0).sample(documents, min(share, len(documents)))
        of_tasks.append([str(task.doc_to_text(document)) for document in chosen])
    longest = max(map(len, of_tasks))
    return [texts[place] for place in range(longest) for texts in of_tasks if place < len(texts)][:limit]
