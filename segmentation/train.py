"""Training of a whole segmentation: folds, first stage, its maps of slides it did not see, second stage. Goes on after a kill.

Each stage leaves a file in the model's folder, whole or not there; a run that begins again takes what is there.
"""

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np

from features.encoder import resolve_device
from features.runner import EncoderRunner
from segmentation.classifier import PatchClassifier
from segmentation.classifier_training import ClassifierEpoch, train_classifier
from segmentation.config import SegmentationConfig
from segmentation.dense import TOKENS, train_dense
from segmentation.examples import StoredExamples, save_example
from segmentation.fit import Example, Fitted, Watch, dice_of_labels
from segmentation.heat import ProbabilityMap, write_heat
from segmentation.prior import Prior
from segmentation.refine import Refiner, example_of, train_refiner
from segmentation.sampling import AnnotatedSlide, PatchIndex, SlidePatches, index_slide
from segmentation.segmenter import CLASSIFIER_FILE, DENSE_FILE, MODEL_FILE, REFINEMENT_FILE, write_model
from segmentation.splits import Split, split_slides
from wsi._files import write_atomically, write_table
from wsi._version import __version__
from wsi.errors import CohortError, RunMismatchError, TooCoarseError, UsageError
from wsi.slide import fingerprint

__all__ = ["SilentWatcher", "Watcher", "train"]

_BEGUN: Final = "training.json"
_WORK: Final = "work"


class Watcher(Protocol):
    """Is told how training goes; the command line draws progress from it."""

    def stage(self, title: str, total: int, unit: str) -> None: ...
    def step(self, done: int, said: str) -> None: ...
    def note(self, text: str) -> None: ...


class SilentWatcher:
    """Tells nobody."""

    def stage(self, title: str, total: int, unit: str) -> None: ...
    def step(self, done: int, said: str) -> None: ...
    def note(self, text: str) -> None: ...


def train(
    slides: Sequence[AnnotatedSlide],
    config: SegmentationConfig,
    folder: str | Path,
    *,
    weights: Path | None = None,
    watcher: Watcher | None = None,
) -> dict[str, Any]:
    """Train a model on annotated slides, into a folder that ``segmentation.segmenter.Segmenter.load`` reads.

    Called again after a kill, with the same slides and settings, it goes on behind the last stage that was finished.

    Args:
        slides: as ``segmentation.annotated.annotated_slides`` gives them.
        folder: of the model; made if need be.
        weights: of the classifier's trunk, in place of the published ones.

    Returns:
        The facts saved with the model; ``"validation"`` has the Dice of each stage on slides held out.

    Raises:
        CohortError: too few slides or patients, or a class that none has.
        RunMismatchError: the folder was begun with other slides or settings.
        TooCoarseError: a slide is too coarse for what the network is to see.
        MissingWeightsError: the trunk's weights are not on this machine and cannot be fetched.
        UsageError: the folder holds a whole model already, or there is no such network.
    """
    folder = Path(folder)
    if (folder / MODEL_FILE).exists():
        raise UsageError(f"{folder}: holds a trained model already; choose another folder, or remove it to train again")
    if config.method in ("cascade", "picture"):  # what cannot be built is said before the first stage is trained
        Refiner.untrained(config.refinement, device="cpu")
    _begin(folder, slides, config, weights)
    course = _Course(tuple(slides), config, folder, weights, watcher or SilentWatcher())
    try:
        about = course.run()
    except TooCoarseError as error:
        raise TooCoarseError(error.fact, "leave the slide out, or train with a larger --mpp") from None
    write_model(folder, about)
    shutil.rmtree(folder / _WORK, ignore_errors=True)
    return about


def _begin(folder: Path, slides: Sequence[AnnotatedSlide], config: SegmentationConfig, weights: Path | None) -> None:
    """Note what is going to be learned from what; refuse a folder in which something else was begun."""
    # In their order, as what training leaves on its way goes by number; and with what decides who is held out.
    drawn = [
        [
            str(each.location),
            each.mpp,
            each.facts.get(config.patient),
            sha256("".join(sorted(str(a.id) for a in each.annotations)).encode()).hexdigest()[:16],
        ]
        for each in slides
    ]
    given = None if weights is None else fingerprint(weights)
    wanted = json.loads(json.dumps({"config": config.as_json(), "slides": drawn, "weights": given}))
    path = folder / _BEGUN
    left = {each.name for each in folder.iterdir()} if folder.exists() else set()
    if _BEGUN not in left or left == {_BEGUN}:  # or nothing came of it
        write_atomically(path, json.dumps(wanted, indent=1).encode())
        return
    try:
        begun = json.loads(path.read_text(encoding="utf-8"))
        differs = [key for key in wanted if begun[key] != wanted[key]]
        settings = [key for key, value in wanted["config"].items() if begun["config"].get(key) != value]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunMismatchError(f"{path}: cannot be read ({error}); remove {folder} and train again") from error
    if differs:
        what = {
            "slides": "other slides or annotations",
            "config": f"other settings ({', '.join(settings)})",
            "weights": "other weights of the trunk",
        }[differs[-1]]
        raise RunMismatchError(
            f"{folder}: training was begun here with {what}; give the same to go on, another folder, or remove this one"
        )


