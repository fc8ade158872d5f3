"""Train attn-only-2l-demo, measure it, and write its weights, record and card into the package.

Run from the checkout: ``python scripts/train_demo_model.py``. It takes a few minutes on one CPU
core. The same versions on the same kind of machine give the same weights; the card's numbers are
always those of the weights beside it, because this script writes both.

The recipe is made for teaching. Trained on repeats with all heads at once, every head of layer 1
becomes an induction head, and no single one matters. So training has two stages: at first only the
heads of ``FIRST_HEADS`` are switched on and learn the circuit; then all are, with other kinds of
text in the mix, and the rest of the heads find the induction circuit's work already done.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor
from transformer_lens import patching
from transformer_lens.config import TransformerBridgeConfig
from transformer_lens.model_bridge.sources.native import NativeModel, initialize_native_model

from patching_demo.models import DATA, DEMO_BOS, load_model
from patching_demo.models.cache import sha256_of
from patching_demo.tasks import CORRUPTIONS, induction_task

NAME = "attn-only-2l-demo"
SEED = 0

CONFIG = {
    "n_layers": 2,
    "n_heads": 8,
    "d_model": 128,
    "d_head": 32,
    "n_ctx": 256,
    "d_vocab": 512,
    "attn_only": True,
    "act_fn": "gelu",  # required, unused: there is no MLP
    "normalization_type": "LN",
}
#: Heads switched on in stage one, by layer.
FIRST_HEADS = {0: [3], 1: [1, 6]}
STAGES = (
    # All repeats, the circuit's heads alone.
    {"steps": 450, "lr": 3e-3, "final_lr": 3e-3, "repeats": 64, "bigrams": 0, "bags": 0},
    # Half other streams, all heads.
    {"steps": 350, "lr": 1e-3, "final_lr": 5e-5, "repeats": 32, "bigrams": 16, "bags": 16},
)
LENGTH = 50  # tokens after the first one
LAGS = (4, 24)  # a repeated segment's length; it must vary, or a fixed offset is all that is learnt
BAG = 8  # distinct tokens in a bag-of-words stream
SUCCESSORS = (0.5, 0.25, 0.15, 0.1)  # chances of a token's four successors in a bigram stream
SHIFTED = 0.2  # share of sequences that begin elsewhere than at position 0, to train all positions
WARM_UP = 50
WEIGHT_DECAY = 0.01
KINDS = ("out", "q", "k", "v", "pattern")


class Streams:
    """The three kinds of training text, drawn from one seeded generator."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.successors = self.tokens(CONFIG["d_vocab"], len(SUCCESSORS))

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        """Return integers from low to high - 1."""
        return torch.randint(low, high, shape, generator=self.generator)

    def tokens(self, *shape: int) -> Tensor:
        """Return random tokens other than the one that begins every sequence."""
        return self.integers(DEMO_BOS + 1, CONFIG["d_vocab"], *shape)

    def repeats(self, n: int) -> tuple[Tensor, Tensor]:
        """Return random segments over and over, and where the next token can be known."""
        lag = self.integers(LAGS[0], LAGS[1] + 1, n, 1)
        place = torch.arange(LENGTH).expand(n, -1)
        return self.tokens(n, LAGS[1]).gather(1, place % lag), place > lag

    def bigrams(self, n: int) -> Tensor:
        """Return walks on a fixed table of likely successors."""
        weights = torch.tensor(SUCCESSORS).expand(n, -1)
        walk = [self.tokens(n)]
        for _ in range(LENGTH - 1):
            choice = torch.multinomial(weights, 1, generator=self.generator)[:, 0]
            walk.append(self.successors[walk[-1], choice])
        return torch.stack(walk, dim=1)

    def bags(self, n: int) -> Tensor:
        """Return tokens drawn again and again from a few, different in each stream."""
        return self.tokens(n, BAG).gather(1, self.integers(0, BAG, n, LENGTH))

    def batch(self, stage: dict) -> tuple[Tensor, Tensor, Tensor]:
        """Return tokens and positions [batch, LENGTH + 1], and where a repeat can be predicted."""
        repeats, known = self.repeats(stage["repeats"])
        rows = torch.cat([repeats, self.bigrams(stage["bigrams"]), self.bags(stage["bags"])])
        tokens = F.pad(rows, (1, 0), value=DEMO_BOS)
        n = len(tokens)
        shifted = torch.rand(n, generator=self.generator) < SHIFTED
        start = self.integers(0, CONFIG["n_ctx"] - LENGTH, n) * shifted
        positions = start[:, None] + torch.arange(LENGTH + 1)
        return tokens, positions, F.pad(known, (0, 0, 0, n - len(known)))


