"""Models from a hub: fetched, kept, checked, and never waited for too long.

Each case runs in a process of its own, because the hub's address is read when a library is
imported, against a hub on this machine's loopback that serves tiny models or a fault.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import tiny
import torch
from loopback_hub import COMMIT, GPT2, LEGACY, LEGACY_TOKENIZER, serve, tiny_repositories

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
    assert first.stdout == second.stdout == offline.stdout, offline.stderr
    logits, training, compatible, name = json.loads(first.stdout)
    assert (training, compatible, name) == (False, True, "gpt2-small")
    # Compatibility mode centres the unembedding, which leaves log-probabilities alone.
    torch.testing.assert_close(
        torch.tensor(logits).log_softmax(-1),
        repositories["gpt2_logits"].log_softmax(-1),
        atol=1e-4,
        rtol=1e-4,
    )
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
    assert first.stdout == second.stdout
    logits, training, compatible, name = json.loads(first.stdout)
    assert (training, compatible, name) == (False, True, "attn-only-2l")
    expected = legacy_forward(repositories["repos"][LEGACY]["model_final.pth"])
    torch.testing.assert_close(
        torch.tensor(logits).log_softmax(-1), expected.log_softmax(-1), atol=1e-4, rtol=1e-4
    )


def legacy_forward(packed: bytes) -> torch.Tensor:
    """Logits of the legacy weights by the textbook, without TransformerLens."""
    import io

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


def test_any_repository_that_transformer_lens_supports_can_be_named(repositories, tmp_path):
    repos = {"somebody/a-gpt2": repositories["repos"][GPT2]}
    with serve(repos) as hub:
        run = python(LOAD.format(name="somebody/a-gpt2", prompt=PROMPT), tmp_path, hub.address)
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout)[3] == "somebody/a-gpt2"


def test_weights_in_pickles_only_are_refused(repositories, tmp_path):
    files = dict(repositories["repos"][GPT2])
    del files["model.safetensors"]
    with serve({GPT2: files}) as hub:
        run = python(LOAD.format(name="gpt2-small", prompt=PROMPT), tmp_path, hub.address)
        assert not any(".bin" in line for line in hub.requests)
    assert run.returncode != 0
    assert "safetensors" in run.stderr.splitlines()[-1]


def test_a_pickle_that_runs_code_is_refused(repositories, tmp_path):
    import io
    import pickle

    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "sprung"), "w"))

    packed = io.BytesIO()
    torch.save({"embed.W_E": Trap()}, packed)
    repos = dict(repositories["repos"])
    repos[LEGACY] = {**repos[LEGACY], "model_final.pth": packed.getvalue()}
    with pytest.raises(pickle.UnpicklingError):
        torch.load(io.BytesIO(packed.getvalue()), weights_only=True)
    with serve(repos) as hub:
        run = python(LOAD.format(name="attn-only-2l", prompt=PROMPT), tmp_path, hub.address)
    assert run.returncode != 0
    assert "attn-only-2l-demo" in run.stderr.splitlines()[-1]
    assert not (tmp_path / "sprung").exists()


# A hub in trouble -------------------------------------------------------------------------------

RESOLVE = """
    import time
    import patching_demo.fetch
    patching_demo.fetch.STALL_S = 3
    from patching_demo.models import ModelUnavailable, load_model, resolve_model
    # What the offline model does is tested elsewhere; here it only has to be named.
    begun = time.monotonic()
    print(resolve_model("auto", "ioi"))
    print(resolve_model("attn-only-2l", "induction"))
    for name in ("gpt2-small", "attn-only-2l"):
        try:
            load_model(name)
        except ModelUnavailable as error:
            print(error)
            assert error.__cause__ is None and error.__suppress_context__
    print(time.monotonic() - begun)
"""


@pytest.mark.parametrize("fault", ["error", "rubbish", "silent", "trickle", "cut", "stall", "swap"])
def test_a_hub_in_trouble_costs_seconds_and_names_the_offline_model(fault, repositories, tmp_path):
    with serve(repositories["repos"], fault) as hub:
        run = python(RESOLVE, tmp_path, hub.address)
    assert run.returncode == 0, run.stderr
    lines = run.stdout.splitlines()
    assert lines[0].startswith("Model: smollm2-135m (") and lines[1] == "smollm2-135m"
    assert lines[2].startswith("Model: attn-only-2l-demo (") and lines[3] == "attn-only-2l-demo"
    assert "smollm2-135m" in lines[4] and lines[4].startswith("gpt2-small can't be loaded")
    assert "attn-only-2l-demo" in lines[5] and lines[5].startswith("attn-only-2l can't be loaded")
    assert len(lines) == 7
    assert float(lines[6]) < 60


def test_no_hub_at_all(tmp_path):
    run = python(RESOLVE, tmp_path, "http://127.0.0.1:9")
    assert run.returncode == 0, run.stderr
    lines = run.stdout.splitlines()
    assert [lines[1], lines[3]] == ["smollm2-135m", "attn-only-2l-demo"]
    assert "not reachable" in lines[0]


def test_hub_offline_setting_is_respected(repositories, tmp_path):
    with serve(repositories["repos"]) as hub:
        run = python(RESOLVE, tmp_path, hub.address, HF_HUB_OFFLINE="1")
        assert hub.requests == []
    assert "HF_HUB_OFFLINE" in run.stdout.splitlines()[0], run.stderr


def test_auto_takes_the_hubs_models_where_the_hub_answers(repositories, tmp_path):
    code = """
        from patching_demo.models import resolve_model
        print(resolve_model())
        print(resolve_model("auto", "induction"))
    """
    with serve(repositories["repos"]) as hub:
        run = python(code, tmp_path, hub.address)
    lines = run.stdout.splitlines()
    assert [lines[1], lines[3]] == ["gpt2-small", "attn-only-2l"], run.stdout + run.stderr


@pytest.mark.parametrize("damage", ["flip", "truncate"])
def test_altered_weights_are_refused_by_name_and_fetched_again(damage, repositories, tmp_path):
    code = LOAD.format(name="gpt2-small", prompt=PROMPT)
    with serve(repositories["repos"]) as hub:
        first = python(code, tmp_path, hub.address)
        (weights,) = (tmp_path / "hf").rglob("snapshots/*/model.safetensors")
        content = bytearray(weights.resolve().read_bytes())
        if damage == "flip":
            content[-1] ^= 1
        else:
            del content[-100:]
        weights.resolve().write_bytes(content)
        offline = python(code, tmp_path, hub.address, HF_HUB_OFFLINE="1")
        again = python(code, tmp_path, hub.address)
    assert offline.returncode != 0
    assert "Refused" in offline.stdout and "model.safetensors" in offline.stdout
    assert again.returncode == 0, again.stderr
    assert again.stdout.splitlines()[-1] == first.stdout.splitlines()[-1]


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
