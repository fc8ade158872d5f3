"""Models from a hub: fetched, kept, checked, never waited for too long, and not changed by folding.

A hub on this machine's loopback serves tiny models, or a fault. Tests set what `HF_ENDPOINT` and
the like set in a process of its own.
"""

from __future__ import annotations

import io
import os
import re
import shutil
import time
from contextlib import nullcontext

import machines
import pytest
import tiny
import torch
import transformers
from huggingface_hub import constants
from huggingface_hub.utils import _detect_agent
from loopback_hub import FAULTS, GPT2, LEGACY, LEGACY_CONFIG, assert_same_model, saved, serve
from loopback_hub import tiny_repositories as make_repositories
from transformer_lens.model_bridge import TransformerBridge

from patching_demo import models
from patching_demo.models import hub as hub_module
from patching_demo.models import load_model, resolve_model
from patching_demo.models.cache import ModelUnavailable

PROMPT = " John gave the"


@pytest.fixture(scope="module")
def repositories(tmp_path_factory) -> dict:
    gpt2 = tiny._hf("gpt2")[1].eval()
    repos = make_repositories(tmp_path_factory.mktemp("hub"), gpt2)
    return {"repos": repos, "gpt2_logits": logits_of(gpt2)}


@pytest.fixture
def connect(monkeypatch, tmp_path):
    """Return a function that points this process at a hub's address."""

    def use(address: str, offline: bool = False, cache: str = "hub") -> None:
        for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", models.MODEL_ENV):
            monkeypatch.delenv(name, raising=False)
            monkeypatch.delenv(name.lower(), raising=False)
        for name in [name for name in os.environ if name.startswith("HF_")]:
            monkeypatch.delenv(name)
        monkeypatch.setattr(constants, "ENDPOINT", address)
        template = address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf" / cache))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "hf" / "token"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
        # What its client asks once in a process, and once a day, it asks in each test.
        monkeypatch.setattr(constants, "AGENT_HARNESSES_PATH", str(tmp_path / "hf" / "agents"))
        monkeypatch.setattr(_detect_agent, "_registry", None)

    return use


