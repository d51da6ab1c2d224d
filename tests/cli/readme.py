"""The commands of README.md as they are written, with whatever s2d2-lmeval is installed in this Python's environment.

python tests/cli/readme.py FOLDER

They run in FOLDER, where the embedded model stands in for the checkpoints that they name, and its problems for GSM8K:
a path that exists is taken before the hub is asked. Installing (``pip``) and the Makefile's targets are left out.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

README = Path(__file__).resolve().parents[2] / "README.md"
STAND_INS: dict[str, dict[str, object]] = {
    "JetLM/SDAR-1.7B-Chat": {"max_position_embeddings": 2048},
    "dllm-hub/Qwen3-0.6B-diffusion-bd3lm-v0.1": {
        "architectures": ["A2DQwen3LMHeadModel"],
        "model_type": "a2d-qwen3",
    },
    "Qwen/Qwen3-8B": {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        **dict.fromkeys(("block_size", "fuse_cross_entropy", "mask_token_id")),
    },
}
"""Checkpoint -> what its config.json says otherwise than the embedded model's; None: does not say."""
GSM8K = """\
---
configs:
- config_name: main
  data_files:
  - {split: train, path: problems.jsonl}
  - {split: test, path: problems.jsonl}
---
"""
PROBLEMS = 12
RUN = (
    "s2d2-lmeval eval --model_args pretrained=toy,decoder={decoder} --tasks s2d2_toy_arithmetic --limit 4 "
    "--log_samples --output_path {folder}"
)
"""What `compare` compares."""
OFFLINE = dict.fromkeys(("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"), "1")


def commands() -> list[str]:
    """Every command line of this package and of the harness, with its continuation lines."""
    blocks = re.findall(r"```bash\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [" ".join(line.split()) for line in lines if line.startswith(("s2d2-lmeval ", "lm_eval "))]


def prepare(folder: Path) -> None:
    """Checkpoints and problems under the names that the commands have."""
    toy = Path(python("import s2d2_lmeval.toy as toy; print(toy.__path__[0])", folder).strip())
    for name, other in STAND_INS.items():
        shutil.copytree(toy / "checkpoint", folder / name)
        config = json.loads((folder / name / "config.json").read_text())
        said = {key: value for key, value in {**config, **other}.items() if value is not None}
        (folder / name / "config.json").write_text(json.dumps(said))
    data = folder / "openai" / "gsm8k"
    data.mkdir(parents=True)
    (data / "README.md").write_text(GSM8K)
    problems = [json.loads(line) for line in (toy / "held_out.jsonl").read_text().splitlines()]
    rows = [one for one in problems if one["corpus"] == "arithmetic"][:PROBLEMS]
    question = re.compile(r"Question: |\nAnswer:")
    (data / "problems.jsonl").write_text(
        "".join(json.dumps({"question": question.sub("", r["prompt"]), "answer": r["answer"]}) + "\n" for r in rows)
    )


def python(code: str, folder: Path) -> str:
    """What a Python in ``folder`` prints."""
    return subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=True).stdout


def run(command: str, folder: Path, environment: dict[str, str]) -> None:
    """One command; SystemExit where it fails."""
    done = subprocess.run(
        ["bash", "-c", command], cwd=folder, env=environment, input="2 + 2 =\n", capture_output=True, text=True
    )
    if done.returncode:
        sys.exit(f"{command}\n{done.stdout}\n{done.stderr}\nexit {done.returncode}")


def serve(command: str, folder: Path, environment: dict[str, str]) -> None:
    """An endpoint: it answers, then ends when asked to."""
    port = next((part for part in command.split() if part.isdecimal()), "8000")
    server = subprocess.Popen(["bash", "-c", f"exec {command}"], cwd=folder, env=environment)
    try:
        for _ in range(600):
            time.sleep(0.5)
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as answer:
                    assert answer.status == 200
                    return
            except OSError:
                if server.poll() is not None:
                    sys.exit(f"{command}\nexit {server.returncode}")
        sys.exit(f"{command}\nno answer")
    finally:
        server.terminate()
        server.wait(60)


def main() -> None:
    """Run all of them, one after the other."""
    folder = Path(sys.argv[1]).resolve()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, **OFFLINE, "PATH": path, "OMP_NUM_THREADS": "1"}
    prepare(folder)
    passed = 0
    for command in commands():
        start = time.monotonic()
        if " compare " in command:
            for decoder, output in zip(("ar", "sliding"), re.findall(r"out/\S+", command), strict=True):
                run(RUN.format(decoder=decoder, folder=output), folder, environment)
        (serve if " serve " in command else run)(command, folder, environment)
        passed += 1
        print(f"{time.monotonic() - start:5.0f} s  {command}", flush=True)
    print(f"{passed} passed, 0 failed")


if __name__ == "__main__":
    main()
