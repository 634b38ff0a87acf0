"""Palette: the name and the colour of each prototype, the same in every picture, table and QuPath file; slides' names."""

from typing import Final

from features.keys import slide_path

__all__ = ["prototype_color", "prototype_name", "short_name", "slide_name"]

# The first seven are those of Okabe & Ito, Color Universal Design, 2008, without black. Each further one lies as far as any
# colour does from all before it, in CIELAB, for the nearest of normal, protanopic and deuteranopic sight (Machado, Oliveira,
# Fernandes: A Physiologically-based Model for Simulation of Color Vision Deficiency, TVCG 2009). Never change the order:
# files that were written are coloured by it.
_COLORS: Final = (
    *((230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66), (0, 114, 178), (213, 94, 0), (204, 121, 167)),
    *((0, 0, 255), (0, 45, 45), (135, 255, 165), (15, 15, 150), (105, 45, 0), (105, 105, 255), (30, 30, 90)),
    *((180, 240, 255), (225, 30, 75), (165, 225, 195), (135, 60, 105), (225, 165, 90), (105, 150, 255), (45, 45, 210)),
    *((45, 75, 180), (225, 240, 120), (135, 195, 135), (0, 120, 60), (75, 30, 15), (60, 195, 210), (135, 45, 135)),
    *((0, 30, 120), (165, 60, 0), (15, 45, 75), (60, 225, 120)),
)


def prototype_name(index: int) -> str:
    """What people call the prototype of row ``index`` of the centres: counted from 1, the most common first."""
    return f"Prototype {index + 1}"


def prototype_color(index: int) -> tuple[int, int, int]:
    """RGB, 0 to 255; depends on the index alone. There are 32, and then they repeat."""
    return _COLORS[index % len(_COLORS)]


def slide_name(slide: str) -> str:
    """The file name of a slide of a store; the name itself of any other."""
    path = slide_path(slide)
    return path if path == slide else path.rsplit("/", 1)[-1]


def short_name(slide: str, letters: int = 22) -> str:
    """The same, its middle left out where it is longer: people tell names apart by their ends."""
    name, half = slide_name(slide), letters // 2
    return name if len(name) <= letters else f"{name[:half]}…{name[-half:]}"