def logits_of(model) -> torch.Tensor:
    tokens = tiny.tokenizer()(PROMPT, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        found = model(tokens.to(next(model.parameters()).device))
    return getattr(found, "logits", found).cpu()


def test_gpt2_is_fetched_once_then_loads_without_the_hub(repositories, connect, capfd):
    with serve(repositories["repos"]) as hub:
        connect(hub.address)
        model = load_model("gpt2-small")
        assert not model.training and model.compatibility_mode
        assert model.cfg.model_name == "gpt2-small"
        asked = [line for line in hub.requests if line.startswith("GET") and "/resolve/" in line]
        assert any(line.endswith("model.safetensors") for line in asked)
        assert not any(".bin" in line for line in asked)
        hub.requests.clear()
        # Nothing but the progress of the fetch on either stream, and then nothing at all.
        assert capfd.readouterr().out == ""
        again = load_model("gpt2-small")
        assert hub.requests == []
    connect(hub.address, offline=True)
    for found in (model, again, load_model("gpt2-small")):
        assert_same_model(logits_of(found), repositories["gpt2_logits"])
    assert capfd.readouterr() == ("", "")


def test_legacy_attention_only_model_is_fetched_with_its_tokenizer(
    repositories, connect, monkeypatch
):
    real, how = torch.load, []
    monkeypatch.setattr(
        torch, "load", lambda *a, **k: how.append(k["weights_only"]) or real(*a, **k)
    )
    with serve(repositories["repos"]) as hub:
        connect(hub.address)
        first = logits_of(load_model("attn-only-2l"))
        hub.requests.clear()
        assert torch.equal(logits_of(load_model("attn-only-2l")), first)
        assert hub.requests == []
    assert how == [True, True]
    assert_same_model(first, legacy_forward(repositories["repos"][LEGACY]["model_final.pth"]))


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


def test_weights_in_pickles_only_are_refused(repositories, connect):
    files = {k: v for k, v in repositories["repos"][GPT2].items() if k != "model.safetensors"}
    with serve({GPT2: files}) as hub:
        connect(hub.address)
        with pytest.raises(ModelUnavailable, match="safetensors"):
            load_model("gpt2-small")
        assert not any(".bin" in line for line in hub.requests)


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
        with pytest.raises(ModelUnavailable, match="UnpicklingError.*attn-only-2l-demo"):
            load_model("attn-only-2l")
    assert not sprung.exists()
    # The trap does work, on a reader who lets it.
    torch.load(io.BytesIO(packed.getvalue()), weights_only=False)
    assert sprung.exists()


def test_a_pth_file_without_a_recorded_sum_is_not_read(repositories, connect, monkeypatch):
    with serve(repositories["repos"]) as hub:
        connect(hub.address)
        weights = hub_module.repository(LEGACY, hub_module.LEGACY_FILES) / "model_final.pth"
        whole = weights.read_bytes()
        weights.unlink()  # a link to a file that is named by its sum
        weights.write_bytes(whole)
        monkeypatch.setattr(torch, "load", None)
        with pytest.raises(ModelUnavailable, match="no sha256 is recorded for .*model_final.pth"):
            load_model("attn-only-2l")


# A hub in trouble -------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", FAULTS)
def test_a_hub_in_trouble_costs_seconds_and_one_line(
    fault, repositories, connect, monkeypatch, capsys
):
    # The faults that cost waiting, with less of it.
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.2)
    wait = time.sleep  # before each new attempt
    monkeypatch.setattr(time, "sleep", lambda seconds: wait(min(seconds, 0.05)))
    monkeypatch.setattr(hub_module, "ANSWER_S", 1.0)
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
            assert ("sha256" in message) == (fault == "swap")
        assert time.monotonic() - begun < 90
        # A failure is not remembered: the hub is well again, and the same kernel goes on.
        hub.fault = ""
        assert resolve_model() == "gpt2-small"


def test_a_gated_model_loads_with_the_users_token(repositories, connect, monkeypatch):
    with serve({"a/gated": repositories["repos"][GPT2]}, "", "hf_secret") as hub:
        connect(hub.address)
        with pytest.raises(ModelUnavailable, match="answered 401.*gated.*hf auth login"):
            load_model("a/gated")
        monkeypatch.setenv("HF_TOKEN", "hf_secret")
        assert_same_model(logits_of(load_model("a/gated")), repositories["gpt2_logits"])


@pytest.mark.parametrize("known", [True, False], ids=["by us", "by another program"])
@pytest.mark.parametrize(
    "missing", [["tokenizer.json"], ["tokenizer_config.json"], ["model.safetensors"]]
)
def test_a_half_filled_cache_is_completed(missing, known, repositories, connect, tmp_path):
    with serve(repositories["repos"]) as hub:
        connect(hub.address, cache="hub" if known else "other")
        folder = hub_module.repository(GPT2, hub_module.MODEL_FILES)
        for name in missing:
            (folder / name).unlink()
        if not known:
            # `snapshot_download` alone keeps a list of what there is, and remembers it by its path.
            for listing in folder.parents[1].glob("trees/*"):
                listing.unlink()
            shutil.copytree(tmp_path / "hf" / "other", tmp_path / "hf" / "hub", symlinks=True)
        connect(hub.address, offline=True)
        with pytest.raises(ModelUnavailable, match="not all in the cache.*HF_HUB_OFFLINE"):
            load_model("gpt2-small")
        connect(hub.address)
        assert_same_model(logits_of(load_model("gpt2-small")), repositories["gpt2_logits"])


