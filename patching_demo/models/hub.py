"""Model repositories: from the cache of `huggingface_hub`, or fetched into it.

`huggingface_hub` does the work, so that its settings hold: `HF_ENDPOINT`, `HF_HUB_OFFLINE`, where
its cache is, and the user's token (`HF_TOKEN`, or `hf auth login`) for gated models.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from unittest import mock

from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url, snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)

from patching_demo.models.cache import ModelUnavailable, in_a_line, sha256_of

#: Seconds within which the hub has to answer a first question.
ANSWER_S = 4.0

_CONFIG, _TOKENIZER = "config.json", "tokenizer_config.json"
#: What to take from each kind of repository, the file that each such repository has first. Weights
#: only as safetensors, but for TransformerLens's older repositories, which have a `.pth` file.
TOKENIZER_FILES = (
    *(_TOKENIZER, "tokenizer.json", "*.model", "vocab*", "merges.txt"),
    *("special_tokens_map.json", "added_tokens.json", "chat_template*"),
)
MODEL_FILES = (
    *(_CONFIG, "generation_config.json", *TOKENIZER_FILES),
    *("model.safetensors", "model-*.safetensors", "model.safetensors.index.json"),
)
LEGACY_FILES = (_CONFIG, "*final.pth")


def repository(repo: str, patterns: tuple[str, ...]) -> Path:
    """Return a folder with a repository's files: `MODEL_FILES`, `LEGACY_FILES` or the like.

    The hub is asked for what its cache lacks, and for nothing where nothing is missing. Weights
    are held to the sha256 that the hub gave for them; an altered file is named, removed and fetched
    again.

    Raises:
        ModelUnavailable: it is not all in the cache, and the hub is down, slow, or has no such
            files for this user.
    """
    folder = _cached(repo, patterns)
    altered = folder and _drop_altered(folder)
    if altered:
        print(f"Refused: {altered} is not what the hub delivered. Fetching it again.", flush=True)
    elif folder:
        return folder
    folder = _fetched(repo, patterns)
    if not has_weights(folder, patterns):
        raise ModelUnavailable(f"{repo} has no weights as {' or '.join(patterns[-3:])}")
    if altered := _drop_altered(folder):
        raise ModelUnavailable(f"the hub delivered an altered file (by its sha256): {altered}")
    return folder


def weight_files(folder: Path) -> list[Path]:
    """Return the files with a repository's weights, whether they are all there or not."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        shards = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        return [folder / shard for shard in sorted(set(shards))]
    plain = folder / "model.safetensors"
    return [plain] if plain.is_file() else sorted(folder.rglob(LEGACY_FILES[-1])) or [plain]


def recorded_sha256(path: Path) -> str | None:
    """Return the sum under which the cache keeps a large file, or None where it has no links."""
    kept_as = Path(os.readlink(path)).name if path.is_symlink() else ""
    return kept_as if re.fullmatch(r"[0-9a-f]{64}", kept_as) else None


def _cached(repo: str, patterns: tuple[str, ...]) -> Path | None:
    """Return the repository's folder in the cache if it has all that is needed."""
    wanted = list(patterns)
    try:
        found = snapshot_download(repo, allow_patterns=wanted, local_files_only=True)
        folder = Path(found)
        # That notices what is missing only in a folder that `snapshot_download` filled.
        here = {path.name for path in folder.iterdir()}
        words = {"tokenizer.json", "vocab.txt"} & here or {"vocab.json", "merges.txt"} <= here
        words = words or any(name.endswith(".model") for name in here)
        tokenizer = _TOKENIZER not in patterns or (_TOKENIZER in here and words)
        whole = patterns[0] in here and tokenizer and has_weights(folder, patterns)
    except (OSError, ValueError, LookupError):
        return None
    return folder if whole else None


def has_weights(folder: Path, patterns: tuple[str, ...]) -> bool:
    """Whether all files of weights that a folder should have are there."""
    return patterns == TOKENIZER_FILES or all(path.is_file() for path in weight_files(folder))


# `huggingface_hub` would ask what runs this process, and set no limit to that answer.
@mock.patch.object(constants, "HF_HUB_DISABLE_TELEMETRY", True)
def _fetched(repo: str, patterns: tuple[str, ...]) -> Path:
    try:
        # `snapshot_download` waits for its first answer without a limit. This question has one.
        url = hf_hub_url(repo, patterns[0])
        if get_hf_file_metadata(url, timeout=ANSWER_S).commit_hash is not None:
            wanted = list(patterns)
            return Path(snapshot_download(repo, allow_patterns=wanted, etag_timeout=ANSWER_S))
        reason = f"what answers at {url} is no model hub"
    except OfflineModeIsEnabled:
        reason = "HF_HUB_OFFLINE is set"
    except RepositoryNotFoundError as error:  # gated ones too
        reason = (
            f"the model hub answered {error.response.status_code}: there is no such repository, or "
            "it is private or gated (ask for access on its page, then log in with `hf auth login` "
            "or set HF_TOKEN)"
        )
    except HfHubHTTPError as error:
        reason = f"the model hub answered {error.response.status_code} for {patterns[0]}"
    except Exception as error:  # whatever the HTTP library or the disk leads to
        reason = f"the model hub did not deliver it ({in_a_line(error)})"
    raise ModelUnavailable(f"{repo} is not all in the cache, and {reason}")


def _drop_altered(folder: Path) -> Path | None:
    """Remove and return the first file of weights that is not what the hub's sum says."""
    for path in filter(Path.is_file, weight_files(folder)):
        if recorded_sha256(path) not in (None, sha256_of(path)):
            path.resolve().unlink()
            path.unlink()
            return path
    return None
