"""A file that keeps the finished cells of a sweep, from which an interrupted one resumes."""

from __future__ import annotations

import hashlib
import os
import sqlite3
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from patching_demo.engine.cells import Cell

VERSION = 5
_APPLICATION = 0x70617463  # Tells a store from any other SQLite file.


class CellStore:
    """Finished cells of one sweep, in a SQLite file; without a file it keeps nothing.

    Each portion is one transaction: it is added whole or not at all, and nothing that was there
    before is written again.
    """

    def __init__(self, path: Path | None, file: sqlite3.Connection, cells: Sequence[Cell]) -> None:
        self.path, self.file, self.cells = path, file, cells

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
        """Open or make the store, held against any other sweep while this one runs.

        ``probe`` returns values ``[n, metric, (batch)]``, by which a metric is told from another.

        Raises:
            ValueError: if the file is not a store, is damaged, or belongs to other inputs.
            OSError: if it cannot be written.
            RuntimeError: if another sweep is using it.
        """
        if path is None:
            with closing(sqlite3.connect(":memory:")) as file:
                yield cls(None, file, cells)
            return
        path = Path(path)
        identity = _identity(model, tokens, clean, cells, probe())
        with _named(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            file = sqlite3.connect(path, timeout=0, isolation_level=None)
        with closing(file):
            with _named(path):
                _claim(path, file, *identity)
            yield cls(path, file, cells)

    def unfinished(self, values: Tensor) -> list[Cell]:
        """Read finished cells into ``values`` [metric, cell, (batch)]; returns the others."""
        if self.path is None:
            return list(self.cells)
        with _named(self.path):
            kept = dict(self.file.execute("SELECT cell, value FROM finished"))
        for row, value in kept.items():
            read = torch.frombuffer(bytearray(value), dtype=torch.float64)
            if row >= len(self.cells) or read.numel() != values[:, row].numel():
                raise ValueError(
                    f"{str(self.path)!r} holds a sweep of another shape: name another file"
                )
            values[:, row] = read.view_as(values[:, row]).to(values)
        return [cell for cell in self.cells if cell.row not in kept]

    def finish(self, values: Tensor, cells: Sequence[Cell]) -> None:
        """Add finished cells to the file."""
        if self.path is None or not cells:
            return
        rows = [cell.row for cell in cells]
        # As float64, which holds values of every type exactly.
        found = values[:, rows].movedim(1, 0).cpu().double().numpy()
        with _named(self.path), self.file:
            self.file.execute("BEGIN")
            self.file.executemany(
                "INSERT OR REPLACE INTO finished VALUES (?, ?)",
                [(row, value.tobytes()) for row, value in zip(rows, found, strict=True)],
            )

    def forget(self) -> None:
        """Mark all cells as unfinished."""
        if self.path is not None:
            with _named(self.path), self.file:
                self.file.execute("DELETE FROM finished")

    def most_cells(self, total: int) -> int:
        """The most cells to compute between two writes."""
        return total if self.path is None else max(64, total // 20)


def _claim(path: Path, file: sqlite3.Connection, fingerprint: str, summary: Tensor) -> None:
    """Lock the file until it is closed, and see that it is new or belongs to this sweep."""
    file.execute("PRAGMA locking_mode = EXCLUSIVE")
    # A crash of the process loses nothing either way; this waits for the disk once less.
    file.execute("PRAGMA synchronous = NORMAL")
    file.execute("BEGIN EXCLUSIVE")
    with file:
        names = ("application_id", "user_version", "page_count", "page_size")
        application, version, *pages = (
            file.execute(f"PRAGMA {name}").fetchone()[0] for name in names
        )
        ((tables,),) = file.execute("SELECT count(*) FROM sqlite_master")
        # SQLite reads what was cut off the last page as zeros.
        if application and path.stat().st_size < pages[0] * pages[1]:
            raise sqlite3.DatabaseError("it is cut short")
        if not application and not tables:
            file.execute(f"PRAGMA application_id = {_APPLICATION}")
            file.execute(f"PRAGMA user_version = {VERSION}")
            file.execute("CREATE TABLE sweep (fingerprint TEXT, summary BLOB)")
            file.execute("CREATE TABLE finished (cell INTEGER PRIMARY KEY, value BLOB)")
            kept = (fingerprint, summary.numpy().tobytes())
            file.execute("INSERT INTO sweep VALUES (?, ?)", kept)
        elif application != _APPLICATION:
            raise sqlite3.DatabaseError("it is a database of another kind")
        elif version != VERSION:
            raise ValueError(
                f"{str(path)!r} was written by store version {version}, this is version {VERSION}: "
                "delete it, or name another file"
            )
        else:
            ((other, kept),) = file.execute("SELECT fingerprint, summary FROM sweep")
            read = torch.frombuffer(bytearray(kept), dtype=torch.float64)
            if other != fingerprint or not _alike(read, summary):
                raise ValueError(
                    f"{str(path)!r} belongs to a sweep of another model, task, metric or kind: "
                    "name another file"
                )


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Errors of SQLite and of the disk in words that name the file and the way out."""
    try:
        yield
    except sqlite3.OperationalError as error:
        if "locked" in str(error):
            raise RuntimeError(
                f"another sweep is writing to {str(path)!r}: wait for it, or name another file"
            ) from error
        if path.is_dir():
            raise ValueError(_NOT_A_STORE.format(str(path), "it is a folder")) from error
        raise OSError(
            f"cannot write {str(path)!r} ({error}); what it held before is intact. Name a file "
            "elsewhere, or make room"
        ) from error
    except sqlite3.DatabaseError as error:
        raise ValueError(_NOT_A_STORE.format(str(path), error)) from error
    except OSError as error:
        raise OSError(f"cannot write {str(path)!r} ({error}): name a file elsewhere") from error


_NOT_A_STORE = "{!r} is not a complete store of a sweep ({}): delete it, or name another file"


def _identity(
    model: Any, tokens: Tensor, clean: Mapping[str, Tensor], cells: Sequence[Cell], probe: Tensor
) -> tuple[str, Tensor]:
    """What is the same bit for bit in a resumed sweep, hashed; and what is so but for rounding.

    Weights are summarised too, since folding norms into them is arithmetic, the last bits of
    which depend on the machine and its number of threads. A patch setter is told from another by
    what it writes.
    """
    weights = model.state_dict()
    digest = hashlib.sha256(str(VERSION).encode())
    digest.update(repr([(name, tuple(value.shape)) for name, value in weights.items()]).encode())
    digest.update(tokens.cpu().numpy().tobytes())
    patches = [patch for cell in cells for patch in cell.patches]
    parts = [[(str(p), p.source, p.values is None) for p in cell.patches] for cell in cells]
    digest.update(repr(parts).encode())
    clean_names = sorted({patch.hook_name for patch in patches if patch.values is None})
    own = [patch.values for patch in patches if patch.values is not None]
    setters = {patch.hook_name: patch for patch in patches if patch.setter is not None}
    written = [
        patch.write(torch.ones_like(clean[name]), clean[name]) for name, patch in setters.items()
    ]
    rows = [
        *weights.values(),
        *(clean[name] for name in clean_names),
        *own,
        *written,
        *probe.movedim(1, 0),
    ]
    return digest.hexdigest(), torch.stack([_summarised(row) for row in rows])


def _summarised(values: Tensor) -> Tensor:
    """Norm and two projections of (a regular sample of) the values: float64 ``[3]``."""
    flat = torch.nan_to_num(values.detach().flatten())
    flat = flat[:: max(1, len(flat) // 65536)].cpu().double()
    place = torch.arange(len(flat), dtype=torch.float64, device="cpu")
    waves = torch.stack([torch.cos(place + 1), torch.cos(place * 2**0.5)])
    return torch.cat([flat.norm()[None], waves @ flat])


def _alike(kept: Tensor, summary: Tensor) -> bool:
    """Whether two summaries ``[row, 3]`` differ by no more than rounding."""
    if kept.numel() != summary.numel():
        return False
    # A projection of other values of the same size would be off by about their norm.
    allowed = 1e-3 * summary[:, :1].clamp(min=1e-12)
    return bool(((kept.view_as(summary) - summary).abs() <= allowed).all())
