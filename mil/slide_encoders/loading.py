"""Loading slide encoders: a published one by name with its weights, or one's own from the file it was saved to."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from features.custom import did_you_mean
from features.weights import HubFile, WeightsRecord, fetch, read_state, state_sha256
from features.zoo import ALIASES
from mil.slide_encoders.base import SlideEncoder
from mil.slide_encoders.chief import CHIEF
from mil.slide_encoders.cobra import COBRA
from mil.slide_encoders.madeleine import MADELEINE
from mil.slide_encoders.zoo import SLIDE_ALIASES, SLIDE_ZOO, SlideEncoderSpec, TileFeatures
from mil.train import pick_device
from wsi._files import write_atomically
from wsi.errors import MissingWeightsError, ModelMismatchError, UnknownEncoderError

__all__ = [
    "KINDS",
    "LoadedSlideEncoder",
    "SlideEncoderRequest",
    "find_slide_encoder",
    "load_slide_encoder",
    "save_slide_encoder",
]

KINDS: Mapping[str, type[SlideEncoder]] = MappingProxyType({"cobra": COBRA, "madeleine": MADELEINE, "chief": CHIEF})

_FORMAT, _VERSION = "wsi-slide-encoder", 1


@dataclass(frozen=True)
class SlideEncoderRequest:
    """Which slide encoder is wanted: what the user asks for.

    Attributes:
        name: a row of the zoo or an alias; or the path of a file that ``save_slide_encoder`` wrote.
        weights: the authors' weights file, in place of the hub's.
        revision: commit, tag or branch on the hub in place of the row's.
        offline: use what is on this machine, never the network.
        device: ``"auto"``, ``"cpu"``, ``"cuda"`` or ``"cuda:1"``.
    """

    name: str
    weights: Path | None = None
    revision: str | None = None
    offline: bool = False
    device: str = "auto"


class LoadedSlideEncoder(NamedTuple):
    """A slide encoder ready to run, what is known of it, and where its weights came from."""

    spec: SlideEncoderSpec
    encoder: SlideEncoder
    weights: WeightsRecord

    @property
    def identity(self) -> dict[str, Any]:
        """What decides the vectors, as JSON; equal identities give equal embeddings of equal features."""
        return {
            "name": self.spec.name,
            "kind": self.spec.kind,
            "arguments": self.encoder.facts(),
            "weights_sha256": self.weights.sha256,
        }

    def tiles_of(self, encoder: str, width: int) -> tuple[int, tuple[str, ...]]:
        """How many of a stored vector's numbers to take, from the first on, and remarks for a person.

        Args:
            encoder: name of the patch encoder in the store.
            width: length of its vectors.
        """
        own = ALIASES.get(encoder.lower(), encoder.lower())
        known = [tile for tile in self.spec.tiles if tile.encoder == own and tile.dim <= width]
        if known:
            return known[0].dim, ()
        trained = " or ".join(tile.encoder for tile in self.spec.tiles)
        return width, (f"{self.spec.name} was trained on features of {trained}, not of {encoder}",)


def find_slide_encoder(name: str) -> SlideEncoderSpec:
    """The row of this name or alias.

    Raises:
        UnknownEncoderError: there is none; says which come close.
    """
    wanted = SLIDE_ALIASES.get(name.lower(), name.lower())
    if wanted not in SLIDE_ZOO:
        raise UnknownEncoderError(
            f"no slide encoder {name!r}{did_you_mean(wanted, SLIDE_ZOO)}; there are {', '.join(SLIDE_ZOO)}; "
            f"or give the file of one of your own"
        )
    return SLIDE_ZOO[wanted]


def load_slide_encoder(request: SlideEncoderRequest) -> LoadedSlideEncoder:
    """The slide encoder asked for, frozen, with its weights, on its device. No code of a weights file is ever run.

    Raises:
        UnknownEncoderError: no encoder of this name.
        MissingWeightsError: the weights are not here and cannot be fetched; says what to fetch and where to put it.
        ModelMismatchError: the weights are damaged or another model's.
        UnsafePickleError: the weights file would run code.
        DeviceError: the device is not there.
    """
    device = pick_device(request.device)
    if request.name.endswith(".safetensors"):
        loaded = _load_own(Path(request.name))
    else:
        loaded = _load_published(find_slide_encoder(request.name), request)
    loaded.encoder.to(device).eval().requires_grad_(False)
    return loaded


def _load_published(spec: SlideEncoderSpec, request: SlideEncoderRequest) -> LoadedSlideEncoder:
    path, commit = request.weights, None
    if path is None:
        if spec.hub_id is None or spec.weights_file is None:
            raise MissingWeightsError(
                f"{spec.name}: its weights are not on the Hugging Face hub; fetch them from {spec.fetch_from} and pass "
                f"the file with --weights FILE"
            )
        file = HubFile(spec.hub_id, spec.weights_file, request.revision or spec.revision, spec.gated)
        path, commit = fetch(file, offline=request.offline)
    state, notes = read_state(path)
    try:
        encoder = KINDS[spec.kind].from_published(state)
    except ModelMismatchError as error:
        raise ModelMismatchError(f"{path}: {error}; is it the file of {spec.name}?") from None
    record = WeightsRecord(
        "file" if request.weights is not None else "hub", state_sha256(encoder.state_dict()), commit, notes=notes
    )
    return LoadedSlideEncoder(spec, encoder, record)


def save_slide_encoder(path: Path, encoder: SlideEncoder, spec: SlideEncoderSpec, about: Mapping[str, Any]) -> None:
    """Write an encoder of one's own as one safetensors file, which holds no code.

    Args:
        spec: what it is called and which tile features it takes.
        about: JSON facts of how it was trained; to read, not to compare.
    """
    from safetensors.torch import save

    kind = next(name for name, made in KINDS.items() if type(encoder) is made)
    facts = {
        "format": _FORMAT, "version": _VERSION, "kind": kind, "arguments": encoder.facts(), "spec": asdict(spec),
        "about": dict(about),
    }  # fmt: skip
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in encoder.state_dict().items()}
    # One key: safetensors writes several in an order of its own, and equal encoders should be equal files.
    write_atomically(path, save(tensors, {"wsi": json.dumps(facts, sort_keys=True)}))


def _load_own(path: Path) -> LoadedSlideEncoder:
    if not path.is_file():
        raise MissingWeightsError(f"{path}: no such file; wsi slide-encoder train writes one")
    try:
        with safe_open(path, "pt", device="cpu") as file:
            facts = json.loads((file.metadata() or {})["wsi"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no dict
        if (facts["format"], facts["version"]) != (_FORMAT, _VERSION):
            raise ModelMismatchError(f"{path}: not a slide encoder of this release, which reads {_FORMAT} {_VERSION}")
        row = facts["spec"] | {"tiles": tuple(TileFeatures(*tile) for tile in facts["spec"]["tiles"])}
        spec = SlideEncoderSpec(**row | {"aliases": tuple(row["aliases"])})
        with torch.random.fork_rng(devices=[]):  # the random weights it is born with are nobody's business
            encoder = KINDS[facts["kind"]](**facts["arguments"])
        encoder.load_state_dict(tensors)
    except (OSError, SafetensorError, KeyError, ValueError, TypeError, RuntimeError) as error:
        raise ModelMismatchError(
            f"{path}: cannot be used as a slide encoder ({error}); a published weights file goes with --model NAME --weights"
        ) from error
    return LoadedSlideEncoder(spec, encoder, WeightsRecord("file", state_sha256(encoder.state_dict())))
