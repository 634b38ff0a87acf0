"""Mpp: a slide's microns per pixel, where the number comes from, and whether it can be believed. No I/O."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from wsi.errors import ImplausibleMppError, MissingMppError

__all__ = ["MAX_ANISOTROPY", "PLAUSIBLE_MPP", "Mpp", "parse_mpp", "resolve_mpp"]

PLAUSIBLE_MPP = (0.05, 10.0)  # no scanner is sharper, no slide worth tiling coarser
MAX_ANISOTROPY = 0.05  # x and y of a real scanner agree to well below this

# Pixel size times power is close to 10 um for scanners that call their resolution by a power: 40x is 0.25, 20x is 0.5.
_MPP_TIMES_POWER = 10.0


@dataclass(frozen=True)
class Mpp:
    """Microns per level-0 pixel in x and y.

    ``source`` names where it was read (``flag``, ``csv``, or the property's key); ``estimated`` is True where it was
    derived from the objective power, which is nominal.
    """

    x: float
    y: float
    source: str
    estimated: bool = False

    @property
    def xy(self) -> tuple[float, float]:
        return self.x, self.y


def parse_mpp(text: str) -> tuple[float, float]:
    """``"0.25"`` or ``"0.25,0.26"`` (x, y) as two positive numbers; ValueError otherwise."""
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        values = []
    if len(values) not in (1, 2) or not all(0 < value < float("inf") for value in values):
        raise ValueError(f"{text!r} is not a resolution; write 0.25, or 0.25,0.26 for x,y")
    return values[0], values[-1]


def resolve_mpp(
    properties: Mapping[str, str],
    *,
    slide: str,
    flag: tuple[float, float] | None,
    csv: tuple[float, float] | None = None,
) -> Mpp:
    """The slide's mpp from the first of: the flag, the CSV, the standard property, vendor keys, TIFF tags, the power.

    What a person states is believed; what a file states must be plausible.

    Args:
        properties: the reader's properties, as they stand in the file.
        slide: name for messages.
        flag: mpp (x, y) from ``--slide-mpp``.
        csv: mpp (x, y) from the slide's line of a CSV.

    Raises:
        MissingMppError: none of them says anything.
        ImplausibleMppError: the first that says something says what no scanner has.
    """
    for stated, source in ((flag, "flag"), (csv, "csv")):
        if stated is not None:
            return Mpp(*stated, source)
    for source, read in _SOURCES:
        found = read(properties)
        if found is not None:
            _check(found, source, slide)
            return Mpp(*found, source)
    power = _number(properties, "openslide.objective-power", "aperio.AppMag", "tiffslide.objective-power")
    if power is not None and 1 <= power <= 120:
        estimate = _MPP_TIMES_POWER / power
        return Mpp(estimate, estimate, f"objective power {power:g}x", estimated=True)
    raise MissingMppError(
        f"{slide}: the file does not say its microns per pixel; pass --slide-mpp, or give it in the CSV's column mpp"
    )


def _check(mpp: tuple[float, float], source: str, slide: str) -> None:
    low, high = PLAUSIBLE_MPP
    if not all(low <= value <= high for value in mpp):
        reason = f"not between {low} and {high}"
    elif max(mpp) / min(mpp) - 1 > MAX_ANISOTROPY:
        reason = f"x and y differ by more than {MAX_ANISOTROPY:.0%}"
    else:
        return
    raise ImplausibleMppError(
        f"{slide}: {source} says {mpp[0]:.6g} x {mpp[1]:.6g} microns per pixel, which is {reason}; if you know the "
        f"resolution pass --slide-mpp, or give it in the CSV's column mpp"
    )


def _number(properties: Mapping[str, str], *keys: str) -> float | None:
    for key in keys:
        try:
            return float(properties[key])
        except (KeyError, ValueError, TypeError):
            continue
    return None


def _pair(x_key: str, y_key: str, unit_um: float = 1.0) -> Callable[[Mapping[str, str]], tuple[float, float] | None]:
    def read(properties: Mapping[str, str]) -> tuple[float, float] | None:
        x, y = _number(properties, x_key), _number(properties, y_key)
        return None if x is None or y is None else (x * unit_um, y * unit_um)

    return read


def _philips(properties: Mapping[str, str]) -> tuple[float, float] | None:
    """``"0.000226891" "0.000226907"``: row then column spacing in millimetres."""
    numbers = re.findall(r'"([^"]+)"', properties.get("philips.DICOM_PIXEL_SPACING", ""))
    try:
        rows_mm, columns_mm = (float(number) for number in numbers)
    except ValueError:
        return None
    return columns_mm * 1000, rows_mm * 1000


def _tiff_tags(properties: Mapping[str, str]) -> tuple[float, float] | None:
    um = {"centimeter": 10_000.0, "inch": 25_400.0}.get(properties.get("tiff.ResolutionUnit", "").lower())
    x, y = _number(properties, "tiff.XResolution"), _number(properties, "tiff.YResolution")
    if um is None or x is None or y is None or x <= 0 or y <= 0:
        return None
    return um / x, um / y


_SOURCES: tuple[tuple[str, Callable[[Mapping[str, str]], tuple[float, float] | None]], ...] = (
    ("openslide.mpp", _pair("openslide.mpp-x", "openslide.mpp-y")),
    ("tiffslide.mpp", _pair("tiffslide.mpp-x", "tiffslide.mpp-y")),
    ("aperio.MPP", _pair("aperio.MPP", "aperio.MPP")),
    (
        "mirax MICROMETER_PER_PIXEL",
        _pair(
            "mirax.LAYER_0_LEVEL_0_SECTION.MICROMETER_PER_PIXEL_X",
            "mirax.LAYER_0_LEVEL_0_SECTION.MICROMETER_PER_PIXEL_Y",
        ),
    ),
    ("philips.DICOM_PIXEL_SPACING", _philips),
    ("ventana.ScanRes", _pair("ventana.ScanRes", "ventana.ScanRes")),
    ("ome.PhysicalSize", _pair("ome.PhysicalSizeX", "ome.PhysicalSizeY")),
    ("TIFF resolution tags", _tiff_tags),
)
