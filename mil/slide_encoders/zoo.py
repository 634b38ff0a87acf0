"""The published slide encoders, one row of facts each; data only.

A new encoder of a kind that is here is a new row. Facts are those of the authors' code and papers; what is not verified
says so. A revision of None means that no commit is known to be the one of the paper: the newest is taken and recorded.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

__all__ = ["SLIDE_ALIASES", "SLIDE_ZOO", "SlideEncoderSpec", "TileFeatures"]


class TileFeatures(NamedTuple):
    """Tile vectors that a slide encoder was trained on.

    Attributes:
        encoder: the patch encoder; a name of ``features.zoo`` where it has one there.
        dim: length; of longer vectors of this encoder the first ``dim`` are meant, the class token.
    """

    encoder: str
    dim: int


@dataclass(frozen=True)
class SlideEncoderSpec:
    """What is known of one slide encoder: a row of facts, not a class.

    Attributes:
        name: the name it is asked for by.
        kind: which network, a name of ``mil.slide_encoders.KINDS``.
        tiles: what it was trained on; any one of them will do.
        dim: length of the slide's vector; None where it is that of the tiles'.
        mpp: microns per pixel of the tiles; None where several were used.
        tile_px: side of a tile at that resolution; None likewise.
        hub_id, weights_file: Hugging Face repository and file in it; None where it is elsewhere.
        revision: commit to take; None for the newest.
        gated: whether the repository's terms must be accepted first.
        fetch_from: where to get the file by hand, where it is not on the hub.
        licence: of code and weights, as far as known.
        source: paper.
        notes: what to know, and what is not verified.
        aliases: other names.
    """

    name: str
    kind: str
    tiles: tuple[TileFeatures, ...]
    dim: int | None
    mpp: float | None
    tile_px: int | None
    hub_id: str | None = None
    weights_file: str | None = None
    revision: str | None = None
    gated: bool = False
    fetch_from: str = ""
    licence: str = "unknown"
    source: str = "unknown"
    notes: str = ""
    aliases: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.tiles or any(each.dim < 1 for each in self.tiles):
            raise ValueError(f"{self.name}: needs the lengths of tile vectors it takes, got {self.tiles}")
        if (self.hub_id is None) != (self.weights_file is None):
            raise ValueError(f"{self.name}: hub_id and weights_file go together")


def _cobra(name: str, aliases: tuple[str, ...], first: TileFeatures, weights_file: str) -> SlideEncoderSpec:
    return SlideEncoderSpec(
        name=name,
        aliases=aliases,
        kind="cobra",
        tiles=(
            first, TileFeatures("uni", 1024), TileFeatures("virchow2", 1280), TileFeatures("h-optimus-0", 1536),
        ),
        dim=None,
        mpp=256 / 224,
        tile_px=224,
        hub_id="KatherLab/COBRA",
        weights_file=weights_file,
        licence="GPL-3.0 (code); weights: see the model card",
        source="Lenz et al.: Unsupervised Foundation Model-Agnostic Slide-Level Representation Learning, CVPR 2025",
        notes="Trained at several magnifications; 224 px of 256 µm are STAMP's tiles. Of Virchow2 the class token alone.",
    )  # fmt: skip


_ROWS = (
    _cobra("cobra", ("cobra-1", "cobra1", "cobra-i"), TileFeatures("ctranspath", 768), "pytorch_model.bin"),
    _cobra("cobra-2", ("cobra2", "cobra-ii"), TileFeatures("conch", 512), "cobraII.pth.tar"),
    SlideEncoderSpec(
        name="madeleine",
        kind="madeleine",
        tiles=(TileFeatures("conch-madeleine", 512),),
        dim=512,
        mpp=1.0,
        tile_px=256,
        hub_id="MahmoodLab/madeleine",
        weights_file="model.pt",
        licence="CC-BY-NC-ND-4.0",
        source="Jaume, Vaidya et al.: Multistain Pretraining for Slide Representation Learning in Pathology, ECCV 2024",
        notes="Tiles of CONCH built for an input of 224 px, before its contrastive projection.",
    ),
    SlideEncoderSpec(
        name="chief",
        kind="chief",
        tiles=(TileFeatures("ctranspath-chief", 768),),
        dim=768,
        mpp=1.0,
        tile_px=256,
        fetch_from="https://github.com/hms-dbmi/CHIEF",
        licence="AGPL-3.0",
        source="Wang et al.: A pathology foundation model for cancer diagnosis and prognosis prediction, Nature 2024",
        notes="Tiles of CHIEF's own CTransPath.",
    ),
)

SLIDE_ZOO: Mapping[str, SlideEncoderSpec] = MappingProxyType({row.name: row for row in _ROWS})
SLIDE_ALIASES: Mapping[str, str] = MappingProxyType({alias: row.name for row in _ROWS for alias in row.aliases})
