"""Files: tables and JSON leave empty what is not known."""

import math
from pathlib import Path

from wsi._files import nan_as_none, write_table


def test_a_table_leaves_empty_what_is_not_known(tmp_path: Path) -> None:
    write_table(tmp_path / "sub" / "t.csv", ["name", "value"], iter([("a,b", math.nan), ("c", None), ("d", 0.5)]))
    assert (tmp_path / "sub" / "t.csv").read_text(encoding="utf-8") == 'name,value\n"a,b",\nc,\nd,0.5\n'
    assert [path.name for path in (tmp_path / "sub").iterdir()] == ["t.csv"]


def test_json_has_none_for_what_is_not_a_number() -> None:
    assert nan_as_none({"a": math.nan, "b": math.inf, "c": 0, "d": "nan"}) == {
        "a": None,
        "b": math.inf,
        "c": 0,
        "d": "nan",
    }
