"""Models from a hub: fetched, kept, checked, and never waited for too long.

A hub on this machine's loopback serves tiny models, or a fault. The main cases run in a process of
their own, as a reader's do, where `HF_ENDPOINT` and the rest have their effect; the others set what
those variables set, which is quicker.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import tiny
import torch
from huggingface_hub import constants
from loopback_hub import COMMIT, FAULTS, GPT2, LEGACY, LEGACY_TOKENIZER, serve, tiny_repositories

from patching_demo import models
from patching_demo.models import fetch, load_model, resolve_model
from patching_demo.models import hub as hub_module
from patching_demo.models.fetch import ModelUnavailable

ROOT = Path(__file__).resolve().parents[1]
PROMPT = " John gave the"
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


@pytest.fixture(scope="module")
def repositories(tmp_path_factory) -> dict:
    gpt2 = tiny._hf("gpt2")[1]
    repos = tiny_repositories(tmp_path_factory.mktemp("hub"), tiny.tokenizer(), gpt2, LEGACY_CONFIG)
    expected = gpt2.eval()(tiny.tokenizer()(PROMPT, return_tensors="pt")["input_ids"]).logits
    return {"repos": repos, "gpt2_logits": expected.detach()}


@pytest.fixture
def connect(monkeypatch, tmp_path):
    """Return a function that points this process, and its children, at a hub's address."""

    def use(address: str, offline: bool = False) -> None:
        for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", models.MODEL_ENV):
            monkeypatch.delenv(name, raising=False)
            monkeypatch.delenv(name.lower(), raising=False)
        for name, value in {
            "HF_ENDPOINT": address,
            "HF_HOME": str(tmp_path / "hf"),
            "HF_HUB_CACHE": str(tmp_path / "hf" / "hub"),
            "HF_HUB_OFFLINE": str(int(offline)),
        }.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(constants, "ENDPOINT", address)
        template = address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf" / "hub"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
        hub_module._probe.cache_clear()

    yield use
    hub_module._probe.cache_clear()


def logits_of(model) -> torch.Tensor:
    with torch.no_grad():
        return model(PROMPT)


def python(code: str, home: Path, address: str, **env: str) -> subprocess.CompletedProcess:
    """Run code as a reader's process would, with its own empty hub cache and package cache."""
    clean = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(("HF_", "TRANSFORMERS_", "HUGGINGFACE_", "PATCHING_DEMO_"))
        and key.lower() not in ("http_proxy", "https_proxy", "all_proxy")
    }
    settings = {
        "HF_HOME": str(home / "hf"),
        "HF_ENDPOINT": address,
        "PATCHING_DEMO_CACHE": str(home / "own"),
        "PYTHONPATH": str(ROOT),
        "PYTHONWARNINGS": "ignore",
        "OMP_NUM_THREADS": "1",
        **env,
    }
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**clean, **settings},
        cwd=home,
        text=True,
        capture_output=True,
        timeout=300,
    )


LOAD = """
    import json
    import torch
    from patching_demo.models import load_model
    model = load_model("{name}")
    with torch.no_grad():
        logits = model({prompt!r})
    print(json.dumps([
        logits.tolist(), model.training, model.compatibility_mode, model.cfg.model_name
    ]))
"""


def loaded(run: subprocess.CompletedProcess, name: str) -> torch.Tensor:
    """Return the logits of a process that ran `LOAD`, having checked what else it said."""
    assert run.returncode == 0, run.stderr
    logits, training, compatible, called = json.loads(run.stdout.splitlines()[-1])
    assert (training, compatible, called) == (False, True, name)
    return torch.tensor(logits)


def assert_same_model(logits: torch.Tensor, expected: torch.Tensor) -> None:
    # Compatibility mode centres the unembedding, which leaves log-probabilities alone.
    torch.testing.assert_close(
        logits.log_softmax(-1), expected.log_softmax(-1), atol=1e-4, rtol=1e-4
    )