def test_a_sharded_model_counts_as_cached_only_when_every_shard_is_there(connect, tmp_path):
    tiny._hf("gpt2")[1].save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    with serve({"a/b": saved(tmp_path / "sharded", tiny.tokenizer())}) as hub:
        connect(hub.address)
        first, *others = hub_module.weight_files(
            hub_module.repository("a/b", hub_module.MODEL_FILES)
        )
        assert others and all(path.is_file() for path in others)
        first.unlink()
        connect(hub.address, offline=True)
        with pytest.raises(ModelUnavailable, match="not all in the cache"):
            load_model("a/b")


@pytest.mark.parametrize("trouble", ["no folder", "full"])
def test_a_hub_cache_that_cannot_be_written(trouble, repositories, connect, tmp_path):
    if trouble == "no folder":
        (tmp_path / "hf").write_text("in the way")  # Not even root makes a folder below a file.
    limit = machines.file_size_limit(20_000) if trouble == "full" else nullcontext()
    with serve(repositories["repos"]) as hub, limit:
        connect(hub.address)
        with pytest.raises(ModelUnavailable, match="NotADirectory|FileExists|too large") as caught:
            load_model("gpt2-small")
        assert resolve_model() == "smollm2-135m"
    assert "\n" not in str(caught.value) and 'load_model("smollm2-135m")' in str(caught.value)
    assert not list(tmp_path.rglob("*.safetensors")), "half a file is no file"


def test_the_hubs_models_are_taken_where_it_answers_and_it_may_be_asked(
    repositories, connect, capsys
):
    connect("http://127.0.0.1:9")  # nobody answers
    assert resolve_model() == "smollm2-135m"
    assert "ConnectError" in capsys.readouterr().out
    with serve(repositories["repos"]) as hub:
        connect(hub.address, offline=True)
        assert resolve_model() == "smollm2-135m"
        assert hub.requests == []
        assert "HF_HUB_OFFLINE" in capsys.readouterr().out
        connect(hub.address)
        for _ in range(2):
            assert resolve_model() == "gpt2-small"
            assert resolve_model("auto", "induction") == "attn-only-2l"
            asked, hub.requests[:] = list(hub.requests), []
        assert asked == []  # cached by then


@pytest.mark.parametrize("damage", ["flip", "truncate"])
def test_altered_weights_are_refused_by_name_and_fetched_again(
    damage, repositories, connect, capsys
):
    with serve(repositories["repos"]) as hub:
        connect(hub.address)
        folder = hub_module.repository(GPT2, hub_module.MODEL_FILES)
        weights = (folder / "model.safetensors").resolve()
        whole = weights.read_bytes()
        altered = whole[:-1] + bytes([whole[-1] ^ 1]) if damage == "flip" else whole[:-100]
        weights.write_bytes(altered)
        assert hub_module.repository(GPT2, hub_module.MODEL_FILES) == folder
        said = capsys.readouterr().out
        assert said.startswith("Refused: ") and "model.safetensors" in said
        assert (folder / "model.safetensors").read_bytes() == whole
        # Without the hub the altered file is still refused.
        (folder / "model.safetensors").resolve().write_bytes(altered)
        connect(hub.address, offline=True)
        with pytest.raises(ModelUnavailable, match="HF_HUB_OFFLINE"):
            load_model("gpt2-small")


def test_weights_that_repositories_share_are_not_taken_for_altered(
    repositories, connect, tmp_path, capsys
):
    """The cache may keep one copy for many repositories, under a hash that is no sha256."""
    with serve(repositories["repos"]) as hub:
        connect(hub.address)
        folder = hub_module.repository(GPT2, hub_module.MODEL_FILES)
        kept = (folder / "model.safetensors").resolve()
        shared = kept.rename(tmp_path / ("0" * 64))
        kept.symlink_to(shared)
        assert hub_module.repository(GPT2, hub_module.MODEL_FILES) == folder
    assert capsys.readouterr().out == ""


# Folding ----------------------------------------------------------------------------------------

