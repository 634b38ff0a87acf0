"""PatchClassifier: patches in, a probability for each class out. A network of ``features`` with a head of its own."""

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from features.encoder import (
    Encoder,
    EncoderRequest,
    EncoderSpec,
    Precision,
    build_encoder,
    create_backbone,
    load_encoder,
)
from features.weights import WeightsRecord, state_sha256
from segmentation.saved import read_facts, read_network, save_network
from wsi.annotation import class_color
from wsi.errors import ModelMismatchError, RunMismatchError, UsageError
from wsi.grid import TileGrid, Tiling

__all__ = ["H2G_MOBILENET", "NetworkOptions", "PatchClassifier", "PatchFacts", "exported_encoder"]

_KIND: Final = "patch-classifier"
_MPP_TOLERANCE: Final = 0.1

# The trunk of H2G-Net's patch classifier: pixels from 0 to 1, not normalised further.
H2G_MOBILENET: Final = EncoderSpec(
    name="h2g-mobilenet",
    arch="mobilenetv2_100",
    dim=1280,
    input_px=256,
    resize_px=None,
    tile_px=256,
    mpp=1.0,
    pooling="pooled",
    hub_id="timm/mobilenetv2_100.ra_in1k",
    weights_file="model.safetensors",
    licence="apache-2.0",
    source="Pedersen et al.: H2G-Net, Frontiers in Medicine 2022; weights of timm, trained on ImageNet",
    notes="the paper's weights were Keras'; the values are scaled to 0..1, as in its code",
)


@dataclass(frozen=True)
class PatchFacts:
    """What a classifier's patches are, and what it tells apart.

    Attributes:
        classes: background first.
        mpp: microns per pixel of a patch.
        patch_px: its width and height.
        colours: RGB of each class; by default those of ``wsi.annotation.class_color``.
    """

    classes: tuple[str, ...]
    mpp: float = 1.0
    patch_px: int = 256
    colours: tuple[tuple[int, int, int], ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "classes", tuple(self.classes))
        colours = self.colours or tuple(class_color(name) for name in self.classes)
        object.__setattr__(self, "colours", tuple((int(r), int(g), int(b)) for r, g, b in colours))
        if len(self.classes) < 2 or len(set(self.classes)) < len(self.classes):
            raise UsageError(f"a classifier tells two classes or more apart, of different names; got {self.classes}")
        if len(self.colours) != len(self.classes):
            raise UsageError(f"{len(self.classes)} classes need as many colours, got {len(self.colours)}")
        if not 0 < self.mpp < float("inf") or self.patch_px < 1:
            raise UsageError(f"patches have a positive size and mpp, got {self.patch_px} px at {self.mpp}")

    def tiling(self, *, steps: int = 1, min_tissue: float = 0.1) -> Tiling:
        """The lattice of patches over a whole slide.

        Args:
            steps: to a patch's side; with more than one, patches overlap.
            min_tissue: the least tissue in a patch that is looked at; H2G-Net's benchmark has 0.1.
        """
        if steps < 1 or self.patch_px % steps:
            raise UsageError(f"patches of {self.patch_px} px cannot be laid in {steps} equal steps")
        return Tiling(
            mpp=self.mpp,
            tile_px=self.patch_px,
            overlap_px=self.patch_px - self.patch_px // steps,
            min_tissue=min_tissue,
            edge="pad",
            mpp_tolerance=_MPP_TOLERANCE,
            spare=1.0,
        )

    def check(self, grid: TileGrid) -> None:
        """Refuse tiles that are no patches of this kind.

        Raises:
            RunMismatchError: they have another size or resolution.
        """
        off = max(abs(mpp / self.mpp - 1) for mpp in grid.mpp)
        if grid.tile_px != self.patch_px or off > _MPP_TOLERANCE:
            x, y = grid.mpp
            raise RunMismatchError(
                f"this classifier was trained on patches of {self.patch_px} px at {self.mpp:g} microns per pixel, not "
                f"{grid.tile_px} px at {x:.3g} x {y:.3g}; cut the slide into such patches, or train for these"
            )


