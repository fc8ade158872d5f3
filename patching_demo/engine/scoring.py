"""From finished patched runs to metric values, with no more logits than are read (idea 4)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from patching_demo.engine.bridge import Run, logits_from_resid, some_logits_from_resid
from patching_demo.engine.packs import Pack


def measured(name: str, metric: Callable[..., Any], logits: Tensor, per_example: bool) -> Tensor:
    """A metric on full logits ``[batch, pos, d_vocab]``: a scalar, or ``[batch]``.

    Raises:
        TypeError: if the metric returns something that is not a number.
        ValueError: if its shape is not the one that ``per_example`` asks for.
    """
    value = metric(logits)
    try:
        value = torch.as_tensor(value, device=logits.device).detach()
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"metric {name!r} must return a number or a tensor, got {type(value).__name__}"
        ) from error
    batch = len(logits)
    if per_example and value.shape != (batch,):
        raise ValueError(
            f"metric {name!r} must return a [batch] tensor of length {batch} with reduce="
            f"'mean' or 'none', got shape {tuple(value.shape)}"
        )
    if not per_example and value.ndim:
        raise ValueError(
            f"metric {name!r} must return a scalar with reduce='scalar', got shape "
            f"{tuple(value.shape)}: pass reduce='mean' or 'none' to keep [batch] values"
        )
    if value.is_complex():
        raise TypeError(f"metric {name!r} must return real numbers, got {value.dtype}")
    wide = torch.promote_types(value.dtype, torch.float32)
    return value.to(wide)


class Scorer:
    """Turns finished packs into metric values, computing no more logits than are read (idea 4).

    Args:
        metrics: by name. One with ``positions`` and ``from_read`` (see ``patching_demo.metrics``)
            is given just what it reads; any other callable gets full logits.
        per_example: whether the metrics return ``[batch]`` rather than a scalar.
    """

    def __init__(
        self, model: Any, run: Run, metrics: Mapping[str, Callable[..., Any]], per_example: bool
    ) -> None:
        self.model, self.run, self.per_example = model, run, per_example
        self.metrics = dict(metrics)
        self.baseline = self._on_a_copy(run.logits)
        n_pos = run.tokens.shape[1]
        self.plain = [name for name in self.metrics if not self._declares(name)]
        read = set(range(n_pos)) if self.plain else set()
        for name in self.metrics:
            if name not in self.plain:
                read |= set(self.metrics[name].positions.flatten().tolist())
        self.read = frozenset(read)
        self.last_read = max(self.read)

    def full(self, name: str, logits: Tensor) -> Tensor:
        """One metric on full logits ``[batch, pos, d_vocab]``, see :func:`measured`."""
        return measured(name, self.metrics[name], logits, self.per_example)

    def probe(self) -> Tensor:
        """Metrics on the corrupted logits and on those with the vocabulary turned round.

        Tells one metric from another, also where both are 0 on the corrupted run.
        """
        return torch.stack([self.baseline, self._on_a_copy(self.run.logits.flip(-1))])

    def rounding(self) -> Tensor:
        """How far each metric moves when the corrupted logits change in their last bits.

        Little, as a rule; but a metric that cancels to 0 (the mean of logits that are centred,
        for instance) is made of nothing else.
        """
        logits = self.run.logits
        place = torch.arange(logits.numel(), device=logits.device, dtype=torch.float64)
        bits = 16 * torch.finfo(logits.dtype).eps * torch.cos(place**2).view(logits.shape)
        return (self._on_a_copy(logits * (1 + bits).to(logits.dtype)) - self.baseline).abs()

    def _on_a_copy(self, logits: Tensor) -> Tensor:
        """All metrics: ``[metric, (batch)]``; one that writes into its logits harms nobody."""
        return torch.stack([self.full(name, logits.clone()) for name in self.metrics])

    def _declares(self, name: str) -> bool:
        """Whether what the metric says it reads gives what it computes, on the corrupted run."""
        metric = self.metrics[name]
        if not all(hasattr(metric, part) for part in ("positions", "read", "from_read")):
            return False
        index = list(self.metrics).index(name)
        read = metric.from_read(metric.read(self.run.logits))
        if not isinstance(read, Tensor) or not isinstance(metric.positions, Tensor):
            return False
        read, wanted = self._reduce(read), self.baseline[index]
        same = read.shape == wanted.shape
        return same and torch.allclose(read, wanted.to(read.dtype), rtol=1e-4, atol=1e-6)

    def _reduce(self, values: Tensor) -> Tensor:
        values = values.to(torch.promote_types(values.dtype, torch.float32))
        return values if self.per_example else values.mean(-1)

    def score(self, pack: Pack) -> Tensor:
        """Values ``[metric, cell, (batch)]`` of the runs in a finished pack."""
        full: dict[Any, Tensor] = {}
        rows = []
        plain = self._score_plain(pack) if self.plain else {}
        for name, metric in self.metrics.items():
            if name in plain:
                rows.append(plain[name])
                continue
            device = self.run.tokens.device
            positions, tokens = metric.positions.to(device), metric.tokens
            final = self._final(pack, positions)
            if tokens is not None:
                read = some_logits_from_resid(
                    self.model, final, tokens.to(device), self.run.logit_scale
                )
            else:
                key = positions.numpy(force=True).tobytes()
                if key not in full:
                    flat = logits_from_resid(self.model, final.flatten(0, 1), self.run.logit_scale)
                    full[key] = flat.view(*final.shape[:-1], -1)
                read = full[key]
            rows.append(self._reduce(metric.from_read(read)))
        return torch.stack([row.to(self.baseline.dtype) for row in rows])

    def _final(self, pack: Pack, positions: Tensor) -> Tensor:
        """Final residual streams ``[cell, batch, n_positions, d_model]`` at some positions."""
        batch = torch.arange(len(positions), device=positions.device)
        slot = pack.slot_of[:, positions]  # [cell, batch, n_positions]
        slots = pack.layout.positions.shape[1]
        where = slot.clamp(min=0)
        recomputed = pack.states[where // slots, batch[None, :, None], where % slots]
        corrupted = self.run.resid[-1][batch[:, None], positions]
        return torch.where((slot >= 0)[..., None], recomputed, corrupted)

    def _score_plain(self, pack: Pack) -> dict[str, Tensor]:
        """Metrics of full logits: the corrupted run's, with the recomputed positions replaced."""
        logits = self.run.logits.clone()
        values: dict[str, list[Tensor]] = {name: [] for name in self.plain}
        groups, batch, slots, d_model = pack.states.shape
        computed = logits_from_resid(
            self.model, pack.states.reshape(-1, slots, d_model), self.run.logit_scale
        )
        computed = computed.view(groups, batch, slots, -1)
        for index in range(len(pack.cells)):
            # A run's positions follow each other, and so do their slots: slices copy fastest.
            flat = pack.slot_of[index, pack.slot_of[index] >= 0]
            group, slot = divmod(int(flat[0]), slots)
            start = pack.cells[index].start
            positions = slice(start, start + len(flat))
            logits[:, positions] = computed[group, :, slot : slot + len(flat)]
            version = logits._version
            for name in self.plain:
                values[name].append(self.full(name, logits).clone())
            if logits._version != version:  # The metric wrote into its argument.
                logits = self.run.logits.clone()
            else:
                logits[:, positions] = self.run.logits[:, positions]
        return {name: torch.stack(rows) for name, rows in values.items()}


def tolerance(dtype: torch.dtype) -> float:
    """The relative error that rounding may cause over a forward pass in ``dtype``."""
    return {torch.float64: 1e-6, torch.float32: 1e-4}.get(dtype, 1e-1)
