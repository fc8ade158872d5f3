"""A file that keeps the finished cells of a sweep, from which an interrupted one resumes."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from patching_demo.engine import Cell

VERSION = "1"


class CellStore:
    """Finished cells of one sweep; without a path it keeps nothing.

    Written to a temporary file and moved into place, so the file on disk is always the last
    complete state.
    """

    def __init__(self, path: Path | None, fingerprint: str, cells: Sequence[Cell]) -> None:
        self.path, self.fingerprint, self.cells = path, fingerprint, cells
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
        baseline: Tensor,
    ) -> Iterator[CellStore]:
        """Open or make the store, held against a second process while the sweep runs.

        Raises:
            ValueError: if the file is not a store, is damaged, or belongs to other inputs.
            RuntimeError: if another process is using it.
        """
        if path is None:
            yield cls(None, "", cells)
            return
        path = Path(path)
        lock = FileLock(f"{path}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            raise RuntimeError(
                f"another process is sweeping into {str(path)!r}: wait for it, or give another file"
            ) from error
        try:
            yield cls(path, _fingerprint(model, tokens, clean, cells, baseline), cells)
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
        if said.get("fingerprint") != self.fingerprint:
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
                {"values": values.cpu().contiguous(), "done": self.done},
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

    def most_cells(self, total: int) -> int:
        """The most cells to compute between two writes."""
        return total if self.path is None else max(64, total // 20)


def _fingerprint(
    model: Any,
    tokens: Tensor,
    clean: Mapping[str, Tensor],
    cells: Sequence[Cell],
    baseline: Tensor,
) -> str:
    """Identifies model, prompts, clean run, cells and metric."""
    digest = hashlib.sha256(VERSION.encode())
    for name, parameter in model.state_dict().items():
        digest.update(name.encode())
        digest.update(_bytes(parameter))
    digest.update(_bytes(tokens))
    for cell in cells:
        digest.update(f"{cell.hook_name}{cell.index}".encode())
    # The clean run and the metric come from arithmetic whose last bits depend on the machine.
    for name in sorted({cell.hook_name for cell in cells}):
        digest.update(f"{clean[name].float().norm().item():.3g}".encode())
    digest.update(" ".join(f"{value:.3g}" for value in baseline.flatten().tolist()).encode())
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
