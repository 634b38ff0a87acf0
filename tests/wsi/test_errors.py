"""Errors: the tree at the top of the module and the table of codes for people say what the classes are."""

import re
from pathlib import Path

import pytest

from wsi import errors

CODES = (Path(__file__).parents[2] / "docs" / "codes.md").read_text()
EVERY = [getattr(errors, name) for name in errors.__all__]


def test_the_tree_at_the_top_of_the_module_is_that_of_the_classes() -> None:
    assert errors.__doc__ is not None
    path: list[type] = []
    drawn = {}
    for line in errors.__doc__.splitlines():
        found = re.fullmatch(r"    ([ │├└─]*)(\w+Error)(?: +([A-Z_]+)\b.*| +[a-z].*)?", line)
        if found is None:
            continue
        depth = len(found[1]) // 5 + bool(len(found[1]) % 5)
        kind = getattr(errors, found[2])
        path[depth:] = [kind]
        assert kind.__bases__ == ((path[depth - 1],) if depth else (Exception,)), line
        drawn[found[2]] = found[3]
    assert sorted(drawn) == sorted(errors.__all__)
    for name, code in drawn.items():
        if code is not None:
            assert getattr(errors, name).code == code


@pytest.mark.parametrize("kind", [each for each in EVERY if not each.__subclasses__()])
def test_each_code_is_one_errors_own_and_stands_in_the_table(kind: type[errors.WsiError]) -> None:
    assert [each for each in EVERY if each.code == kind.code] == [kind]
    assert re.search(rf"\b{kind.code}\b", CODES)
