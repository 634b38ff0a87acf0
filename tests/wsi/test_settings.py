"""Settings: values from files and words reach the field they name, and what cannot be is said in one line."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wsi.errors import UsageError
from wsi.settings import changed, nested, read_values, values_of_words


@dataclass(frozen=True)
class Inner:
    steps: int = 5
    filters: tuple[int, ...] = (1, 2)

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps is at least 1, got {self.steps}")


@dataclass(frozen=True)
class Outer:
    name: str = "a"
    fit: Inner = field(default_factory=Inner)
    hyper: Mapping[str, Any] = field(default_factory=lambda: {"width": 3, "depth": 1})


@given(st.integers(1, 99), st.lists(st.integers(), max_size=4))
def test_what_is_named_changes_and_nothing_else(steps: int, filters: list[int]) -> None:
    before = Outer(name="b")
    after = changed(before, {"fit": {"steps": steps, "filters": filters}}, where="f")
    assert after == Outer("b", Inner(steps, tuple(filters)))
    assert before == Outer(name="b")
    assert changed(before, {}, where="f") == before


def test_words_reach_nested_fields_with_the_type_they_look_like() -> None:
    words = ("fit.steps=200", "name=patches", "fit.filters=[4, [8]]", "hyper.width=7", "hyper.on=true", "hyper.no=a=b")
    after = changed(Outer(), values_of_words(words, where="--set"), where="--set")
    assert after.fit == Inner(200, (4, (8,)))  # type: ignore[arg-type]
    assert after.name == "patches"
    assert after.hyper == {"width": 7, "depth": 1, "on": True, "no": "a=b"}


def test_the_last_of_two_words_counts() -> None:
    assert values_of_words(("a.b=1", "a.c=2", "a.b=3"), where="--set") == {"a": {"b": 3, "c": 2}}


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"nam": 1}, "f.json: unknown setting 'nam'; did you mean 'name'"),
        ({"zzzz": 1}, "f.json: unknown setting 'zzzz'; there are name, fit, hyper"),
        ({"fit": {"step": 1}}, "f.json: fit: unknown setting 'step'; did you mean 'steps'"),
        ({"fit": 3}, "f.json: fit is an object with settings of its own, not 3"),
        ({"fit": {"steps": 0}}, "f.json: fit: steps is at least 1, got 0"),
        ({"fit": {"steps": "many"}}, "f.json: fit: '<' not supported"),
    ],
)
def test_what_cannot_be_names_the_place_and_the_way_out(values: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        changed(Outer(), values, where="f.json")


@pytest.mark.parametrize("word", ["fit.steps", "=3", ""])
def test_a_word_without_key_or_value_is_refused(word: str) -> None:
    with pytest.raises(UsageError, match=r"--set .*: write KEY=VALUE"):
        values_of_words([word], where="--set")


def test_a_key_within_one_that_has_a_value_is_refused() -> None:
    with pytest.raises(UsageError, match=r"--set fit\.steps: fit was given a value of its own"):
        nested([("fit", 3), ("fit.steps", 2)], where="--set")


@pytest.mark.parametrize(("text", "said"), [("[1]", "object is needed, not list"), ("{", "no JSON"), (None, "read")])
def test_a_file_without_a_json_object_is_refused(text: str | None, said: str, tmp_path: Path) -> None:
    path = tmp_path / "s.json"
    if text is not None:
        path.write_text(text, encoding="utf-8")
    with pytest.raises(UsageError, match=rf"s\.json.*{said}"):
        read_values(path)


def test_a_file_gives_its_values(tmp_path: Path) -> None:
    (tmp_path / "s.json").write_text('{"fit": {"steps": 3}, "name": "ä"}', encoding="utf-8")
    assert read_values(tmp_path / "s.json") == {"fit": {"steps": 3}, "name": "ä"}
