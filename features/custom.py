"""The few backbones that timm cannot build: one without weights, and what a user's own file makes."""

import difflib
import hashlib
import importlib.util
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from wsi.errors import ModelMismatchError, UnknownEncoderError

__all__ = ["BACKBONES", "ColourMoments", "did_you_mean", "make_from_file"]


_TILES = 4  # at once, so that they stay in a processor's cache


class ColourMoments(nn.Module):
    """The first three moments of each colour: a baseline that any learned encoder has to beat. Has no weights.

    Stricker, Orengo: Similarity of color images, SPIE Storage and Retrieval for Image and Video Databases III, 1995.
    Differs from the paper: RGB in place of HSV, values from 0 to 1.
    """

    def forward(self, pixels: Tensor) -> Tensor:
        """uint8 (B, H, W, 3) → float32 (B, 9): mean, standard deviation, cube root of the third moment, each of RGB."""
        moments = []
        for tiles in pixels.flatten(1, 2).transpose(1, 2).contiguous().split(_TILES):  # type: ignore[no-untyped-call]  # (b, 3, H·W)
            colours = tiles.to(torch.float32) / 255
            mean = colours.mean(2, keepdim=True)  # (b, 3, 1)
            off = colours - mean
            square = off * off
            moments.append(torch.stack([mean.squeeze(2), square.mean(2), (square * off).mean(2)], dim=1))  # (b, 3, 3)
        mean, variance, third = torch.cat([*moments, pixels.new_empty(0, 3, 3, dtype=torch.float32)]).unbind(1)
        return torch.cat([mean, variance.sqrt(), third.sign() * third.abs().pow(1 / 3)], dim=1)


BACKBONES: Mapping[str, Callable[[], nn.Module]] = {"colour-moments": ColourMoments}


def make_from_file(path: Path, attribute: str) -> tuple[str, object]:
    """Run the user's Python file ``path`` and call ``attribute()`` of it; returns the file's sha256 and what was made.

    Raises:
        UnknownEncoderError: no such file, or no such function in it.
        ModelMismatchError: the user's code failed; the message has its last line and where that is.
    """
    if not path.is_file():
        raise UnknownEncoderError(f"{path}: no such file; FILE.py:NAME names a Python file and a function in it")
    code_sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    found = importlib.util.spec_from_file_location(f"_encoder_plugin_{code_sha256[:16]}", path)
    if found is None or found.loader is None:
        raise UnknownEncoderError(f"{path}: Python cannot import it")
    module = importlib.util.module_from_spec(found)
    sys.modules[module.__name__] = module  # dataclasses and pickle look their module up
    _run(lambda: found.loader.exec_module(module) if found.loader else None, path)
    make = getattr(module, attribute, None)
    if not callable(make):
        there = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise UnknownEncoderError(
            f"{path}: has no function {attribute!r}{did_you_mean(attribute, there)}; has {', '.join(there) or 'none'}"
        )
    return code_sha256, _run(make, path)


def _run(code: Callable[[], object], path: Path) -> object:
    """Run the user's code; whatever it raises, an attempt to leave the process included, becomes one line."""
    try:
        return code()
    except (Exception, SystemExit) as error:
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        line = error.lineno if isinstance(error, SyntaxError) else frames[-1].lineno if frames else None
        where = f"{path} line {line}" if line else str(path)
        reason = str(error).splitlines()[0] if str(error) else "no message"
        raise ModelMismatchError(f"{where}: the plug-in failed: {type(error).__name__}: {reason}") from error


def did_you_mean(word: str, words: Iterable[str]) -> str:
    """A remark for a message: the few of ``words`` that look like ``word``; empty where none does."""
    close = difflib.get_close_matches(word, list(words), n=3)
    return f" (did you mean {' or '.join(close)}?)" if close else ""
