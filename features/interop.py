"""FeatureFile: features as TRIDENT, CLAM and STAMP keep them in HDF5; all are read, TRIDENT's layout is written too.

::

    TRIDENT  features_<encoder>/<slide>.h5   features (N, D), coords (N, 2) level-0 pixels, both with attributes
    CLAM     h5_files/<slide>.h5             features (N, D), coords (N, 2) level-0 pixels, no attributes
    STAMP    <extractor>-<hash>/<path>.h5    feats (N, D), coords (N, 2) microns; attributes of the file

Sources: TRIDENT 0.3.0 ``trident/IO.py`` and ``WSI.py``; CLAM ``utils/file_utils.py``; STAMP 2.5.0 ``preprocessing`` and
``modeling/data.py``.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from features.store import GOOD, FeatureStore, SlideStore
from wsi._files import write_atomically
from wsi.errors import BadFeaturesError, NotExtractedError, SlideNotFoundError, UsageError
from wsi.geojson import Frame

if TYPE_CHECKING:
    import h5py

__all__ = ["FeatureFile", "Layout", "feature_files", "read_facts", "read_features", "write_trident"]

Layout = Literal["trident", "clam", "stamp"]

_UM_PER_PX_AT_1X = 10.0  # the convention by which TRIDENT turns magnifications into microns per pixel
_STAMP_SCALE = 256 / 224  # before 2.0, STAMP's coordinates counted tiles of 256 um as 224
_ROWS = 512


@dataclass(frozen=True, eq=False)
class FeatureFile:
    """One slide's feature file.

    Attributes:
        path: the file.
        layout: whose.
        n_tiles, dim: N and D.
        encoder: who made the vectors; None where the file does not say (CLAM never does).
        mpp: microns per pixel of a tile; None where the file does not say.
        tile_px: width of a tile in pixels as the encoder got it, or None.
        side: width of a tile in level-0 pixels, or None.
        frame: the slide's size and resolution, where the file says them; origin (0, 0), for it does not know the bounds.
        features: (N, D) as stored; None after ``read_facts``.
        xy: (N, 2) int64 level-0 pixels; None where the file has none (STAMP, whose places are microns).
        xy_um: (N, 2) float32 microns; only of STAMP.
    """

    path: Path
    layout: Layout
    n_tiles: int
    dim: int
    encoder: str | None = None
    mpp: float | None = None
    tile_px: int | None = None
    side: int | None = None
    frame: Frame | None = None
    features: NDArray[Any] | None = None
    xy: NDArray[np.int64] | None = None
    xy_um: NDArray[np.float32] | None = None


def feature_files(folder: str | Path) -> dict[str, Path]:
    """The ``.h5`` files in a folder and all below it, by their path without suffix, ``/`` between the parts.

    Raises:
        SlideNotFoundError: there is no such folder, or it holds none.
    """
    root = Path(folder)
    if not root.is_dir():
        raise SlideNotFoundError(f"{root}: there is no such folder of feature files")
    found = {path.relative_to(root).with_suffix("").as_posix(): path for path in sorted(root.rglob("*.h5"))}
    if not found:
        raise SlideNotFoundError(f"{root}: holds no .h5 files; name the folder with one feature file a slide")
    return found


def read_facts(path: str | Path) -> FeatureFile:
    """What a feature file says of itself, without its vectors.

    Raises:
        SlideNotFoundError: there is no such file.
        BadFeaturesError: it is damaged, or of none of the three layouts.
    """
    return _read(Path(path), whole=False)


def read_features(path: str | Path) -> FeatureFile:
    """A feature file with its vectors. Raises as ``read_facts``."""
    return _read(Path(path), whole=True)


def write_trident(store: FeatureStore, encoder: str, folder: str | Path) -> list[Path]:
    """Write ``folder/features_<encoder>/<slide>.h5`` for every slide with these features, as TRIDENT does.

    Rows of tiles that could not be read are left out: the layout has no mark for them. True ``mpp``, the encoder's weights
    and the status of the rows go along as further attributes, which TRIDENT passes over.

    Raises:
        UsageError: two slides of one file name, or tiles that are not square on the slide.
        NotExtractedError: no slide has these features.
    """
    written: dict[str, Path] = {}
    for slide in store:
        if encoder not in slide.encoders:
            continue
        name = PurePosixPath(slide.relpath).stem
        path = Path(folder) / f"features_{encoder.replace('/', '-').replace(':', '-')}" / f"{name}.h5"
        if name in written:
            raise UsageError(f"{path}: two slides of {store.root} are called {name}; TRIDENT knows only file names")
        write_atomically(path, _trident_bytes(slide, encoder, name, path.parent))
        written[name] = path
    if not written:
        raise NotExtractedError(f"{store.root}: no slide has features of {encoder!r}; wsi info {store.root} lists them")
    return list(written.values())


def _trident_bytes(slide: SlideStore, encoder: str, name: str, folder: Path) -> bytes:
    import h5py

    grid, about = slide.grid, slide.manifest["slide"]
    if grid.side[0] != grid.side[1]:
        raise UsageError(
            f"{slide.path}: tiles are {grid.side[0]} x {grid.side[1]} level-0 pixels; TRIDENT has squares only"
        )
    features = slide.features(encoder)
    good = features.status == GOOD
    vectors, dim = features.numpy()[good], features.shape[1]
    overlap = grid.tile_px - round(grid.stride[0] * grid.tile_px / grid.side[0])
    shared = {
        "patch_size": grid.tile_px,
        "patch_size_level0": grid.side[0],
        "level0_magnification": _magnification(about["mpp"][0]),
        "target_magnification": _magnification(grid.mpp[0]),
        "overlap": overlap,
        "name": name,
        "savetodir": str(folder),
        "level0_width": about["size"][0],
        "level0_height": about["size"][1],
        "mpp": grid.mpp[0],
        "level0_mpp": about["mpp"][0],
        "n_left_out": int((~good).sum()),
    }
    made_by = features.manifest["encoder"]
    of_features = {"name": name, "savetodir": str(folder), "encoder": encoder}
    of_features["weights_sha256"] = str(made_by.get("weights_sha256"))
    with h5py.File(f"{name}.h5", "w", driver="core", backing_store=False) as file:
        chunk = max(1, min(len(vectors), _ROWS))
        data = file.create_dataset("features", data=vectors, maxshape=(None, dim), chunks=(chunk, dim))
        data.attrs.update(of_features)
        data = file.create_dataset("coords", data=grid.xy[good], maxshape=(None, 2), chunks=(chunk, 2))
        data.attrs.update(shared)
        file.flush()
        return bytes(file.id.get_file_image())


def _magnification(mpp: float) -> float:
    exact = _UM_PER_PX_AT_1X / mpp
    # TRIDENT knows the nominal steps; 0.2528 mpp is a 40x scan.
    return float(min((5, 10, 20, 40, 60, 80), key=lambda step: abs(step - exact))) if exact > 4 else round(exact, 2)


def _read(path: Path, *, whole: bool) -> FeatureFile:
    import h5py

    if not path.is_file():
        raise SlideNotFoundError(f"{path}: there is no such feature file")
    try:
        with h5py.File(path, "r") as file:
            if "feats" in file:
                return _stamp(path, file, whole)
            if "features" in file:
                return _trident_or_clam(path, file, whole)
            names = ", ".join(file) or "nothing"
    except (OSError, KeyError, RuntimeError) as error:
        raise BadFeaturesError(f"{path}: cannot be read as HDF5 ({error}); make it again") from error
    raise BadFeaturesError(f"{path}: holds {names}; a feature file of TRIDENT, CLAM or STAMP has features or feats")


def _trident_or_clam(path: Path, file: "h5py.File", whole: bool) -> FeatureFile:
    shape = _shape(path, file["features"])
    about = dict(file["coords"].attrs) if "coords" in file else {}
    side, size = _number(about, "patch_size_level0"), (_number(about, "level0_width"), _number(about, "level0_height"))
    magnification, level0 = _number(about, "target_magnification"), _number(about, "level0_magnification")
    mpp = _number(about, "mpp") or (_UM_PER_PX_AT_1X / magnification if magnification else None)
    level0_mpp = _number(about, "level0_mpp") or (_UM_PER_PX_AT_1X / level0 if level0 else None)
    frame = None
    if size[0] and size[1] and level0_mpp:
        frame = Frame(str(about.get("name", path.stem)), (int(size[0]), int(size[1])), (level0_mpp, level0_mpp))
    tile_px = _number(about, "patch_size")
    return FeatureFile(
        path=path,
        layout="trident" if side else "clam",
        n_tiles=shape[0],
        dim=shape[1],
        encoder=_text(file["features"].attrs, "encoder"),
        mpp=mpp,
        tile_px=int(tile_px) if tile_px else None,
        side=int(side) if side else None,
        frame=frame,
        features=file["features"][()].reshape(shape) if whole else None,
        xy=_places(path, file, shape[0]).astype(np.int64) if whole and "coords" in file else None,
    )


def _stamp(path: Path, file: "h5py.File", whole: bool) -> FeatureFile:
    shape = _shape(path, file["feats"])
    about = dict(file.attrs)
    if _text(about, "feat_type") not in (None, "tile"):
        raise BadFeaturesError(f"{path}: holds one vector of a {about['feat_type']}, not those of its tiles")
    side_um = _number(about, "tile_size_um") or (_number(about, "tile_size") if about.get("unit") == "um" else None)
    tile_px = _number(about, "tile_size_px")
    xy_um = None
    if whole and "coords" in file:
        xy_um = _places(path, file, shape[0]).astype(np.float32)
        if about.get("unit") != "um":
            xy_um = (xy_um * _STAMP_SCALE).astype(np.float32)
    return FeatureFile(
        path=path,
        layout="stamp",
        n_tiles=shape[0],
        dim=shape[1],
        encoder=_text(about, "extractor"),
        mpp=side_um / tile_px if side_um and tile_px else None,
        tile_px=int(tile_px) if tile_px else None,
        features=file["feats"][()].reshape(shape) if whole else None,
        xy_um=xy_um,
    )


def _shape(path: Path, data: Any) -> tuple[int, int]:
    """(N, D) of a dataset; PANTHER's (1, N, D) counts as that."""
    shape = data.shape[1:] if len(data.shape) == 3 and data.shape[0] == 1 else data.shape
    if len(shape) != 2:
        raise BadFeaturesError(f"{path}: {data.name} has shape {data.shape}; one row for each tile is needed")
    return int(shape[0]), int(shape[1])


def _places(path: Path, file: "h5py.File", n: int) -> NDArray[Any]:
    places = np.asarray(file["coords"][()])
    if places.ndim == 3 and places.shape[0] == 1:
        places = places[0]
    if places.shape != (n, 2):
        raise BadFeaturesError(f"{path}: {n} vectors, but places of shape {places.shape}; make the file again")
    return places


def _number(about: Mapping[str, Any], key: str) -> float | None:
    """A positive number among attributes; TRIDENT writes "None" for what it does not know."""
    try:
        value = float(about[key])
    except (KeyError, TypeError, ValueError):
        return None
    return value if 0 < value < float("inf") else None


def _text(about: Mapping[str, Any], key: str) -> str | None:
    value = about.get(key)
    value = value.decode() if isinstance(value, bytes) else value
    return str(value) if value not in (None, "", "None") else None