def test_gpt2_is_fetched_once_then_loads_without_the_hub(repositories, tmp_path):
    code = LOAD.format(name="gpt2-small", prompt=PROMPT)
    with serve(repositories["repos"]) as hub:
        first = python(code, tmp_path, hub.address)
        assert first.returncode == 0, first.stderr
        asked = [line for line in hub.requests if line.startswith("GET") and "/resolve/" in line]
        assert any(line.endswith("model.safetensors") for line in asked)
        assert not any(".bin" in line for line in asked)
        hub.requests.clear()
        second = python(code, tmp_path, hub.address)
        assert hub.requests == []
    offline = python(code, tmp_path, hub.address, HF_HUB_OFFLINE="1")
    logits = loaded(first, "gpt2-small")
    assert_same_model(logits, repositories["gpt2_logits"])
    assert torch.equal(loaded(second, "gpt2-small"), logits)
    assert torch.equal(loaded(offline, "gpt2-small"), logits)
    # Nothing that isn't the answer, on either stream, but for the progress of the first fetch.
    assert len(first.stdout.splitlines()) == 1
    assert second.stderr == ""


def test_legacy_attention_only_model_is_fetched_with_its_tokenizer(repositories, tmp_path):
    code = LOAD.format(name="attn-only-2l", prompt=PROMPT)
    with serve(repositories["repos"]) as hub:
        first = python(code, tmp_path, hub.address)
        assert first.returncode == 0, first.stderr
        assert f"GET /{LEGACY}/resolve/{COMMIT}/model_final.pth" in hub.requests
        hub.requests.clear()
        second = python(code, tmp_path, hub.address)
        assert hub.requests == []
    logits = loaded(first, "attn-only-2l")
    assert_same_model(logits, legacy_forward(repositories["repos"][LEGACY]["model_final.pth"]))
    assert torch.equal(loaded(second, "attn-only-2l"), logits)


def legacy_forward(packed: bytes) -> torch.Tensor:
    """Logits of the legacy weights by the textbook, without TransformerLens."""
    w = torch.load(io.BytesIO(packed), weights_only=True)
    tokens = tiny.tokenizer()(PROMPT, return_tensors="pt")["input_ids"]
    length = tokens.shape[1]
    width = LEGACY_CONFIG["d_model"]

    def norm(x, name):
        return torch.nn.functional.layer_norm(x, (width,), w[f"{name}.w"], w[f"{name}.b"], 1e-5)

    x = w["embed.W_E"][tokens] + w["pos_embed.W_pos"][:length]
    future = torch.ones(length, length).triu(1).bool()
    for layer in range(LEGACY_CONFIG["n_layers"]):
        b = f"blocks.{layer}.attn"
        y = norm(x, f"blocks.{layer}.ln1")
        q, k, v = (
            torch.einsum("bpm,hmd->bhpd", y, w[f"{b}.W_{n}"]) + w[f"{b}.b_{n}"][:, None]
            for n in "QKV"
        )
        scores = (q @ k.transpose(-1, -2)) / LEGACY_CONFIG["d_head"] ** 0.5
        z = scores.masked_fill(future, float("-inf")).softmax(-1) @ v
        x = x + torch.einsum("bhpd,hdm->bpm", z, w[f"{b}.W_O"]) + w[f"{b}.b_O"]
    return norm(x, "ln_final") @ w["unembed.W_U"]


def test_any_repository_that_transformer_lens_supports_can_be_named(repositories, connect):
    with serve({"somebody/a-gpt2": repositories["repos"][GPT2]}) as hub:
        connect(hub.address)
        model = load_model("somebody/a-gpt2")
    assert model.cfg.model_name == "somebody/a-gpt2"
    assert_same_model(logits_of(model), repositories["gpt2_logits"])


def test_weights_in_pickles_only_are_refused(repositories, connect):
    files = {k: v for k, v in repositories["repos"][GPT2].items() if k != "model.safetensors"}
    assert "pytorch_model.bin" in files
    with serve({GPT2: files}) as hub:
        connect(hub.address)
        with pytest.raises(ModelUnavailable, match="safetensors"):
            load_model("gpt2-small")
        assert not any(".bin" in line for line in hub.requests)


