"""Settings: frozen dataclasses, changed by nested values from a file or by words such as ``fit.steps=200``."""

import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import fields, is_dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

from wsi.errors import UsageError

__all__ = ["changed", "check_known", "nested", "pairs_of_words", "read_values", "values_from_json", "values_of_words"]

Settings = TypeVar("Settings")


def changed(settings: Settings, values: Mapping[str, Any], *, where: str) -> Settings:
    """The same settings with other values; what is not named stays as it is.

    Args:
        settings: a dataclass, whose fields may be dataclasses.
        values: JSON values by field; an object for a field that is a dataclass. Lists become tuples.
        where: named in messages.

    Raises:
        UsageError: no such field, or a value that the settings refuse.
    """
    known = {each.name: getattr(settings, each.name) for each in fields(settings)}  # type: ignore[arg-type]  # a dataclass
    new: dict[str, Any] = {}
    check_known(values, known, where=where)
    for key, value in values.items():
        nested = is_dataclass(known[key]) and not isinstance(known[key], type)
        if nested and not isinstance(value, Mapping):
            raise UsageError(f"{where}: {key} is an object with settings of its own, not {value!r}")
        if nested:
            new[key] = changed(known[key], value, where=f"{where}: {key}")
        elif isinstance(known[key], Mapping) and isinstance(value, Mapping):
            new[key] = {**known[key], **value}
        else:
            new[key] = _frozen(value)
    try:
        return replace(settings, **new)  # type: ignore[type-var]  # a dataclass
    except (UsageError, ValueError, TypeError) as error:
        raise UsageError(f"{where}: {error}") from None


def values_of_words(words: Iterable[str], *, where: str) -> dict[str, Any]:
    """``("fit.steps=200", "method=patches")`` as nested values; what is no JSON is a word, which needs no quotes.

    Raises:
        UsageError: no ``KEY=VALUE``.
    """
    return nested(pairs_of_words(words, where=where), where=where)


def pairs_of_words(words: Iterable[str], *, where: str) -> list[tuple[str, Any]]:
    """``("steps=200", "method=patches")`` as keys and values; what is no JSON is a word, which needs no quotes.

    Raises:
        UsageError: no ``KEY=VALUE``.
    """
    pairs: list[tuple[str, Any]] = []
    for pair in words:
        key, equals, word = pair.partition("=")
        if not equals or not key:
            raise UsageError(f"{where} {pair}: write KEY=VALUE")
        try:
            pairs.append((key, json.loads(word)))
        except ValueError:
            pairs.append((key, word))
    return pairs


def nested(pairs: Iterable[tuple[str, Any]], *, where: str) -> dict[str, Any]:
    """Values by keys such as ``fit.steps`` as nested ones.

    Raises:
        UsageError: a key lies within another that has a value.
    """
    found: dict[str, Any] = {}
    for key, value in pairs:
        *above, last = key.split(".")
        inner = found
        for name in above:
            inner = inner.setdefault(name, {})
            if not isinstance(inner, dict):
                raise UsageError(f"{where} {key}: {name} was given a value of its own")
        inner[last] = value
    return found


def read_values(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        UsageError: there is none.
    """
    try:
        return values_from_json(path.read_text(encoding="utf-8"), where=str(path))
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror})") from error


def values_from_json(text: str, *, where: str) -> dict[str, Any]:
    """The JSON object that a text is.

    Raises:
        UsageError: it is none.
    """
    try:
        values = json.loads(text)
    except ValueError as error:
        raise UsageError(f"{where}: no JSON ({error})") from error
    if not isinstance(values, dict):
        raise UsageError(f"{where}: a JSON object is needed, not {type(values).__name__}")
    return values


def check_known(keys: Iterable[str], known: Collection[str], *, where: str) -> None:
    """Refuse a key that is not known, with the one that was meant, or all there are.

    Raises:
        UsageError: there is one.
    """
    for key in keys:
        if key not in known:
            near = get_close_matches(key, known, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(known)}"
            raise UsageError(f"{where}: unknown setting {key!r}; {hint}")


def _frozen(value: Any) -> Any:
    return tuple(_frozen(each) for each in value) if isinstance(value, list) else value