@dataclass(frozen=True)
class NetworkOptions:
    """Which network a classifier is made of; saved with it. The defaults are H2G-Net's.

    Attributes:
        trunk: ``"h2g-mobilenet"``, ``"timm:MODEL"``, or any encoder of ``features``.
        frozen: whether the trunk stays as it is and the head alone is trained; then only the head is saved.
        hidden: width of the head's hidden layer; 0 for a linear head.
        dropout: before the last layer.
        random_seed: the trunk's weights are drawn from this seed; None for the published ones.
    """

    trunk: str = H2G_MOBILENET.name
    frozen: bool = False
    hidden: int = 100
    dropout: float = 0.5
    random_seed: int | None = None

    def __post_init__(self) -> None:
        if self.hidden < 0 or not 0 <= self.dropout < 1:
            raise UsageError(f"hidden is from 0, dropout from 0 to below 1; got {self.hidden} and {self.dropout}")

    def load(self, *, weights: Path | None = None, offline: bool = False) -> Encoder:
        """The trunk with its weights, on the CPU.

        Args:
            weights: a file in place of the published ones.
            offline: use what is on this machine.

        Raises:
            MissingWeightsError: the weights are not here and cannot be fetched; see ``features.encoder.load_encoder``.
        """
        request = EncoderRequest(
            self.trunk, weights=weights, random_seed=self.random_seed, offline=offline, device="cpu", precision="fp32"
        )
        return build_encoder(H2G_MOBILENET, request) if self.trunk == H2G_MOBILENET.name else load_encoder(request)


