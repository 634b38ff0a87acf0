"""SegmentationConfig: everything that decides how a segmentation is learned; saved with the model."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Final, Literal, get_args

from segmentation.augment import Augmentation
from segmentation.classifier import NetworkOptions, PatchFacts
from segmentation.classifier_training import ClassifierTraining
from segmentation.dense import DenseConfig, DenseLook
from segmentation.fit import FitConfig
from segmentation.heat import HeatOptions
from segmentation.instances import InstanceOptions
from segmentation.losses import SegmentationLoss
from segmentation.refine import RefineConfig
from segmentation.sampling import PatchOptions
from wsi.errors import UsageError

__all__ = ["DENSE_FIT", "METHODS", "Method", "SegmentationConfig"]

Method = Literal["cascade", "patches", "picture", "dense"]
METHODS: tuple[str, ...] = get_args(Method)

# How a dense network is trained: what was found good for glands on the training fields of GlaS; see benchmarks/glas.py.
DENSE_FIT: Final = FitConfig(
    steps=3000,
    batch_size=8,
    accumulate=1,
    learning_rate=2e-3,
    schedule="cosine",
    loss=SegmentationLoss(dice=1, cross_entropy=1, over_batch=True),
    augmentation=Augmentation(stain_sigma=0.05),
)


@dataclass(frozen=True)
class SegmentationConfig:
    """How a segmentation is learned. The defaults of a cascade are those of H2G-Net.

    Pedersen et al.: H2G-Net: A multi-resolution refinement approach for segmentation of breast cancer region in gigapixel
    histopathological images, Frontiers in Medicine 2022. Differs from the paper: any number of classes; the refinement
    network is trained on maps of classifiers that did not see the slide.

    Attributes:
        patches: what a patch is, and of which class.
        method: ``"cascade"``: a patch classifier finds, a refinement network draws the border. ``"patches"``: the classifier
            alone. ``"picture"``: the network alone, on the slide's low-resolution picture. ``"dense"``: one network at full
            resolution, for what a low-resolution picture does not show, such as glands.
        network: of the patch classifier.
        classifier: its training.
        heat: how a slide is looked at with it.
        refinement: the second network.
        dense: the network of the method dense; on a foundation model's tokens, that of ``network.trunk``.
        look: how a slide is looked at with it.
        objects: how what it finds is parted into single objects, where ``dense.contour_um`` is set.
        fit: training of the second network, or of the dense one.
        folds: parts of the cohort that, in turn, a classifier does not see, for the maps that the refinement network learns
            from.
        validation: share of patients whose slides decide when to stop and are learned from in no other way.
        patient: column that says whose slide it is; slides without it are of a patient each.
        seed: of the parts.
    """

    patches: PatchOptions
    refinement: RefineConfig
    dense: DenseConfig
    method: Method = "cascade"
    network: NetworkOptions = field(default_factory=NetworkOptions)
    classifier: ClassifierTraining = field(default_factory=ClassifierTraining)
    heat: HeatOptions = field(default_factory=HeatOptions)
    look: DenseLook = field(default_factory=DenseLook)
    objects: InstanceOptions = field(default_factory=InstanceOptions)
    fit: FitConfig = field(default_factory=FitConfig)
    folds: int = 3
    validation: float = 0.2
    patient: str = "patient"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise UsageError(f"method is one of {', '.join(METHODS)}, not {self.method!r}")
        if not self.patches.classes == self.refinement.classes == self.dense.classes:
            raise UsageError(
                f"patches, refinement and dense are of the same classes, not {self.patches.classes}, "
                f"{self.refinement.classes} and {self.dense.classes}"
            )
        if self.refinement.heat != (self.method == "cascade"):
            raise UsageError(f"the refinement network sees a probability map in a cascade alone, not in {self.method}")
        self.facts.tiling(steps=self.heat.steps, min_tissue=self.heat.min_tissue)
        if self.folds < 2 or not 0 <= self.validation < 1 or self.seed < 0:
            raise UsageError(
                f"folds are 2 or more, validation is from 0 to below 1, seed from 0; got {self.folds}, {self.validation}, "
                f"{self.seed}"
            )

    @classmethod
    def of_classes(cls, classes: Sequence[str], method: Method = "cascade") -> "SegmentationConfig":
        """The defaults for these classes, named as they are in annotations."""
        patches = PatchOptions(tuple(classes))
        refinement = RefineConfig(patches.classes, heat=method == "cascade")
        made = cls(patches, refinement, DenseConfig(patches.classes), method)
        return replace(made, fit=DENSE_FIT) if method == "dense" else made

    def with_method(self, method: Method) -> "SegmentationConfig":
        """The same with another method."""
        return replace(self, method=method, refinement=replace(self.refinement, heat=method == "cascade"))

    @property
    def classes(self) -> tuple[str, ...]:
        return self.patches.classes

    @property
    def facts(self) -> PatchFacts:
        """What the patch classifier tells apart."""
        return PatchFacts(self.patches.names, self.patches.tiling.mpp, self.patches.tiling.tile_px)

    def as_json(self) -> dict[str, Any]:
        """All settings as JSON values."""
        return asdict(self)
