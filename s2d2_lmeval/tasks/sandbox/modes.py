"""The ways to surround a sandbox: this machine's own kernel, `bwrap`, or a container."""

from __future__ import annotations

import os
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path

from s2d2_lmeval.errors import ConfigError

VARIABLE = "S2D2_SANDBOX"
MODES = ("process", "bwrap", "docker")
IMAGE = "s2d2-sandbox"
_HERE = Path(__file__).parent
_START = "import sys; sys.path.insert(0, {!r}); from jail import supervisor; del sys.path[0]; supervisor.{}"


def _is_installed(path: str) -> bool:
    return Path(path).name in ("site-packages", "dist-packages") and Path(path).is_dir()


@dataclass(frozen=True)
class Mode:
    """What surrounds the processes of a run.

    ``packages`` are the folders of installed packages that programs may use; None: those of the Python that is started.
    Source trees on ``sys.path`` are left out: they may be anything.
    """

    name: str
    image: str = ""
    packages: tuple[str, ...] | None = field(default_factory=lambda: tuple(filter(_is_installed, sys.path)))

    @property
    def is_warm(self) -> bool:
        """Whether one process can start all supervisors; a container serves one program."""
        return self.name != "docker"

    def command(self, folder: str, channel: int, memory_bytes: int) -> list[str]:
        """The command line of a process that forks supervisors, on the socket ``channel``, for programs that work below
        ``folder``; of a container with a supervisor, which may use ``memory_bytes``.
        """
        if self.name == "docker":
            memory = str(2 * memory_bytes + 2**28)  # the judge, the program, and two interpreters
            return [
                *("docker", "run", "--rm", "--interactive", "--init", "--network", "none", "--read-only"),
                *("--cap-drop", "ALL", "--security-opt", "no-new-privileges", "--pids-limit", "256"),
                *("--memory", memory, "--memory-swap", memory, "--tmpfs", "/tmp:rw,size=64m"),
                *("--user", "65534:65534", "--volume", f"{_HERE}:/sandbox:ro", self.image),
                *("python3", "-I", "-S", "-c", _START.format("/sandbox", "main()")),
            ]
        around = [
            *("bwrap", "--unshare-all", "--die-with-parent", "--new-session", "--cap-drop", "ALL"),
            *("--ro-bind", "/", "/", "--dev", "/dev", "--proc", "/proc", "--tmpfs", "/run"),
            *("--bind", folder, folder, "--"),
        ]
        own = [sys.executable, "-I", "-S", "-c", _START.format(str(_HERE), f"serve({channel})")]
        return [*around, *own] if self.name == "bwrap" else own

    def hint(self) -> str:
        """What to do when it does not start."""
        if self.name == "docker":
            recipe = _HERE / "Dockerfile"
            return f"Is docker running, and is there an image {self.image}? docker build -t {self.image} - < {recipe}"
        if self.name == "bwrap":
            return (
                "Is bubblewrap installed, and may it make namespaces here? Try: bwrap --ro-bind / / --unshare-all true"
            )
        return f"Try {VARIABLE}=bwrap or {VARIABLE}=docker."


def choose(text: str | None) -> None:
    """What ``--sandbox`` says, where it says anything: for this process and those that it starts; ConfigError for a
    name that is not a mode, and for a program that is not there.
    """
    if text is not None:
        mode_of(text)
        os.environ[VARIABLE] = text


def mode_of(text: str) -> Mode:
    """The mode that ``text`` names; ConfigError for a name that is not a mode."""
    name, _, image = text.partition(":")
    if name not in MODES or (image and name != "docker"):
        raise ConfigError(
            f"there is no sandbox {text.strip()!r}, but process, bwrap, docker, and docker:IMAGE for your own image."
        )
    if name != "process" and shutil.which(name) is None:
        raise ConfigError(f"the sandbox {name!r} needs the program {name}, which is not on the PATH: install it.")
    return Mode(name, image or IMAGE, None) if name == "docker" else Mode(name)
