"""From finished patched runs to metric values, with no more logits than are read (idea 4)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from patching_demo.engine.bridge import (
    Run,
    Unsupported,
    logits_from_resid,
    some_logits_from_resid,
)
from patching_demo.engine.packs import Pack, unforeseen


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

    A metric is called once for each patched run that it can tell from the corrupted one, a few
    times for the baseline and for what the sweep checks, and each time with logits of its own.

    Args:
        metrics: by name. One with ``positions`` and ``from_read`` (see ``patching_demo.metrics``)
            is given just what it reads; any other callable gets full logits.
        per_example: whether the metrics return ``[batch]`` rather than a scalar.

    Attributes:
        baseline: the metrics of the corrupted run, ``[metric, (batch)]``.
        read: the positions at which any metric reads.
        noise: how far rounding moves each metric, as measured on unpatched runs.
        logits_held: how many logits may be computed at once, one patched run's at least.
    """

    def __init__(
        self, model: Any, run: Run, metrics: Mapping[str, Callable[..., Any]], per_example: bool
    ) -> None:
        self.model, self.run, self.per_example = model, run, per_example
        self.metrics = dict(metrics)
        self.baseline = self.all(run.logits.clone())
        n_pos = run.tokens.shape[1]
        self.plain = [name for name in self.metrics if not self._declares(name)]
        read = set(range(n_pos)) if self.plain else set()
        for name in self.metrics:
            if name not in self.plain:
                read |= set(self.metrics[name].positions.flatten().tolist())
        self.read = frozenset(read)
        self.last_read = max(self.read)
        self.logits_held = run.logits.numel()
        self.noise = torch.zeros_like(self.baseline)
        self.by_token: set[str] = set()

    def full(self, name: str, logits: Tensor) -> Tensor:
        """One metric on full logits ``[batch, pos, d_vocab]``, see :func:`measured`."""
        return measured(name, self.metrics[name], logits, self.per_example)

    def all(self, logits: Tensor) -> Tensor:
        """All metrics, each on logits of its own, on logits that nothing else needs.

        Returns:
            ``[metric, (batch)]``
        """
        *others, last = self.metrics
        each = [self.full(name, logits.clone()) for name in others]
        return torch.stack([*each, self.full(last, logits)])

    def probe(self) -> Tensor:
        """Metrics on the corrupted logits and on those with the vocabulary reversed.

        Tells one metric from another, also where both are 0 on the corrupted run.
        """
        return torch.stack([self.baseline, self.all(self.run.logits.flip(-1))])

    def rounding(self) -> Tensor:
        """How far each metric moves when the corrupted logits change in their last bits.

        Little, as a rule; but a metric that cancels to 0 (the mean of logits that are centred,
        for instance) is made of nothing else.
        """
        logits = self.run.logits
        eps = torch.finfo(logits.dtype).eps * (16 if logits.element_size() > 2 else 2)
        _, n_pos, d_vocab = logits.shape
        place = torch.arange(max(n_pos, d_vocab), device=logits.device, dtype=torch.float32)
        signs = torch.cos(place[:n_pos, None] ** 2) * torch.cos(1 + place[:d_vocab] % 1009 * 37)
        return (self.all(logits * (1 + eps * signs).to(logits.dtype)) - self.baseline).abs()

    def check_logits(self) -> None:
        """Hold the step from stream to logits to the run's own logits, where they are read.

        Where single vocabulary entries come out otherwise (an adapter on the unembedding), all
        are computed.

        Raises:
            Unsupported: if the logits themselves do.
        """
        logits, resid = self.run.logits, self.run.resid[-1]
        kept = slice(None) if not self.plain else slice(1)
        # One position more in front, and a stranger behind, so that none stands where the prompt
        # has it, or beside what it has there.
        read = torch.tensor([self.last_read, *sorted(self.read)], device=resid.device)
        states = shaken(resid[kept][:, read], 100)
        states = torch.cat([states, stranger(states[:, :1])], dim=1)
        with unforeseen("computing logits from the last residual stream"):
            own = logits_from_resid(self.model, states, self.run.logit_scale)
            if not _agree(own[:, :-1], logits[kept][:, read], 1000):
                raise Unsupported("its logits are not the unembedding of its last residual stream")
        batch = torch.arange(len(resid), device=resid.device)[:, None]
        for name, metric in self.metrics.items():
            if name in self.plain or (tokens := getattr(metric, "tokens", None)) is None:
                continue
            try:
                tokens, positions = tokens.to(resid.device), metric.positions.to(resid.device)
                final = resid[batch, positions].expand(2, -1, -1, -1)
                some = some_logits_from_resid(self.model, final, tokens, self.run.logit_scale)
                wanted = logits[batch[..., None], positions[..., None], tokens[:, None]]
                if _agree(some, wanted, 100):
                    self.by_token.add(name)
            except (AttributeError, TypeError, ValueError, RuntimeError, IndexError):
                continue

    def _declares(self, name: str) -> bool:
        """Whether what the metric says it reads gives what it computes, on the corrupted run."""
        metric = self.metrics[name]
        if not all(hasattr(metric, part) for part in ("positions", "read", "from_read")):
            return False
        index = list(self.metrics).index(name)
        read = metric.from_read(metric.read(self.run.logits.clone()))
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
        rows = self._score_plain(pack) if self.plain else {}
        together: dict[bytes, list[str]] = {}
        for name, metric in self.metrics.items():
            if name not in rows:
                key = metric.positions.numpy(force=True).tobytes()
                together.setdefault(key, []).append(name)
        for names in together.values():
            rows |= self._score_read(pack, names)
        return torch.stack([rows[name].to(self.baseline.dtype) for name in self.metrics])

    def _score_read(self, pack: Pack, names: Sequence[str]) -> dict[str, Tensor]:
        """Metrics that read the same positions: ``[cell, (batch)]`` each, a few runs at a time."""
        positions = self.metrics[names[0]].positions.to(self.run.tokens.device)
        n_logits = positions.numel() * self.run.logits.shape[-1]
        whole = [name for name in names if name not in self.by_token]
        size = max(1, self.logits_held // n_logits) if whole else len(pack.cells)
        rows: dict[str, list[Tensor]] = {name: [] for name in names}
        for cells in torch.arange(len(pack.cells), device=positions.device).split(size):
            final = self._final(pack, cells, positions)
            logits = self._logits(final) if len(whole) > 1 else None
            for name in names:
                rows[name].append(self.of_streams(name, final, logits))
        return {name: torch.cat(parts) for name, parts in rows.items()}

    def _logits(self, final: Tensor) -> Tensor:
        """All logits ``[n, batch, n_positions, d_vocab]`` of final residual streams."""
        with unforeseen("computing logits from the last residual stream"):
            logits = logits_from_resid(self.model, final.flatten(0, 1), self.run.logit_scale)
            return logits.view(*final.shape[:-1], -1)

    def of_streams(self, name: str, final: Tensor, logits: Tensor | None = None) -> Tensor:
        """A metric ``[n, (batch)]`` of final residual streams where it reads.

        ``final`` is ``[n, batch, n_positions, d_model]``, and ``logits`` are those of it where
        they are known; the metric is one that says what it reads, and :meth:`check_logits` has
        been called.
        """
        metric = self.metrics[name]
        tokens = getattr(metric, "tokens", None)
        tokens = tokens if tokens is None else tokens.to(final.device)
        if name in self.by_token:
            with unforeseen("computing logits from the last residual stream"):
                read = some_logits_from_resid(self.model, final, tokens, self.run.logit_scale)
        else:
            # A copy, as a metric may keep or change what it is given.
            read = self._logits(final) if logits is None else logits.clone()
        if tokens is not None and name not in self.by_token:
            read = read.gather(-1, tokens[:, None].expand(*read.shape[:-1], -1))
        return self._reduce(metric.from_read(read))

    def _final(self, pack: Pack, cells: Tensor, positions: Tensor) -> Tensor:
        """Final residual streams ``[cell, batch, n_positions, d_model]`` at some positions."""
        batch = torch.arange(len(positions), device=positions.device)
        slot = pack.slot_of[cells][:, positions]  # [cell, batch, n_positions]
        slots = pack.layout.positions.shape[1]
        where = slot.clamp(min=0)
        recomputed = pack.states[where // slots, batch[None, :, None], where % slots]
        corrupted = self.run.resid[-1][batch[:, None], positions]
        return torch.where((slot >= 0)[..., None], recomputed, corrupted)

    def _score_plain(self, pack: Pack) -> dict[str, Tensor]:
        """Metrics of full logits: the corrupted run's, with the recomputed positions replaced."""
        corrupted = self.run.logits
        values: dict[str, list[Tensor]] = {name: [] for name in self.plain}
        most = max(1, self.logits_held // (len(corrupted) * corrupted.shape[-1]))
        lengths = (pack.slot_of >= 0).sum(dim=1).tolist()
        for chunk in _chunked(lengths, most):
            slots = pack.slot_of[chunk]
            states = pack.at(slots[slots >= 0]).transpose(0, 1)
            with unforeseen("computing logits from the last residual stream"):
                # [batch, token, d_vocab]
                computed = logits_from_resid(self.model, states, self.run.logit_scale)
            taken = 0
            for index in chunk:
                start, length = int((pack.slot_of[index] >= 0).int().argmax()), lengths[index]
                parts = (
                    corrupted[:, :start],
                    computed[:, taken : taken + length],
                    corrupted[:, start + length :],
                )
                for name in self.plain:
                    values[name].append(self.full(name, torch.cat(parts, dim=1)).clone())
                taken += length
        return {name: torch.stack(rows) for name, rows in values.items()}


def _chunked(lengths: Sequence[int], most: int) -> Iterator[list[int]]:
    """Indices of runs, in lists that have ``most`` tokens or are of one run."""
    chunk: list[int] = []
    for index, length in enumerate(lengths):
        if chunk and sum(lengths[i] for i in chunk) + length > most:
            yield chunk
            chunk = []
        chunk.append(index)
    yield chunk


def shaken(states: Tensor, roundings: int) -> Tensor:
    """Residual streams off by some roundings, but in types of few bits, where one is a lot.

    What rounds its input to few bits makes much of them.
    """
    share = roundings * torch.finfo(states.dtype).eps if states.element_size() > 2 else 0
    signs = torch.cos(torch.arange(states.numel(), device=states.device, dtype=torch.float32))
    return states * (1 + share * signs.to(states.dtype)).view_as(states)


def stranger(states: Tensor) -> Tensor:
    """Residual streams of the same shape like no other: a norm makes no number larger than this."""
    return torch.zeros_like(states).index_fill(-1, torch.tensor(0, device=states.device), 100.0)


def _agree(found: Tensor, wanted: Tensor, roundings: int) -> bool:
    """Whether logits differ by no more than so many roundings, in types of few bits by two."""
    eps, size = torch.finfo(wanted.dtype).eps, wanted.abs()
    if wanted.element_size() > 2:
        allowed = roundings * eps * size.amax()
    else:
        allowed = 2 * eps * (size + 0.05 * size.float().square().mean().sqrt())
    return bool(((found - wanted).abs() <= allowed).all())


def tolerance(dtype: torch.dtype) -> float:
    """The relative error that rounding may cause in one number, over a block or a pass."""
    if torch.finfo(dtype).bits < 32:
        return 8 * torch.finfo(dtype).eps
    return 1e-6 if dtype == torch.float64 else 1e-4