@dataclass(frozen=True)
class _Course:
    """One training from its slides to its networks."""

    slides: tuple[AnnotatedSlide, ...]
    config: SegmentationConfig
    folder: Path
    weights: Path | None
    watcher: Watcher

    def run(self) -> dict[str, Any]:
        method = self.config.method
        facts: dict[str, Any] = {}
        if method == "dense":
            facts["validation"] = self._once("dense network", DENSE_FILE, self._dense)
        if method == "cascade":
            for number in range(self.config.folds):
                self._score_fold(number)
        if method in ("cascade", "patches"):
            self._classifier(CLASSIFIER_FILE, "patch classifier", range(len(self.slides)))
        if method in ("cascade", "picture"):
            facts["validation"] = self._once("refinement", REFINEMENT_FILE, self._refinement)
        if method in ("cascade", "patches"):
            facts["patches"] = self._index(range(len(self.slides))).counts()
        return {
            "method": method,
            "classes": list(self.config.classes),
            "config": self.config.as_json(),
            "slides": len(self.slides),
            "validation_slides": [str(self.slides[i].location) for i in self._split.validation],
            "engine": __version__,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            **facts,
        }

    @cached_property
    def _patches(self) -> tuple[SlidePatches, ...]:
        self.watcher.stage("finding patches", len(self.slides), "slides")
        found = []
        for number, slide in enumerate(self.slides, start=1):
            found.append(index_slide(slide, self.config.patches))
            self.watcher.step(number, Path(str(slide.location)).name)
        return tuple(found)

    @cached_property
    def _split(self) -> Split:
        config = self.config
        patients = [each.facts.get(config.patient) or str(each.location) for each in self.slides]
        drawn = [{str(a.class_name) for a in each.annotations} & set(config.classes) for each in self.slides]
        folds = config.folds if config.method == "cascade" else 1
        return split_slides(patients, drawn, folds=folds, validation=config.validation, seed=config.seed)

    def _index(self, rows: Iterable[int]) -> PatchIndex:
        return PatchIndex.of([self._patches[row] for row in rows], self.config.patches)

    def _classifier(self, name: str, title: str, rows: Iterable[int]) -> PatchClassifier:
        """Trained on those of ``rows`` that are not for validation, or read from its file."""
        config, path = self.config, self.folder / name
        if path.exists():
            self.watcher.note(f"{title}: there already")
            return PatchClassifier.load(path, trunk_weights=self.weights)
        held = set(self._split.validation)
        index = self._index(row for row in rows if row not in held)
        validation = self._validation([row for row in rows if row in held], title)
        classifier = PatchClassifier.create(config.facts, config.network, weights=self.weights, seed=config.seed)
        self.watcher.stage(title, config.classifier.epochs, "epochs")
        epochs: list[ClassifierEpoch] = []
        for epoch in train_classifier(classifier, index, config.classifier, validation):
            epochs.append(epoch)
            judged = "" if validation is None else f", validation {epoch.validation_loss:.3f}"
            self.watcher.step(epoch.epoch, f"loss {epoch.loss:.3f}{judged}")
        write_table(path.with_suffix(".csv"), ClassifierEpoch._fields, epochs)
        classifier.save(path)
        kept = [epoch for epoch in epochs if epoch.kept][-1]
        accuracy = "" if validation is None else f", balanced accuracy {kept.balanced_accuracy:.3f} on slides held out"
        self.watcher.note(f"{title}: epoch {kept.epoch} of {len(epochs)}{accuracy}")
        return classifier

    def _validation(self, rows: Sequence[int], title: str) -> PatchIndex | None:
        """None where the slides held out do not show every class, which then cannot say when to stop."""
        if not rows:
            return None
        try:
            return self._index(rows)
        except CohortError as error:
            self.watcher.note(f"{title}: trained for all its epochs, as of the slides held out {error}")
            return None

    def _score_fold(self, number: int) -> None:
        """Maps of the slides of a fold by a classifier that saw none of them."""
        scored = self._split.folds[number]
        if all(self._heat(row).exists() for row in scored):
            return
        rows = sorted(set(range(len(self.slides))) - set(scored))
        title = f"fold {number + 1} of {self.config.folds}"
        classifier = self._classifier(f"{_WORK}/fold-{number}.safetensors", f"{title}: patch classifier", rows)
        runner = EncoderRunner(classifier.encoder(_device(self.config)))
        self.watcher.stage(f"{title}: probability maps", len(scored), "slides")
        for done, row in enumerate(scored, start=1):
            annotated = self.slides[row]
            if not self._heat(row).exists():
                with annotated.open() as slide:
                    write_heat(
                        self._heat(row), slide, runner, self.config.facts, self.config.heat, tissue=annotated.tissue
                    )
            self.watcher.step(done, Path(str(annotated.location)).name)

    def _heat(self, row: int) -> Path:
        return self.folder / _WORK / "heat" / f"{row}.zarr"

    def _once(self, title: str, name: str, train: Callable[[str, Path], dict[str, float]]) -> dict[str, float]:
        """What training a network gave, of this call or an earlier one."""
        path = self.folder / name
        told = path.with_suffix(".json")
        if path.exists() and told.exists():
            self.watcher.note(f"{title}: there already")
            found: dict[str, float] = json.loads(told.read_text(encoding="utf-8"))
            return found
        scores = train(title, path)
        write_atomically(told, json.dumps(scores, indent=1).encode())
        return scores

    def _refinement(self, title: str, path: Path) -> dict[str, float]:
        """Train the second network."""
        config = self.config
        examples = self._examples()
        held = self._split.validation
        learned = StoredExamples([examples[row] for row in range(len(self.slides)) if row not in held])
        validation = StoredExamples([examples[row] for row in held])
        with self._watched(title, path) as watch:
            refiner, fitted = train_refiner(
                learned.draw, config.refinement, config.fit, validation, device=_device(config), watch=watch
            )
        scores = {"refined_dice": max(score for _, score in fitted.scores)} if fitted.scores else {}
        if config.method == "cascade" and len(validation):
            scores["patches_dice"] = dice_of_labels(
                ((_likeliest(each), each.mask) for each in validation), len(config.classes) + 1
            )
        refiner.save(path, fitted=config.fit)
        self._judged(title, fitted, scores)
        return scores

    def _dense(self, title: str, path: Path) -> dict[str, float]:
        """Train the network of the method dense."""
        config, held = self.config, self._split.validation
        encoder = None
        if config.dense.network == TOKENS:
            encoder = config.network.load(weights=self.weights).to(_device(config))
        learned = [slide for row, slide in enumerate(self.slides) if row not in held]
        validation = [self.slides[row] for row in held]
        with self._watched(title, path) as watch:
            segmenter, fitted = train_dense(
                learned, config.dense, config.fit, validation, encoder=encoder, device=_device(config), watch=watch
            )
        scores = {"dense_dice": max(score for _, score in fitted.scores)} if fitted.scores else {}
        segmenter.save(path, fitted=config.fit)
        self._judged(title, fitted, scores)
        return scores

    @contextmanager
    def _watched(self, title: str, path: Path) -> Iterator[Watch]:
        """What tells of the steps of a network's training; in the end they are written beside its file."""
        self.watcher.stage(title, self.config.fit.steps, "steps")
        steps: list[tuple[int, float, float | None]] = []

        def watch(step: int, loss: float, dice: float | None) -> None:
            steps.append((step, loss, dice))
            self.watcher.step(step, f"loss {loss:.3f}" + ("" if dice is None else f", Dice {dice:.3f}"))

        yield watch
        write_table(path.with_suffix(".csv"), ("step", "loss", "dice"), steps)

    def _judged(self, title: str, fitted: Fitted, scores: Mapping[str, float]) -> None:
        words = ", ".join(f"{name.replace('_', ' ')} {value:.3f}" for name, value in scores.items())
        self.watcher.note(f"{title}: step {fitted.best_step} of {len(fitted.losses)}" + (f"; {words}" if words else ""))

    def _examples(self) -> list[Path]:
        """Each slide's picture, map and truth, on disk."""
        self.watcher.stage("pictures of slides", len(self.slides), "slides")
        folders = []
        for row, annotated in enumerate(self.slides):
            folders.append(self.folder / _WORK / "examples" / str(row))
            if not folders[-1].exists():
                heat = None
                if self.config.refinement.heat:
                    heat = Prior.of_classes(ProbabilityMap.open(self._heat(row)), self.config.classes)
                with annotated.open() as slide:
                    save_example(folders[-1], example_of(slide, heat, annotated.annotations, self.config.refinement))
            self.watcher.step(row + 1, Path(str(annotated.location)).name)
        return folders


def _device(config: SegmentationConfig) -> str:
    return str(resolve_device(config.classifier.device))


def _likeliest(example: Example) -> Any:
    """(h, w) classes as the first stage alone would tell them."""
    nothing = 1 - example.heat.sum(axis=0, keepdims=True)
    return np.concatenate([nothing, example.heat]).argmax(axis=0)
