"""Write benchmark/how-far.md: what questions cost on larger models, by ``plan``.

    python scripts/how_far.py

The speed of two cores is measured here, and the first table holds plans against sweeps that are
run. Everything else is arithmetic.
"""

from __future__ import annotations

import math
import platform
import time
from pathlib import Path
from typing import Any

import torch
from transformers import GPT2Config, LlamaConfig

from patching_demo import ioi_task, load_model, plan, sweep

OUT = Path(__file__).resolve().parent.parent / "benchmark" / "how-far.md"
PROMPTS = (8, 100, 1000)
#: NVIDIA's data sheet for the H100 SXM: dense bfloat16 products. A share of it is assumed.
H100, SHARE, H100_BYTES = 989e12, 0.4, 80e9
CPU_BYTES = 24 * 2**30
UNITS = (("d", 86400), ("h", 3600), ("min", 60))
CONFIGS = {
    "GPT-2 XL (1.6B)": GPT2Config(n_embd=1600, n_layer=48, n_head=25),
    "7B (Llama 2)": LlamaConfig(
        hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
        vocab_size=32000, dtype=torch.bfloat16,
    ),
    "70B (Llama 3)": LlamaConfig(
        hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64,
        num_key_value_heads=8, vocab_size=128256, dtype=torch.bfloat16,
    ),
}  # fmt: skip


def passes(model: Any, task: Any) -> dict[str, float]:
    """Forward passes that each question takes, those around the cells included."""
    asked = {
        "`sweep`, resid_pre by position": plan(model, task, "resid_pre", speed=1.0),
        "`sweep`, head outputs by position": plan(model, task, "out", speed=1.0),
        "`sweep`, resid_pre by role": plan(model, task, "resid_pre", by="role", speed=1.0),
        "`sweep`, whole heads": plan(model, task, "out", by="all_pos", speed=1.0),
    }
    found = {name: own.passes for name, own in asked.items()}
    # Each sender before a late query is one run from there on.
    n_layers = model.cfg.n_layers if hasattr(model, "cfg") else model.num_hidden_layers
    late = plan(model, task, "q", by="all_pos", layers=[n_layers * 9 // 10], speed=1.0)
    senders = asked["`sweep`, whole heads"].cells * 0.9
    found["`paths` to a late query"] = 5 + senders * (late.passes - 5) / late.cells
    found["`patch`, 200 sets"] = 205.0
    found["`attribute`, all kinds"] = 6.0  # two forward, one backward, which costs two
    return found


def words(every: list[float]) -> str:
    """Seconds in words that do not break, once if all are the same."""
    found = []
    for seconds in every:
        unit, size = next((u for u in UNITS if seconds >= 1.5 * u[1]), ("s", 1))
        number = f"{seconds / size:,.0f}" if seconds >= 1 else "<\N{NO-BREAK SPACE}1"
        found.append(f"{number}\N{NO-BREAK SPACE}{unit}")
    return found[0] if len(set(found)) == 1 else ", ".join(found)


def measured(model: Any, task: Any) -> tuple[list[str], float]:
    """Plans against sweeps on this machine, and its speed."""
    rows, speed = [], 0.0
    for kind, by in (("resid_pre", "pos"), ("mlp_out", "pos"), ("k", "pos"), ("out", "all_pos")):
        planned = plan(model, task, kind, by=by)
        begin = time.perf_counter()
        sweep(model, task, kind, by=by, progress=False)
        seconds = time.perf_counter() - begin
        speed = max(speed, planned.flops / planned.seconds)
        rows.append(
            f"| {kind}, by {by} | {planned.cells:,} | {planned.passes:.0f} | "
            f"{planned.seconds:.1f} | {seconds:.1f} |"
        )
    return rows, speed


def main() -> None:
    model = load_model("smollm2-135m")
    task = ioi_task(model)
    rows, speed = measured(model, task)
    lines = [
        f"Measured on {platform.machine()}, {torch.get_num_threads()} threads, torch "
        f"{torch.__version__}, with SmolLM2-135M and {len(task)} prompts of "
        f"{task.clean_tokens.shape[1]} tokens: {speed / 1e9:.0f} GFLOP per second.",
        "",
        "| sweep | cells | passes | planned (s) | measured (s) |",
        "|---|--:|--:|--:|--:|",
        *rows,
        "",
        "Below are plans for 8, 100 and 1,000 prompts of that length, at that speed on two cores, "
        f"and, which was not measured, at {SHARE:.0%} of the {H100 / 1e12:.0f} TFLOP per second of "
        "an H100's data sheet. On eight, the workers of an executor each hold a copy of the model.",
    ]
    for name, sized in {"SmolLM2-135M": model, **CONFIGS}.items():
        one = plan(sized, task, "resid_pre", speed=1.0)
        per_prompt = one.flops / one.passes / len(task)
        each = math.ceil((one.weights + one.memory) / H100_BYTES)  # H100s for a copy
        rates = (
            speed if one.weights < CPU_BYTES else 0,
            H100 * SHARE if each == 1 else 0,
            8 // each * H100 * SHARE,  # layer after layer, one of a copy's at a time
        )
        limit = "arithmetic" if all(rates) else f"memory, as a copy takes {each} H100s"
        lines += [
            "",
            f"**{name}**: {one.weights / 1e9:,.1f} GB of weights. The limit is {limit}.",
            "",
            "| question | passes | 2 cores | one H100 | eight H100s |",
            "|---|--:|--:|--:|--:|",
        ]
        for question, count in passes(sized, task).items():
            flops = [count * per_prompt * n for n in PROMPTS]
            times = [words([f / rate for f in flops]) if rate else "does not fit" for rate in rates]
            lines.append(f"| {question} | {count:,.0f} | {' | '.join(times)} |")
    OUT.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
