"""Model repositories on the hub: is it there, is it cached, fetch it with a bound on the wait.

The hub is the one that `HF_ENDPOINT` names; `HF_HUB_OFFLINE` and the hub's own cache settings are
respected, because `huggingface_hub` does the work, in a child process that can be stopped.
"""

from __future__ import annotations

import json
import os
import re
import sys
import threading
from functools import cache
from pathlib import Path

import huggingface_hub
from huggingface_hub import constants

from patching_demo.models.fetch import (
    Damaged,
    ModelUnavailable,
    check_sha256,
    run_watched,
    say,
)

#: Seconds within which the hub has to answer before `auto` looks elsewhere.
PROBE_S = 4.0

_TOKENIZER = ("tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "*.model")
#: What to take from a repository; the first is the file without which it's no such repository.
#: Weights only as safetensors: a repository that has nothing else is refused.
MODEL_FILES = ("config.json", "generation_config.json", "model*.safetensors*", *_TOKENIZER)
#: TransformerLens's own older repositories have their weights as a state dict in a `.pth` file.
LEGACY_FILES = ("config.json", "*final.pth")
TOKENIZER_FILES = ("tokenizer_config.json", *_TOKENIZER)

_FETCH = """
import sys
from huggingface_hub import snapshot_download
try:
    print(snapshot_download(sys.argv[1], allow_patterns=sys.argv[2:]))
except Exception as error:
    said = str(error).strip().splitlines() or [""]
    sys.exit(f"Error: {type(error).__name__}: {said[0]}")
"""


def probe(repo: str, file: str = "config.json") -> str | None:
    """Return None if the hub serves a repository's JSON file promptly, else why not."""
    if constants.is_offline_mode():
        return "HF_HUB_OFFLINE is set"
    return _probe(huggingface_hub.hf_hub_url(repo, file))


@cache
def _probe(url: str) -> str | None:
    # One answer per process: a notebook that loads twice shouldn't wait twice. The thread makes the
    # bound hold for whatever is slow, name lookup and a trickle of bytes included.
    answer = ["the model hub did not answer in time"]

    def ask() -> None:
        try:
            session = huggingface_hub.get_session()
            response = session.get(url, timeout=PROBE_S, follow_redirects=True)
            if response.status_code != 200:
                answer[0] = f"the model hub answered {response.status_code}"
            elif isinstance(json.loads(response.text), dict):
                answer[0] = ""
            else:
                answer[0] = "the model hub answered something that is no configuration"
        except ValueError:
            answer[0] = "the model hub answered something that is no configuration"
        except Exception:  # whatever the HTTP library calls it, it means the same here
            answer[0] = "the model hub is not reachable"

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(PROBE_S)
    return answer[0] or None


def cached(repo: str, patterns: tuple[str, ...]) -> Path | None:
    """Return the repository's folder in the hub's cache if all that is needed is there."""
    found = huggingface_hub.try_to_load_from_cache(repo, patterns[0])
    if not isinstance(found, str):
        return None
    folder = Path(found).parent
    if patterns == TOKENIZER_FILES:
        return folder
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        return folder if all((folder / shard).is_file() for shard in shards) else None
    return folder if weight_files(folder) else None


def weight_files(folder: Path) -> list[Path]:
    """Return the weights in a repository's folder, `.safetensors` before `.pth`."""
    return sorted(folder.glob("model*.safetensors")) or sorted(folder.rglob("*final.pth"))


def repository(repo: str, patterns: tuple[str, ...], expected_bytes: int | None = None) -> Path:
    """Return a folder with the repository's files, from the hub's cache or fetched into it.

    Weights are checked against the sha256 under which the hub's cache filed them; an altered file
    is named, removed and fetched again.

    Raises:
        ModelUnavailable: not cached, and the hub is down, stalls, or has no such files.
    """
    folder = cached(repo, patterns)
    if folder is not None:
        try:
            check_weights(folder)
            return folder
        except Damaged as damage:
            say(f"Refused: {damage}. Fetching it again.")
            _drop_damaged(folder)
    reason = probe(repo, patterns[0])
    if reason:
        raise ModelUnavailable(f"{repo} is not cached, and {reason}")
    storage = Path(constants.HF_HUB_CACHE) / f"models--{repo.replace('/', '--')}"
    env = {
        **os.environ,
        # Plain downloads grow a file that can be watched, and keep one well-known cache layout.
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }
    try:
        run_watched(
            [sys.executable, "-c", _FETCH, repo, *patterns],
            watch=storage,
            expected_bytes=expected_bytes,
            label=repo,
            env=env,
        )
    except ModelUnavailable as error:
        raise ModelUnavailable(f"the hub did not deliver {repo} ({error})") from None
    folder = cached(repo, patterns)
    if folder is None:
        raise ModelUnavailable(
            f"{repo} has no {' or no '.join(patterns[: 3 if patterns is MODEL_FILES else 2])}"
        )
    try:
        check_weights(folder)
    except Damaged as damage:
        _drop_damaged(folder)
        raise ModelUnavailable(f"the hub delivered an altered file: {damage}") from None
    return folder


def check_weights(folder: Path) -> None:
    """Raise `Damaged` for a weights file that isn't what the hub's cache filed it as."""
    for path in weight_files(folder):
        stored = path.resolve().name
        # Files kept without links (on some systems) have no recorded sum to compare with.
        if re.fullmatch(r"[0-9a-f]{64}", stored):
            check_sha256(path, stored)


def _drop_damaged(folder: Path) -> None:
    for path in weight_files(folder):
        stored = path.resolve()
        try:
            if re.fullmatch(r"[0-9a-f]{64}", stored.name):
                check_sha256(path, stored.name)
        except Damaged:
            path.unlink(missing_ok=True)
            stored.unlink(missing_ok=True)