DECODER = {
    "vocab_size": tiny.D_VOCAB,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "hidden_size": 32,
    "intermediate_size": 48,
    "max_position_embeddings": tiny.N_CTX,
}
GROUPED = {**DECODER, "num_key_value_heads": 2}
#: family: (its settings, what of compatibility mode changes it: see `models.LEFT_OUT`)
FOLDED = {
    "GptOss": (
        {**GROUPED, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2},
        "fold_value_biases=False",
    ),
    "BitNet": (GROUPED, "no_processing=True"),
    # Its value biases are fewer than TransformerLens folds: an error, without the mend.
    "Phi": (GROUPED, "fold_value_biases=False"),
    "Qwen2": (GROUPED, ""),
    "GPTNeoX": (DECODER, ""),
    "Gemma2": ({**GROUPED, "head_dim": 8, "final_logit_softcapping": 3.0}, ""),
}


def random_model(family: str, settings: dict):
    """A tiny model with weights that count, norms and biases included."""
    config = getattr(transformers, f"{family}Config")(**settings)
    model = getattr(transformers, f"{family}ForCausalLM")._from_config(
        config, attn_implementation="eager"
    )
    for parameter in model.parameters():
        mean, spread = (0, 0.2) if parameter.ndim > 1 else (0.7, 0.3)
        torch.nn.init.normal_(parameter, mean, spread)
    return model.eval()


@pytest.mark.parametrize("family", FOLDED)
def test_what_would_change_a_models_predictions_is_left_out(
    family, connect, tmp_path, monkeypatch, capsys
):
    settings, left_out = FOLDED[family]
    model = random_model(family, settings)
    repo = f"somebody/{family}"
    tried = []
    real = TransformerBridge.enable_compatibility_mode
    monkeypatch.setattr(
        TransformerBridge,
        "enable_compatibility_mode",
        lambda bridge, **options: tried.append(options) or real(bridge, **options),
    )
    with serve({repo: saved(tmp_path / "files", model, tiny.tokenizer())}) as hub:
        connect(hub.address)
        bridge = load_model(repo)
    assert_same_model(logits_of(bridge), logits_of(model))
    assert bridge.compatibility_mode and not bridge.training
    assert bridge.cfg.model_name == repo
    said = capsys.readouterr().out
    assert said.count("\n") == bool(left_out) and f"({left_out})" * bool(left_out) in said
    assert len(tried) == 1 or left_out, "folded at once where that changes nothing"


@pytest.mark.parametrize("fails", ["differs", "raises"])
def test_a_model_that_is_another_one_in_transformer_lens_is_refused(fails, monkeypatch):
    def spoil(bridge, **options):
        if fails == "raises":
            raise RuntimeError("this adapter does not support it.\nand more")
        with torch.no_grad():
            bridge.unembed.W_U[:, 0] += 0.01

    monkeypatch.setattr(TransformerBridge, "enable_compatibility_mode", spoil)
    words = {"differs": "off by", "raises": "RuntimeError: this adapter does not support it"}
    with pytest.raises(ModelUnavailable, match=rf"{words[fails]}.*\)\.$") as refusal:
        load_model("attn-only-2l-demo")
    assert not re.search(r"\.[.)]", str(refusal.value)), "a full stop within the sentence"


# The real hub -----------------------------------------------------------------------------------


@pytest.mark.hub
def test_gpt2_small_gives_the_published_logit_differences():
    from patching_demo import ioi_task

    task = ioi_task(load_model("gpt2-small"))
    assert task.clean_baseline == pytest.approx(3.5519, abs=5e-4)
    assert task.corrupted_baseline == pytest.approx(-3.5519, abs=5e-4)
    pairs = [[5335, 1757], [4186, 3700], [6035, 15686], [5780, 14235]]
    assert task.answers.tolist() == [row for pair in pairs for row in (pair, pair[::-1])]


@pytest.mark.hub
def test_the_hubs_attention_only_model_does_induction():
    from patching_demo import induction_task

    task = induction_task(load_model("attn-only-2l"))
    assert task.clean_baseline > task.corrupted_baseline + 3
