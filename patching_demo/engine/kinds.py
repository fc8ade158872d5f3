"""The one table of activations: what each is called, where its hook is, and how a patch acts.

Everything else reads this table, so adding a kind of activation is adding a row.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = [
    "BLOCK_KINDS",
    "HEAD_KINDS",
    "KINDS",
    "Kind",
    "kind_label",
    "kind_of_activation",
    "kind_of_hook",
]


@dataclass(frozen=True)
class Kind:
    """An activation that can be patched.

    Attributes:
        name: what a sweep and its labelled result call it.
        activation: its name to ``transformer_lens.utilities.get_act_name``.
        hook: the hook's name within its block.
        axes: the axes of the activation; a "head" axis has as many heads as queries, a
            "kv_head" axis as many as keys and values.
        label: its name over a panel and in tables.
        plural: its name in a sentence ("clean queries patched into ...").
        describes: its name in menus.
        at_input: whether it is a function of the block's input at the same position alone.
        spreads: whether a patch at one position reaches later positions within its own block
            (keys and values do, a query or an output does not).
        enters: "hook" if the block must run to patch it, "input" if it is the residual stream a
            block starts from, "output" if it is the one a block ends with.
    """

    name: str
    activation: str
    hook: str
    axes: tuple[str, ...]
    label: str
    plural: str
    describes: str
    at_input: bool = False
    spreads: bool = False
    enters: str = "hook"

    @property
    def of_heads(self) -> bool:
        """Whether it has one value per head."""
        return "head" in self.axes or "kv_head" in self.axes

    @property
    def position_axis(self) -> int:
        """Which axis holds the patched position (the destination of a pattern)."""
        return self.axes.index("pos")

    @property
    def head_axis(self) -> int:
        """Which axis holds the patched head."""
        return self.axes.index("kv_head" if "kv_head" in self.axes else "head")


_STREAM = ("batch", "pos", "d_model")
_HEADS = ("batch", "pos", "head", "d_head")
_KV_HEADS = ("batch", "pos", "kv_head", "d_head")
_PATTERN = ("batch", "head", "pos", "source")

#: Every kind, by its name in a sweep.
KINDS: dict[str, Kind] = {
    kind.name: kind
    for kind in (
        Kind(
            "resid_pre", "resid_pre", "hook_resid_pre", _STREAM,
            "resid_pre", "resid_pre", "residual stream before each block",
            at_input=True, spreads=True, enters="input",
        ),
        Kind(
            "attn_out", "attn_out", "hook_attn_out", _STREAM,
            "attn_out", "attn_out", "output of each attention layer",
        ),
        Kind(
            "resid_mid", "resid_mid", "hook_resid_mid", _STREAM,
            "resid_mid", "resid_mid", "residual stream between attention and MLP",
        ),
        Kind(
            "mlp_out", "mlp_out", "hook_mlp_out", _STREAM,
            "mlp_out", "mlp_out", "output of each MLP",
        ),
        Kind(
            "resid_post", "resid_post", "hook_resid_post", _STREAM,
            "resid_post", "resid_post", "residual stream after each block",
            enters="output",
        ),
        Kind("out", "z", "attn.hook_z", _HEADS, "output", "head outputs", "head outputs"),
        Kind("q", "q", "attn.hook_q", _HEADS, "query", "queries", "head queries", at_input=True),
        Kind(
            "k", "k", "attn.hook_k", _KV_HEADS, "key", "keys", "head keys",
            at_input=True, spreads=True,
        ),
        Kind(
            "v", "v", "attn.hook_v", _KV_HEADS, "value", "values", "head values",
            at_input=True, spreads=True,
        ),
        Kind(
            "pattern", "pattern", "attn.hook_pattern", _PATTERN,
            "pattern", "patterns", "head attention patterns",
        ),
    )
}  # fmt: skip

#: Kinds with one value for each layer and position.
BLOCK_KINDS = tuple(name for name, kind in KINDS.items() if not kind.of_heads)
#: Kinds with one value for each head.
HEAD_KINDS = tuple(name for name, kind in KINDS.items() if kind.of_heads)


def kind_of_activation(activation: str) -> Kind | None:
    """The kind whose activation TransformerLens calls so, None if it is not in the table.

    >>> kind_of_activation("z").name
    'out'
    """
    return next((kind for kind in KINDS.values() if kind.activation == activation), None)


def kind_of_hook(name: str) -> Kind | None:
    """The kind whose hook that is, None if it is not in the table.

    >>> kind_of_hook("blocks.3.attn.hook_z").name
    'out'
    """
    return next((kind for kind in KINDS.values() if kind.hook == name.split(".", 2)[-1]), None)


def kind_label(name: object) -> str:
    """What a kind is called in a figure; the name itself if it is not in the table.

    >>> kind_label("out")
    'output'
    """
    return KINDS[str(name)].label if str(name) in KINDS else str(name)
