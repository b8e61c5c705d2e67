"""A run: its folder, where its work is done, what it shares with others; and the tables measured once for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from autoprune.core.cost import LatencyTable, SharesTable
from autoprune.core.memory_table import MemoryTable
from autoprune.engines.base import Engine
from autoprune.errors import TargetError
from autoprune.files import open_file, write_text
from autoprune.model.fingerprint import of_text
from autoprune.searching.board import Board

JOURNAL = "study.journal"

Table = TypeVar("Table", LatencyTable, MemoryTable, SharesTable)


@dataclass(frozen=True, slots=True)
class Run:
    """Where a search writes, computes and measures. `storage` is a database that others may search with, too."""

    folder: Path
    engine: Engine
    storage: str | None = None
    board: Board | None = None
    """What those who share the storage let each other know."""

    @property
    def studies(self) -> Path | str:
        """Where trials are recorded."""
        return self.storage or self.folder / JOURNAL


@dataclass(frozen=True, slots=True)
class Kept(Generic[Table]):
    """A table of one kind: measured on the target once, and kept by what it is of and which machine that was."""

    kind: str
    key: str
    model: type[Table]

    def found_or_made(
        self, run: Run, measure: Callable[[], Table], *, note: Callable[[str], None]
    ) -> tuple[Table, bool]:
        """The table and whether it was there already: in the run folder, or with those who share the storage.

        Raises TargetError where it is not and nothing can be measured: the text says which folder was looked into.
        """
        folder, where = run.folder / "tables", run.engine.where()
        for path in self._paths(folder, where):
            if (table := self._read(path, note)) is not None:
                return self._shared(run, table), True
        if where is None:
            where = self._waited_for(run, folder)
        if run.board is None:
            table, made = measure(), True
        else:
            text, made = run.board.once(f"{self.kind} {self.key}", lambda: measure().model_dump_json())
            table = self.model.model_validate_json(text)
        write_text(self._paths(folder, where)[0], table.model_dump_json(indent=1))
        return table, not made

    def _waited_for(self, run: Run, folder: Path) -> str:
        try:
            return run.engine.where_to_measure()
        except TargetError as error:
            raise TargetError(
                f"{self.kind}: {folder} has no table of the target, and it cannot be measured: {error}; or copy the "
                "folder tables/ of a run that was measured there"
            ) from error

    def _paths(self, folder: Path, where: str | None) -> list[Path]:
        """Where it is kept: one place for each machine."""
        stem = f"{self.kind}-{self.key[:16]}"
        if where is None:
            return sorted(folder.glob(f"{stem}-*.json"), key=lambda path: path.stat().st_mtime, reverse=True)
        return [folder / f"{stem}-{of_text(where)[:8]}.json"]

    def _read(self, path: Path, note: Callable[[str], None]) -> Table | None:
        if not path.exists():
            return None
        try:
            with open_file(path) as file:
                table = self.model.model_validate_json(file.read())
            self.model.model_validate_json(table.model_dump_json())  # NaN and infinities cannot be written and read
        except (ValueError, OSError):
            note(f"{path} is damaged and is measured anew")
            return None
        return table if table.key == self.key else None

    def _shared(self, run: Run, table: Table) -> Table:
        """The table that counts among those who share the storage: this one where there is none yet."""
        if run.board is None:
            return table
        return self.model.model_validate_json(run.board.once(f"{self.kind} {self.key}", table.model_dump_json)[0])