class PatchClassifier(nn.Module):
    """Trunk and head: uint8 patches (B, H, W, 3) to logits (B, K).

    Pedersen et al.: H2G-Net: A multi-resolution refinement approach for segmentation of breast cancer region in gigapixel
    histopathological images, Frontiers in Medicine 2022: MobileNetV2, mean over places, 100 units with ReLU, dropout 0.5,
    softmax. Differs from the paper: any number of classes; any trunk.

    Attributes:
        facts: what its patches are.
        options: what it is made of.
        trunk: the encoder; its weights are trained unless ``options.frozen``.
        head: vectors to logits.
    """

    def __init__(self, facts: PatchFacts, options: NetworkOptions, trunk: Encoder, *, seed: int = 0) -> None:
        """Take over ``trunk``; the head's weights are drawn from ``seed``."""
        super().__init__()
        if trunk.precision != "fp32":
            raise UsageError(f"{trunk.spec.name}: is trained in fp32; half precision is a matter of the loop")
        if trunk.spec.input_px is None and not options.frozen:
            raise UsageError(f"{trunk.spec.name}: takes pixels as they are, so there is nothing to train; set frozen")
        self.facts = facts
        self.options = options
        self.trunk = _seeing(trunk, facts.patch_px)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            self.head = _head(trunk.dim, options, len(facts.classes))
        self.trunk.requires_grad_(not options.frozen)
        self.to(trunk.device)

    @classmethod
    def create(
        cls, facts: PatchFacts, options: NetworkOptions | None = None, *, weights: Path | None = None, seed: int = 0
    ) -> "PatchClassifier":
        """An untrained classifier on a trunk with its weights; see ``NetworkOptions.load``."""
        options = options or NetworkOptions()
        return cls(facts, options, options.load(weights=weights), seed=seed)

    @property
    def device(self) -> torch.device:
        return self.trunk.device

    def train(self, mode: bool = True) -> "PatchClassifier":
        """As any module; a frozen trunk is never in training."""
        super().train(mode)
        if self.options.frozen:
            self.trunk.eval()
        return self

    def forward(self, pixels: Tensor) -> Tensor:
        """uint8 (B, H, W, 3) → (B, K) logits."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.options.frozen):
            vectors = self.trunk(pixels)  # (B, D)
        logits: Tensor = self.head(vectors)  # (B, K)
        return logits.float()

    def encoder(self, device: str | torch.device | None = None, precision: Precision = "fp32") -> Encoder:
        """The classifier as an encoder whose vectors are probabilities (K), to run like any other; a copy.

        A trunk that takes pixels as they are runs in fp32.
        """
        answering = _Answering(deepcopy(self.trunk), deepcopy(self.head))
        record = WeightsRecord("file", self.sha256)
        spec = _answering_spec(self.trunk.spec, self.facts)
        return Encoder(spec, answering, record, device=device or self.device, precision=precision)

    @property
    def sha256(self) -> str:
        """Digest of all weights."""
        return state_sha256({name: tensor.detach().cpu() for name, tensor in self.state_dict().items()}) or ""

    def save(self, path: Path) -> None:
        """Write the classifier as one safetensors file, which holds no code; of a frozen trunk only its digest."""
        facts = {
            "patches": asdict(self.facts),
            "options": asdict(self.options),
            "trunk": asdict(self.trunk.spec),
            "trunk_sha256": self.trunk.weights_sha256 if self.options.frozen else None,
            "sha256": self.sha256,
        }
        save_network(path, _KIND, facts, self.head if self.options.frozen else self)

    @classmethod
    def load(
        cls, path: Path, device: torch.device | str = "cpu", *, trunk_weights: Path | None = None
    ) -> "PatchClassifier":
        """Read a classifier.

        Args:
            trunk_weights: of a frozen trunk, where they are not the published ones.

        Raises:
            ModelMismatchError: the file is none of ours, damaged, or its trunk has other weights than in training.
            MissingWeightsError: those of a frozen trunk are not on this machine.
        """
        about, tensors = read_network(path, _KIND)
        try:
            options = NetworkOptions(**about["options"])
            facts = PatchFacts(**about["patches"])
            if options.frozen:
                trunk = options.load(weights=trunk_weights)
                if trunk.weights_sha256 != about["trunk_sha256"]:
                    raise ModelMismatchError(
                        f"{path}: was trained on other weights of {options.trunk} than these; fetch those, or train it again"
                    )
            else:
                trunk = Encoder(_spec(about["trunk"]), create_backbone(_spec(about["trunk"])))
            made = cls(facts, options, trunk)
            (made.head if options.frozen else made).load_state_dict(tensors)
        except (KeyError, ValueError, TypeError, RuntimeError, UsageError) as error:
            raise ModelMismatchError(
                f"{path}: cannot be used as a patch classifier ({error}); train it again"
            ) from error
        return made.to(device).eval()


def exported_encoder(path: Path, backbone: nn.Module) -> tuple[Encoder, PatchFacts]:
    """A saved classifier's ``encoder()`` and facts, its weights left where they are.

    Args:
        backbone: gives its probabilities in place of them, from normalised images.

    Raises:
        ModelMismatchError: the file is none of ours.
    """
    about = read_facts(path, _KIND)
    try:
        facts = PatchFacts(**about["patches"])
        spec = _answering_spec(_spec(about["trunk"]), facts)
        return Encoder(spec, backbone, WeightsRecord("file", about["sha256"])), facts
    except (KeyError, ValueError, TypeError, UsageError) as error:
        raise ModelMismatchError(f"{path}: cannot be used as a patch classifier ({error}); train it again") from error


def _answering_spec(trunk: EncoderSpec, facts: PatchFacts) -> EncoderSpec:
    return replace(trunk, name=f"{trunk.name}+classifier", dim=len(facts.classes), pooling="pooled")


class _Answering(nn.Module):
    """Normalised images to probabilities."""

    def __init__(self, trunk: Encoder, head: nn.Module) -> None:
        super().__init__()
        self.trunk = trunk
        self.head = head

    def forward(self, images: Tensor) -> Tensor:
        vectors: Tensor = self.trunk.pool(images)
        logits: Tensor = self.head(vectors)
        return logits.float().softmax(dim=1)


def _head(dim: int, options: NetworkOptions, n_classes: int) -> nn.Sequential:
    if not options.hidden:
        return nn.Sequential(nn.Dropout(options.dropout), nn.Linear(dim, n_classes))
    hidden = nn.Linear(dim, options.hidden)
    return nn.Sequential(hidden, nn.ReLU(), nn.Dropout(options.dropout), nn.Linear(options.hidden, n_classes))


def _seeing(trunk: Encoder, patch_px: int) -> Encoder:
    """The trunk with whole patches as its input, where it looks at the size they have: not their middle alone."""
    if trunk.spec.name.startswith(H2G_MOBILENET.name):
        trunk.spec = replace(trunk.spec, input_px=patch_px, tile_px=patch_px)
    elif trunk.spec.input_px is not None:
        trunk.spec = replace(trunk.spec, resize_px=trunk.spec.input_px, tile_px=patch_px)
    return trunk


def _spec(facts: Mapping[str, Any]) -> EncoderSpec:
    lists = {key: tuple(facts[key]) for key in ("mean", "std", "aliases")}
    return EncoderSpec(**{**facts, **lists})
