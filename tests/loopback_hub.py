"""A model hub on this machine's loopback, good or faulty, for tests of all that asks the hub.

It serves the few addresses that `huggingface_hub` needs to fetch a repository: its description, its
list of files, and the files themselves with the headers that say what they are.
"""

from __future__ import annotations

import hashlib
import io
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import tiny
import torch

COMMIT = "0123456789abcdef0123456789abcdef01234567"
#: What a faulty hub does: `fault` of `LoopbackHub` is one of them, or "" for a good hub.
FAULTS = ("error", "rubbish", "silent", "trickle", "cut", "stall", "swap")


class LoopbackHub:
    """The repositories it serves, the fault it has, and the requests it got."""

    def __init__(
        self, repos: dict[str, dict[str, bytes]], fault: str = "", token: str = ""
    ) -> None:
        assert fault in ("", *FAULTS)
        self.repos = repos
        self.fault = fault
        #: Without this token in its header, a request is refused, as for a gated model.
        self.token = token
        self.requests: list[str] = []
        self.closing = threading.Event()
        self.address = ""


def _entry(path: str, content: bytes) -> dict:
    git = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    entry = {"type": "file", "path": path, "size": len(content), "oid": git}
    if path.endswith((".safetensors", ".pth", ".bin")):
        digest = hashlib.sha256(content).hexdigest()
        entry["lfs"] = {"oid": digest, "size": len(content), "pointerSize": 134}
    return entry


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: LoopbackHub

    def log_message(self, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._serve(body=False)

    def do_GET(self) -> None:
        self._serve(body=True)

    def _send(self, status: int, content: bytes, headers: dict[str, str], body: bool) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if body:
            self.wfile.write(content)

    def _json(self, value: object, body: bool) -> None:
        headers = {"Content-Type": "application/json"}
        self._send(200, json.dumps(value).encode(), headers, body)

    def _serve(self, body: bool) -> None:
        hub, path = self.hub, self.path.partition("?")[0].strip("/")
        hub.requests.append(f"{self.command} /{path}")
        if hub.fault == "silent":
            hub.closing.wait(60)
            return
        if hub.fault == "trickle":
            self.send_response(200)
            self.send_header("Content-Length", "100000")
            self.end_headers()
            while body and not hub.closing.wait(0.5):
                self.wfile.write(b" ")
            return
        if hub.token and self.headers.get("Authorization") != f"Bearer {hub.token}":
            return self._send(401, b"", {"X-Error-Code": "GatedRepo"}, body)
        if hub.fault == "error":
            return self._send(503, b"", {}, body)
        if hub.fault == "rubbish":
            page = b"<html><title>Sign in to the network</title></html>"
            return self._send(200, page, {"Content-Type": "text/html"}, body)
        for repo, files in hub.repos.items():
            if path in (f"api/models/{repo}", f"api/models/{repo}/revision/main"):
                siblings = [{"rfilename": name} for name in files]
                return self._json({"id": repo, "sha": COMMIT, "siblings": siblings}, body)
            if path in (f"api/models/{repo}/tree/{rev}" for rev in ("main", COMMIT)):
                return self._json([_entry(*item) for item in files.items()], body)
            for revision in ("main", COMMIT):
                prefix = f"{repo}/resolve/{revision}/"
                if path.startswith(prefix) and path.removeprefix(prefix) in files:
                    return self._file(path, files[path.removeprefix(prefix)], body)
        headers = {"X-Error-Code": "EntryNotFound" if "/resolve/" in path else "RepoNotFound"}
        self._send(404, b"", {"X-Repo-Commit": COMMIT, **headers}, body)

    def _file(self, path: str, content: bytes, body: bool) -> None:
        entry = _entry(path, content)
        etag = entry.get("lfs", entry)["oid"]
        headers = {
            "ETag": f'"{etag}"',
            "X-Linked-Etag": f'"{etag}"',
            "X-Linked-Size": str(len(content)),
            "X-Repo-Commit": COMMIT,
            "Accept-Ranges": "bytes",
        }
        if body and "lfs" in entry and self.hub.fault == "swap":
            content = content[::-1]  # right length and name, other content
        if body and "lfs" in entry and self.hub.fault in ("cut", "stall"):
            self._send(200, content, headers, body=False)
            self.wfile.write(content[: len(content) // 2])
            self.wfile.flush()
            if self.hub.fault == "stall":
                self.hub.closing.wait(60)
            else:
                self.hub.fault = "error"
            self.close_connection = True
            return
        self._send(200, content, headers, body)


@contextmanager
def serve(repos: dict[str, dict[str, bytes]], *fault_and_token: str) -> Iterator[LoopbackHub]:
    """Serve the repositories until the block ends; the hub's `address` is for `HF_ENDPOINT`."""
    hub = LoopbackHub(repos, *fault_and_token)
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    hub.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield hub
    finally:
        hub.closing.set()
        server.shutdown()
        server.server_close()
        thread.join()


# What it serves ---------------------------------------------------------------------------------

GPT2 = "openai-community/gpt2"
LEGACY = "NeelNanda/Attn_Only_2L512W_C4_Code"
LEGACY_TOKENIZER = "NeelNanda/gpt-neox-tokenizer-digits"
LEGACY_CONFIG = {
    "d_model": 16,
    "n_layers": 2,
    "d_mlp": 64,
    "d_head": 8,
    "n_heads": 2,
    "n_ctx": tiny.N_CTX,
    "d_vocab": tiny.D_VOCAB,
    "act_fn": "solu_ln",
    "attn_only": True,
    "normalization": "LN",
    "tokenizer_name": LEGACY_TOKENIZER,
}


def saved(folder: Path, *parts) -> dict[str, bytes]:
    """Return the files that models and tokenizers write into a folder."""
    for part in parts:
        part.save_pretrained(folder)
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*.*")}


def tiny_repositories(folder: Path, gpt2) -> dict[str, dict[str, bytes]]:
    """Return a GPT-2, a legacy attention-only model with random weights, and its tokenizer."""
    weights = io.BytesIO()
    torch.save(legacy_state(), weights)
    # The GPT-2's weights also in a form that nobody may read.
    return {
        GPT2: {**saved(folder / "gpt2", gpt2, tiny.tokenizer()), "pytorch_model.bin": b"a pickle"},
        LEGACY: {
            "config.json": json.dumps(LEGACY_CONFIG).encode(),
            "model_final.pth": weights.getvalue(),
        },
        LEGACY_TOKENIZER: saved(folder / "words", tiny.tokenizer()),
    }


def legacy_state() -> dict[str, torch.Tensor]:
    """Return random weights in the layout of TransformerLens's older repositories."""
    draw = torch.Generator().manual_seed(0)
    width, heads, size = (LEGACY_CONFIG[name] for name in ("d_model", "n_heads", "d_head"))
    shapes: dict[str, tuple[int, ...]] = {
        "embed.W_E": (tiny.D_VOCAB, width),
        "pos_embed.W_pos": (tiny.N_CTX, width),
        "ln_final.w": (width,),
        "ln_final.b": (width,),
        "unembed.W_U": (width, tiny.D_VOCAB),
    }
    for layer in range(LEGACY_CONFIG["n_layers"]):
        block = f"blocks.{layer}"
        shapes |= {f"{block}.ln1.w": (width,), f"{block}.ln1.b": (width,)}
        for name in "QKV":
            shapes[f"{block}.attn.W_{name}"] = (heads, width, size)
            shapes[f"{block}.attn.b_{name}"] = (heads, size)
        shapes[f"{block}.attn.W_O"] = (heads, size, width)
        shapes[f"{block}.attn.b_O"] = (width,)
    return {key: torch.randn(*shape, generator=draw) * 0.2 for key, shape in shapes.items()}


def assert_same_model(logits: torch.Tensor, expected: torch.Tensor) -> None:
    """Compatibility mode centres the unembedding, which leaves log-probabilities alone."""
    torch.testing.assert_close(
        logits.log_softmax(-1), expected.log_softmax(-1), atol=1e-4, rtol=1e-4
    )
