"""What the site needs beyond docs/: the reference, and addresses of files that are in the repository only."""

from __future__ import annotations

import configparser
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
REFERENCE = {
    "Load and decode": ["s2d2_lmeval.load", "s2d2_lmeval.BlockDiffusionModel", "s2d2_lmeval.Generation"],
    "Options": ["s2d2_lmeval.DecodingConfig"],
    "Families": ["s2d2_lmeval.families.load_checkpoint", "s2d2_lmeval.families.facts.Facts"],
    "Extend": ["s2d2_lmeval.register_decoder", "s2d2_lmeval.decoding.decoder", "s2d2_lmeval.decoding.passes"],
    "Run programs": ["s2d2_lmeval.tasks.sandbox"],
    "Errors": ["s2d2_lmeval.errors"],
}
_ROLE = re.compile(r":(?:attr|class|data|func|meth|mod):<code>(~?)([\w.]+)</code>")


def on_config(config: Any) -> Any:
    """The repository's address, which setup.cfg has."""
    settings = configparser.ConfigParser()
    settings.read(ROOT / "setup.cfg", encoding="utf-8")
    config.repo_url = settings["metadata"]["url"]
    config.repo_name = config.site_name
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add the reference."""
    lines = ["# Reference", "", "Made from the docstrings."]
    for heading, names in REFERENCE.items():
        lines += ["", f"## {heading}", *(f"\n::: {name}" for name in names)]
    files.append(File.generated(config, "reference.md", content="\n".join(lines)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Paths out of docs/, and notebooks, lead into the repository."""
    home = f"{config.repo_url}/blob/HEAD"
    return re.sub(r"\]\(([\w-]+\.ipynb)", rf"]({home}/docs/\1", re.sub(r"\]\(\.\./", f"]({home}/", markdown))


def on_page_content(html: str, page: Any, config: Any, files: Any) -> str:
    """Sphinx's roles, which the docstrings have, as links to what the reference knows."""

    def link(role: re.Match[str]) -> str:
        shown = role[2].rpartition(".")[2] if role[1] else role[2]
        return f'<autoref optional identifier="{role[2]}"><code>{shown}</code></autoref>'

    return _ROLE.sub(link, html)