def new_model() -> NativeModel:
    """Return the untrained model, with sinusoids for positions.

    From sinusoids "the position before" is one linear map for all positions; from random vectors
    it has to be learnt for each of them.
    """
    cfg = TransformerBridgeConfig(**CONFIG, seed=SEED, architecture="TransformerLensNative")
    model = NativeModel(cfg)
    initialize_native_model(model, cfg)
    half = cfg.d_model // 2
    frequency = torch.exp(-math.log(1000.0) * torch.arange(half) / half)
    angle = torch.arange(cfg.n_ctx)[:, None] * frequency
    with torch.no_grad():
        model.pos.weight.copy_(0.1 * torch.cat([angle.sin(), angle.cos()], dim=1))
    return model


@contextlib.contextmanager
def only_heads(model: NativeModel, heads: dict[int, list[int]]):
    """Switch off all other heads' outputs, as long as the block lasts."""
    handles = []
    for layer, kept in heads.items():
        mask = torch.zeros(CONFIG["n_heads"], CONFIG["d_head"])
        mask[kept] = 1

        def switch(_, args, mask):
            return (args[0] * mask,)

        hook = partial(switch, mask=mask.flatten())
        handles.append(model.layers[layer].attn.o.register_forward_pre_hook(hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def train(scale: float = 1.0) -> tuple[NativeModel, dict]:
    """Return the trained model and its last losses in nats; `scale` shortens it, for a trial."""
    torch.set_num_threads(1)  # sums in the same order everywhere
    model, streams = new_model(), Streams(SEED)
    groups = [
        {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0.0},
    ]
    optimiser = torch.optim.AdamW(groups, betas=(0.9, 0.98))
    losses: dict[str, list[float]] = {"all": [], "repeated": []}
    for number, stage in enumerate(STAGES):
        steps = max(1, round(stage["steps"] * scale))
        heads = only_heads(model, FIRST_HEADS) if number == 0 else contextlib.nullcontext()
        with heads:
            for step in range(steps):
                rate = stage["lr"] + (stage["final_lr"] - stage["lr"]) * step / steps
                if number == 0:
                    rate *= min(1.0, (step + 1) / WARM_UP)
                for group in optimiser.param_groups:
                    group["lr"] = rate
                tokens, positions, known = streams.batch(stage)
                logits = model(input_ids=tokens[:, :-1], position_ids=positions[:, :-1])
                loss = F.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none")
                optimiser.zero_grad()
                loss.mean().backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimiser.step()
                losses["all"].append(loss.mean().item())
                losses["repeated"].append(loss[known].mean().item())
                if step % 50 == 49:
                    print(
                        f"stage {number + 1}, step {step + 1}: loss {losses['all'][-1]:.3f}, "
                        f"repeated part {losses['repeated'][-1]:.3f}",
                        flush=True,
                    )
    return model.eval(), {
        kind: round(sum(values[-20:]) / len(values[-20:]), 4) for kind, values in losses.items()
    }


def bridge_state(model: NativeModel) -> dict[str, Tensor]:
    """Return the weights under the names that `TransformerBridge.load_state_dict` knows."""
    names = {
        "tok_embed": "embed",
        "pos": "pos_embed",
        "layers": "blocks",
        "ln_out": "ln_final",
        "head": "unembed",
    }
    state = {}
    for key, value in model.state_dict().items():
        first, _, rest = key.partition(".")
        state[f"{names[first]}.{rest}"] = value.contiguous()
    state["unembed.bias"] = torch.zeros(CONFIG["d_vocab"])
    return state


# What it learnt ---------------------------------------------------------------------------------


def attention_scores(model) -> dict[str, list[list[float]]]:
    """Return mean attention [layer][head] on the clean induction prompts, in two places.

    `previous`: from each token to the one before it. `induction`: from each token of the second
    copy to the token that followed it in the first.
    """
    task = induction_task(model)
    with torch.no_grad():
        _, cache = model.run_with_cache(task.clean_tokens)
    length = task.clean_tokens.shape[1]
    copy = (length - 1) // 2
    every = torch.arange(1, length)
    second = torch.arange(copy + 1, length)
    places = {"previous": (every, every - 1), "induction": (second, second - copy + 1)}
    return {
        name: [
            cache["pattern", layer][:, :, query, key].mean((0, 2)).tolist()
            for layer in range(model.cfg.n_layers)
        ]
        for name, (query, key) in places.items()
    }


def patch_shares(model, corruptions=CORRUPTIONS, kinds=KINDS) -> dict[str, dict]:
    """Return, by corruption and kind of patch, the share of clean minus corrupted per head."""
    shares = {}
    for corrupted in corruptions:
        task = induction_task(model, corrupted)
        with torch.no_grad(), contextlib.redirect_stderr(io.StringIO()):
            _, cache = model.run_with_cache(task.clean_tokens)
            shares[corrupted] = {
                kind: (
                    (
                        getattr(patching, f"get_act_patch_attn_head_{kind}_all_pos")(
                            model, task.corrupted_tokens, cache, task.metric
                        )
                        - task.corrupted_baseline
                    )
                    / (task.clean_baseline - task.corrupted_baseline)
                ).tolist()
                for kind in kinds
            }
        shares[corrupted]["baseline"] = task.corrupted_baseline
        shares[corrupted]["clean"] = task.clean_baseline
    return shares


def labels(scores: list[list[float]], layer: int, threshold: float = 0.5) -> list[str]:
    """Return the heads of a layer whose score passes the threshold, as in `L1H6`."""
    return [f"L{layer}H{head}" for head, s in enumerate(scores[layer]) if s > threshold]


def rounded(value):
    """Return nested lists and dicts with every float rounded to four places."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return round(value, 4)


def measure(model) -> dict:
    """Return the evidence that goes into the record and the card."""
    attention = attention_scores(model)
    return {
        "previous_token_heads": labels(attention["previous"], 0),
        "induction_heads": labels(attention["induction"], 1),
        "attention": rounded(attention),
        "patching": rounded(patch_shares(model)),
    }


# The card ---------------------------------------------------------------------------------------


def card(record: dict) -> str:
    """Return the model card; every number in it comes from the record."""
    config, recipe, evidence = record["config"], record["recipe"], record["evidence"]

    def table(head: list[str], rows: list[list[str]]) -> list[str]:
        lines = [head, ["---"] * len(head), *rows]
        return [f"| {' | '.join(line)} |" for line in lines]

    def largest(cells: list[list[float]]) -> str:
        """The cells that count, by size, in words."""
        named = {
            f"L{layer}H{head}": value
            for layer, row in enumerate(cells)
            for head, value in enumerate(row)
        }
        top = sorted(named, key=lambda name: -abs(named[name]))[:3]
        kept = [name for name in top if abs(named[name]) >= 0.05] or top[:1]
        # Adding zero turns "-0.00" into "0.00".
        return ", ".join(f"{name} {round(named[name], 2) + 0.0:.2f}" for name in kept)

    first, second = recipe["stages"]
    streams = ("repeats", "bigrams", "bags")
    attention = evidence["attention"]
    clean = evidence["patching"]["AB"]["clean"]
    parts = [
        f"# {NAME}",
        "",
        "A two-layer attention-only transformer that does induction, small enough to be shipped: "
        f"{record['parameters']:,} parameters, {record['bytes']:,} bytes of safetensors, sha256",
        f"`{record['sha256']}`.",
        "",
        "It was trained for this project, for one purpose: to show what activation patching finds "
        "in a model where the answer is known. It has no tokenizer and knows no language. "
        "TransformerLens has an old alias of the same name for another model; this one loads with "
        f'`patching_demo.load_model("{NAME}")`.',
        "",
        "Written by `scripts/train_demo_model.py`, numbers included.",
        "",
        "## Architecture",
        "",
        *table(["", ""], [[f"`{key}`", f"{value}"] for key, value in config.items()]),
        "",
        f"Token {record['bos']} begins every sequence and occurs nowhere else.",
        "",
        "## Recipe",
        "",
        f"A sequence is the beginning token and {recipe['length']} tokens of one of three kinds:",
        "",
        f"- repeats: a segment of {recipe['lags'][0]} to {recipe['lags'][1]} random tokens, over "
        "and over. The length varies, so that an offset learnt by heart doesn't do;",
        "- bigrams: a walk on a fixed random table with "
        f"{len(recipe['successors'])} likely successors per token;",
        f"- bags: draws from {recipe['bag']} random tokens of the sequence's own.",
        "",
        *table(
            ["", "steps", *streams, "learning rate", "heads switched on"],
            [
                [
                    f"stage {number}",
                    str(stage["steps"]),
                    *(str(stage[kind]) for kind in streams),
                    f"{stage['lr']:g} to {stage['final_lr']:g}",
                    heads,
                ]
                for number, stage, heads in (
                    (1, first, ", ".join(recipe["first_heads"])),
                    (2, second, "all"),
                )
            ],
        ),
        "",
        "(repeats, bigrams and bags: sequences of that kind in each batch.) AdamW, weight decay "
        f"{recipe['weight_decay']}, gradients clipped at norm 1, positions started as sinusoids, "
        f"seed {recipe['seed']}, torch {recipe['torch']}.",
        "",
        "Stage one leaves the circuit to a few heads. With all heads on from the start, all of "
        "layer 1 shares the work, and patching finds no head that matters.",
        "",
        "## Final loss",
        "",
        f"{record['loss']['all']:.3f} nats per token over the mix, and "
        f"{record['loss']['repeated']:.3f} nats on the part of the repeats that can be predicted "
        "(mean of the last twenty steps).",
        "",
        "## Evidence",
        "",
        f"Previous-token heads: {', '.join(evidence['previous_token_heads'])}. Induction heads: "
        f"{', '.join(evidence['induction_heads'])}.",
        "",
        "Attention on the clean prompts of `induction_task`: to the token before (layer 0), and "
        "from the second copy to the token after the same token in the first (layer 1).",
        "",
        *table(
            ["", *(f"H{head}" for head in range(config["n_heads"]))],
            [
                ["layer 0, previous token", *(f"{s:.2f}" for s in attention["previous"][0])],
                ["layer 1, induction", *(f"{s:.2f}" for s in attention["induction"][1])],
            ],
        ),
        "",
        "Patching one head at all positions: the share of clean minus corrupted that it recovers, "
        f"largest heads first. The clean mean log-probability is {clean:.2f} nats.",
        "",
        *table(
            ["corrupted", "baseline", *KINDS],
            [
                [name, f"{cells['baseline']:.2f}", *(largest(cells[kind]) for kind in KINDS)]
                for name, cells in evidence["patching"].items()
            ],
        ),
        "",
        "A negative share means that the patch made things worse than the corrupted run: a head "
        "whose clean pattern points into a corrupted first copy copies the wrong tokens with "
        "confidence.",
        "",
    ]
    return "\n".join(parts)


def main() -> None:
    """Train, save, load the saved weights as a reader would, measure, and write the card."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--card-only", action="store_true", help="measure the weights that exist")
    options = parser.parse_args()
    record_file, weights = DATA / f"{NAME}.json", DATA / f"{NAME}.safetensors"
    if options.card_only:
        record = json.loads(record_file.read_text(encoding="utf-8"))
    else:
        model, loss = train()
        state = bridge_state(model)
        save_file(state, weights)
        weights.chmod(0o644)
        record = {
            "config": CONFIG,
            "bos": DEMO_BOS,
            "sha256": sha256_of(weights),
            "bytes": weights.stat().st_size,
            "parameters": sum(value.numel() for value in state.values()),
            "recipe": {
                "stages": STAGES,
                "first_heads": [f"L{la}H{h}" for la, hs in FIRST_HEADS.items() for h in hs],
                "length": LENGTH,
                "lags": LAGS,
                "bag": BAG,
                "successors": SUCCESSORS,
                "shifted": SHIFTED,
                "warm_up": WARM_UP,
                "weight_decay": WEIGHT_DECAY,
                "seed": SEED,
                "torch": torch.__version__.partition("+")[0],
            },
            "loss": loss,
        }
        # load_model reads the record, so it has to be there before the evidence is.
        record_file.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    record["evidence"] = measure(load_model(NAME, device="cpu"))
    record_file.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    (Path(DATA) / "README.md").write_text(card(record), encoding="utf-8")
    print(f"Wrote {weights.name}, {record_file.name} and README.md into {DATA}")


if __name__ == "__main__":
    main()