def test_no_model_is_unpickled(repositories, connect, monkeypatch):
    def refuse(*_, **__):
        pytest.fail("something is unpickled")

    with serve(repositories["repos"]) as hub:
        connect(hub.address)
        for module, name in ((torch, "load"), (pickle, "load"), (pickle, "Unpickler")):
            monkeypatch.setattr(module, name, refuse)
        for name in ("gpt2-small", "attn-only-2l"):
            assert torch.isfinite(logits_of(load_model(name))).all()


def test_a_pickle_that_runs_code_is_refused(repositories, connect, tmp_path):
    sprung = tmp_path / "sprung"

    class Trap:
        def __reduce__(self):
            return (open, (str(sprung), "w"))

    packed = io.BytesIO()
    torch.save({"embed.W_E": Trap()}, packed)
    repos = dict(repositories["repos"])
    repos[LEGACY] = {**repos[LEGACY], "model_final.pth": packed.getvalue()}
    with serve(repos) as hub:
        connect(hub.address)
        with pytest.raises(ModelUnavailable, match="GLOBAL .*open .*attn-only-2l-demo"):
            load_model("attn-only-2l")
    assert not sprung.exists()
    # The trap does work, on a reader who lets it.
    torch.load(io.BytesIO(packed.getvalue()), weights_only=False)
    assert sprung.exists()


# A hub in trouble -------------------------------------------------------------------------------

SUMS_DIFFER = {"swap"}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_hub_in_trouble_costs_seconds_and_names_the_offline_model(
    fault, repositories, connect, monkeypatch, capsys
):
    # The faults that cost waiting, with less of it.
    if fault == "stall":
        monkeypatch.setattr(fetch, "STALL_S", 2.0)
    if fault in ("silent", "trickle"):
        monkeypatch.setattr(hub_module, "PROBE_S", 1.0)
    begun = time.monotonic()
    with serve(repositories["repos"], fault) as hub:
        connect(hub.address)
        for requested, task, offline in (
            ("auto", "ioi", "smollm2-135m"),
            ("attn-only-2l", "induction", "attn-only-2l-demo"),
        ):
            assert resolve_model(requested, task) == offline
            said = capsys.readouterr().out
            assert said.startswith(f"Model: {offline} (") and said.count("\n") == 1
        for name, offline in (
            ("gpt2-small", "smollm2-135m"),
            ("attn-only-2l", "attn-only-2l-demo"),
        ):
            with pytest.raises(ModelUnavailable) as caught:
                load_model(name)
            message = str(caught.value)
            assert message.startswith(f"{name} can't be loaded: ")
            assert f'load_model("{offline}")' in message and "\n" not in message
            # In a notebook and elsewhere: that line, not what led to it.
            assert caught.value.__suppress_context__
            assert caught.value._render_traceback_() == [f"ModelUnavailable: {message}"]
            assert ("sha256" in message) == (fault in SUMS_DIFFER)
    assert time.monotonic() - begun < 90


@pytest.mark.parametrize("trouble", ["no folder", "full"])
def test_a_hub_cache_that_cannot_be_written(trouble, repositories, connect, monkeypatch, tmp_path):
    with serve(repositories["repos"]) as hub:
        connect(hub.address)
        if trouble == "no folder":
            # Not even root can make a folder below a file.
            (tmp_path / "hf").write_text("in the way")
            reason = "NotADirectoryError|FileExistsError"
        else:
            monkeypatch.setattr(hub_module, "_FETCH", FULL_DISK + hub_module._FETCH)
            reason = "No space left|File too large|Errno 27"
        with pytest.raises(ModelUnavailable, match=reason) as caught:
            load_model("gpt2-small")
        message = str(caught.value)
        assert "\n" not in message and 'load_model("smollm2-135m")' in message
        assert resolve_model() == "smollm2-135m"
    if trouble == "full":
        assert not list((tmp_path / "hf").rglob("*.safetensors")), "half a file is no file"
        assert hub_module.cached(GPT2, hub_module.MODEL_FILES) is None


#: As on a full disk, writes beyond a few kilobytes fail, here in the process that fetches.
FULL_DISK = """
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
"""


