"""SlideTable: a CSV with a row a slide, and which of its columns says which slide, whose, and where from."""

import csv
import io
from dataclasses import dataclass
from pathlib import Path

from wsi.errors import CohortError

__all__ = ["SlideTable"]

_USUAL = {
    "slide": ("slide", "slide_id", "filename", "file"),
    "patient": ("patient", "patient_id", "case", "case_id"),
    "site": ("site", "centre", "center", "hospital"),
}


@dataclass(frozen=True)
class SlideTable:
    """Rows of words.

    Attributes:
        path: of the file, for messages.
        rows: at least one; every row has every column, empty where the file has nothing.
    """

    path: Path
    rows: tuple[dict[str, str], ...]

    @classmethod
    def read(cls, path: str | Path) -> "SlideTable":
        """Read a CSV; comma, semicolon and tab are understood.

        Raises:
            CohortError: there is no such file, it is no text, has no rows, or a column is named twice.
        """
        path = Path(path)
        try:
            text = path.read_text(encoding="utf-8-sig")
        except FileNotFoundError as error:
            raise CohortError(f"{path}: there is no such table of slides") from error
        except (UnicodeDecodeError, IsADirectoryError) as error:
            raise CohortError(f"{path}: not a CSV in UTF-8; save it as one") from error
        head = text.partition("\n")[0]
        reader = csv.reader(io.StringIO(text), delimiter=max(",;\t", key=head.count))
        columns = [column.strip() for column in next(reader, [])]
        if len(set(columns)) != len(columns):
            raise CohortError(f"{path}: two columns have one name; rename one")
        rows = tuple(
            {column: (row[i].strip() if i < len(row) else "") for i, column in enumerate(columns)}
            for row in reader
            if any(cell.strip() for cell in row)
        )
        if not rows:
            raise CohortError(f"{path}: has no rows; one for each slide is needed")
        return cls(path, rows)

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the columns, in the file's order."""
        return tuple(self.rows[0])

    def named(self, column: str) -> str:
        """The name of a column that has to be there.

        Raises:
            CohortError: it is not.
        """
        if column not in self.columns:
            raise CohortError(f"{self.path}: has no column {column!r}; it has {', '.join(self.columns)}")
        return column

    def usual(self, what: str) -> str | None:
        """The column of ``"slide"``, ``"patient"`` or ``"site"``, by the names it usually has; None where none is there."""
        return next((name for name in _USUAL[what] if name in self.columns), None)

    def column(self, what: str, name: str | None = None) -> str:
        """The column of this name, or else the usual one.

        Raises:
            CohortError: it is not there.
        """
        if name is not None:
            return self.named(name)
        found = self.usual(what)
        if found is None:
            raise CohortError(
                f"{self.path}: has no column of {what}s ({', '.join(_USUAL[what])}); it has {', '.join(self.columns)}: "
                f"call the right one {what}"
            )
        return found
