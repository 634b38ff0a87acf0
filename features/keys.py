"""Slide keys: the name of a slide inside a store, from its path relative to the cohort's root."""

import hashlib
import re
import unicodedata
from urllib.parse import quote, unquote

__all__ = ["readable_part", "safe_name", "slide_key", "slide_path"]

_MAX_BYTES = 180  # with the digest and an extension this stays below every file system's 255


def slide_key(relative_path: str) -> str:
    """A file name for a slide: readable, the same on every system, and different for different paths.

    The whole relative path with its extension counts, so equal names in two folders, or ``a.svs`` beside ``a.tif``,
    never collide; the digest tells apart what truncation or case-folding would merge.
    """
    path = unicodedata.normalize("NFC", relative_path.replace("\\", "/"))
    readable = quote(path, safe="", errors="surrogateescape")
    if len(readable) > _MAX_BYTES:
        readable = re.sub(r"%[0-9A-F]?$", "", readable[-_MAX_BYTES:].lstrip("%"))
    digest = hashlib.sha256(path.encode("utf-8", "surrogateescape")).hexdigest()[:8]
    return f"{readable}-{digest}"


def readable_part(key: str) -> str:
    """The relative path a key was made of, for people; the end of it where it was too long to keep."""
    return unquote(key.rpartition("-")[0], errors="surrogateescape")


def slide_path(slide: str) -> str:
    """The relative path that a slide's key was made of; as it is what is no key, or the key of a path too long to keep."""
    path = readable_part(slide)
    return path if slide_key(path) == slide else slide


def safe_name(name: str) -> str:
    """An encoder's name as a folder name: ``timm:resnet18`` becomes ``timm-resnet18``."""
    return re.sub(r"[^\w.+-]+", "-", name, flags=re.ASCII).strip("-.") or "encoder"