def test_no_hub_at_all(connect, capsys):
    connect("http://127.0.0.1:9")
    assert resolve_model() == "smollm2-135m"
    assert resolve_model("auto", "induction") == "attn-only-2l-demo"
    assert capsys.readouterr().out.count("not reachable") == 2


def test_hub_offline_setting_is_respected(repositories, connect, capsys):
    with serve(repositories["repos"]) as hub:
        connect(hub.address, offline=True)
        assert resolve_model() == "smollm2-135m"
        assert hub.requests == []
    assert "HF_HUB_OFFLINE" in capsys.readouterr().out


def test_auto_takes_the_hubs_models_where_the_hub_answers(repositories, connect):
    with serve(repositories["repos"]) as hub:
        connect(hub.address)
        assert resolve_model() == "gpt2-small"
        assert resolve_model("auto", "induction") == "attn-only-2l"
        hub.requests.clear()
        # Now they are cached, so nobody is asked any more.
        hub_module._probe.cache_clear()
        assert resolve_model() == "gpt2-small"
        assert resolve_model("auto", "induction") == "attn-only-2l"
        assert hub.requests == []


@pytest.mark.parametrize("damage", ["flip", "truncate"])
def test_altered_weights_are_refused_by_name_and_fetched_again(
    damage, repositories, connect, tmp_path, capsys
):
    with serve(repositories["repos"]) as hub:
        connect(hub.address)
        folder = hub_module.repository(GPT2, hub_module.MODEL_FILES)
        weights = (folder / "model.safetensors").resolve()
        whole = weights.read_bytes()
        altered = whole[:-1] + bytes([whole[-1] ^ 1]) if damage == "flip" else whole[:-100]
        weights.write_bytes(altered)
        hub.requests.clear()
        assert hub_module.repository(GPT2, hub_module.MODEL_FILES) == folder
        assert any("model.safetensors" in line for line in hub.requests)
        said = capsys.readouterr().out
        assert said.startswith("Refused: ") and "model.safetensors" in said
        assert (folder / "model.safetensors").read_bytes() == whole
        # Without the hub the altered file is still refused.
        (folder / "model.safetensors").resolve().write_bytes(altered)
        connect(hub.address, offline=True)
        with pytest.raises(ModelUnavailable, match="HF_HUB_OFFLINE"):
            load_model("gpt2-small")


def test_a_sharded_model_counts_as_cached_only_when_every_shard_is_there(connect, tmp_path):
    connect("http://127.0.0.1:9", offline=True)
    folder = tmp_path / "hf" / "hub" / "models--a--b" / "snapshots" / COMMIT
    folder.mkdir(parents=True)
    (folder.parents[1] / "refs").mkdir()
    (folder.parents[1] / "refs" / "main").write_text(COMMIT)
    (folder / "config.json").write_text("{}")
    shards = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    index = {"weight_map": {"a": shards[0], "b": shards[1]}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / shards[0]).write_bytes(b"")
    assert hub_module.cached("a/b", hub_module.MODEL_FILES) is None
    (folder / shards[1]).write_bytes(b"")
    assert hub_module.cached("a/b", hub_module.MODEL_FILES) == folder


# The real hub -----------------------------------------------------------------------------------


@pytest.mark.hub
def test_gpt2_small_gives_the_published_logit_differences():
    from patching_demo import ioi_task, load_model

    task = ioi_task(load_model("gpt2-small"))
    assert task.clean_baseline == pytest.approx(3.5519, abs=1e-3)
    assert task.corrupted_baseline == pytest.approx(-3.5519, abs=1e-3)
    assert task.answers.tolist() == [
        [5335, 1757],
        [1757, 5335],
        [4186, 3700],
        [3700, 4186],
        [6035, 15686],
        [15686, 6035],
        [5780, 14235],
        [14235, 5780],
    ]


@pytest.mark.hub
def test_the_hubs_attention_only_model_does_induction():
    from patching_demo import induction_task, load_model

    task = induction_task(load_model("attn-only-2l"))
    assert task.clean_baseline > task.corrupted_baseline + 3
