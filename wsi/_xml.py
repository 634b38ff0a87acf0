"""XML from strangers: parsed without entities, so that no small file unfolds into a large one or reaches for another."""

from pathlib import Path
from typing import Final
from xml.etree.ElementTree import Element, TreeBuilder
from xml.parsers import expat

from wsi.errors import AnnotationError

__all__ = ["MAX_BYTES", "parse_xml"]

MAX_BYTES: Final = 1 << 30
_MAX_DEPTH: Final = 64  # annotation files have eight levels


def parse_xml(path: Path, *, max_bytes: int = MAX_BYTES) -> Element:
    """The root element of an XML file.

    Raises:
        AnnotationError: there is no such file, it is larger than ``max_bytes``, is not well formed, declares entities
            (the "billion laughs") or nests without end.
    """
    try:
        size = path.stat().st_size
        if size > max_bytes:
            raise AnnotationError(
                f"{path}: has {size:,} bytes, more than the limit of {max_bytes:,}; split it or raise it"
            )
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise AnnotationError(f"{path}: there is no such file; check the path") from error
    except OSError as error:
        raise AnnotationError(f"{path}: cannot be read ({error}); copy or export it again") from error
    builder = TreeBuilder()
    depth = 0

    def start(tag: str, attributes: dict[str, str]) -> None:
        nonlocal depth
        depth += 1
        if depth > _MAX_DEPTH:
            raise AnnotationError(
                f"{path}: its elements are nested deeper than {_MAX_DEPTH}; this is no annotation file"
            )
        builder.start(tag, attributes)

    def end(tag: str) -> None:
        nonlocal depth
        depth -= 1
        builder.end(tag)

    def refuse(*_: object) -> None:
        raise AnnotationError(f"{path}: declares entities, which annotation files need none of; remove its DOCTYPE")

    parser = expat.ParserCreate()
    parser.StartElementHandler = start
    parser.EndElementHandler = end
    parser.EntityDeclHandler = refuse
    try:
        parser.Parse(data, True)
    except expat.ExpatError as error:
        raise AnnotationError(f"{path}: is not well-formed XML ({error}); copy or export it again") from error
    return builder.close()
