"""What setup.cfg cannot say: the links of README.md lead into the repository when PyPI shows it."""

import configparser
import re
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent


def description() -> str:
    """README.md with absolute addresses in place of paths."""
    settings = configparser.ConfigParser()
    settings.read(ROOT / "setup.cfg", encoding="utf-8")
    home = settings["metadata"]["url"]

    def absolute(link: re.Match[str]) -> str:
        return f"{link[1]}{home}/{'raw' if link[1][0] == '!' else 'blob'}/HEAD/{link[2]}"

    return re.sub(r"(!?\[[^\]]*\]\()(?!https?://|#)([^)]+)", absolute, (ROOT / "README.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    setup(long_description=description())
