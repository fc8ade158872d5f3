"""A file that keeps the finished cells of a sweep, from which an interrupted one resumes."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from patching_demo.engine.cells import Cell

VERSION = "2"


class CellStore:
    """Finished cells of one sweep; without a path it keeps nothing.

    Written to a temporary file and moved into place, so the file on disk is always the last
    complete state.
    """

    def __init__(
        self, path: Path | None, cells: Sequence[Cell], identity: tuple[str, Tensor]
    ) -> None:
        self.path, self.cells = path, cells
        self.fingerprint, self.summary = identity
        self.done = torch.zeros(len(cells), dtype=torch.bool)

    @classmethod
    @contextmanager
    def open(
        cls,
        path: str | os.PathLike[str] | None,
        model: Any,
        tokens: Tensor,
        clean: Mapping[str, Tensor],
        cells: Sequence[Cell],
        probe: Callable[[], Tensor],
    ) -> Iterator[CellStore]:
        """Open or make the store, held against a second process while the sweep runs.

        ``probe`` gives a few values of the metrics, by which a metric is told from another.

        Raises:
            ValueError: if the file is not a store, is damaged, or belongs to other inputs.
            OSError: if it cannot be written.
            RuntimeError: if another process is using it.
        """
        if path is None:
            yield cls(None, cells, ("", torch.zeros(0)))
            return
        path = Path(path)
        _check_writable(path)
        lock = FileLock(f"{path}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            raise RuntimeError(
                f"another process is sweeping into {str(path)!r}: wait for it, or give another file"
            ) from error
        try:
            yield cls(path, cells, _identity(model, tokens, clean, cells, probe()))
        finally:
            lock.release()

    def unfinished(self, values: Tensor) -> list[Cell]:
        """Read finished cells into ``values`` [metric, cell, (batch)]; gives the others."""
        if self.path is not None and self.path.exists():
            kept, done = self._read()
            if kept.shape != values.shape:
                raise ValueError(
                    f"{str(self.path)!r} holds a sweep of another shape: give a new file"
                )
            values[:, done] = kept.to(values)[:, done]
            self.done = done
        return [cell for cell, done in zip(self.cells, self.done.tolist(), strict=True) if not done]

    def _read(self) -> tuple[Tensor, Tensor]:
        try:
            with safe_open(self.path, framework="pt") as file:
                said = file.metadata() or {}
                values, done = file.get_tensor("values"), file.get_tensor("done")
                summary = file.get_tensor("summary") if "summary" in file.keys() else None
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"{str(self.path)!r} is not a complete store of a sweep ({error}): delete it, or "
                "give another file"
            ) from error
        if said.get("version") != VERSION:
            raise ValueError(
                f"{str(self.path)!r} was written by store version {said.get('version')}, this is "
                f"version {VERSION}: delete it, or give another file"
            )
        if said.get("fingerprint") != self.fingerprint or not _alike(summary, self.summary):
            raise ValueError(
                f"{str(self.path)!r} belongs to a sweep of another model, task, metric or kind: "
                "give another file"
            )
        return values, done

    def finish(self, values: Tensor, cells: Sequence[Cell]) -> None:
        """Mark cells as finished and write the file."""
        if self.path is None or not cells:
            return
        self.done[[cell.row for cell in cells]] = True
        part = self.path.with_name(f"{self.path.name}.{os.getpid()}.part")
        try:
            save_file(
                {
                    "values": values.cpu().contiguous(),
                    "done": self.done,
                    "summary": self.summary,
                },
                part,
                metadata={"version": VERSION, "fingerprint": self.fingerprint},
            )
            os.replace(part, self.path)
        except (OSError, SafetensorError) as error:
            raise OSError(
                f"cannot write {str(self.path)!r} ({error}); what it held before is intact"
            ) from error
        finally:
            part.unlink(missing_ok=True)

    def forget(self) -> None:
        """Mark all cells as unfinished."""
        self.done[:] = False

    def most_cells(self, total: int) -> int:
        """The most cells to compute between two writes."""
        return total if self.path is None else max(64, total // 20)


def _check_writable(path: Path) -> None:
    """A sweep of hours should not find out at its first write that there is no place for it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise OSError(f"cannot write {str(path)!r} ({error}): give a file elsewhere") from error


def _identity(
    model: Any, tokens: Tensor, clean: Mapping[str, Tensor], cells: Sequence[Cell], probe: Tensor
) -> tuple[str, Tensor]:
    """What is the same bit for bit in a resumed sweep, hashed; and what is so but for rounding.

    Weights are summarised too, since folding norms into them is arithmetic, the last bits of
    which depend on the machine and its number of threads.
    """
    weights = model.state_dict()
    digest = hashlib.sha256(VERSION.encode())
    digest.update(repr([(name, tuple(value.shape)) for name, value in weights.items()]).encode())
    digest.update(tokens.cpu().numpy().tobytes())
    digest.update(repr([(cell.hook_name, cell.index) for cell in cells]).encode())
    names = sorted({cell.hook_name for cell in cells})
    rows = [*weights.values(), *(clean[name] for name in names), probe]
    return digest.hexdigest(), torch.stack([_summarised(row) for row in rows])


def _summarised(values: Tensor) -> Tensor:
    """Norm and two projections of (a regular sample of) the values: float64 ``[3]``."""
    flat = torch.nan_to_num(values.detach().flatten())
    flat = flat[:: max(1, len(flat) // 65536)].double().cpu()
    place = torch.arange(len(flat), dtype=torch.float64)
    waves = torch.stack([torch.cos(place + 1), torch.cos(place * 2**0.5)])
    return torch.cat([flat.norm()[None], waves @ flat])


def _alike(kept: Tensor | None, summary: Tensor) -> bool:
    """Whether two summaries ``[row, 3]`` differ by no more than rounding."""
    if kept is None or kept.shape != summary.shape:
        return False
    # A projection of other values of the same size would be off by about their norm.
    allowed = 1e-3 * summary[:, :1].clamp(min=1e-12)
    return bool(((kept - summary).abs() <= allowed).all())
