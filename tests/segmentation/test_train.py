"""Training of a whole segmentation: it finds, it goes on after a kill to the same end, and nothing leaks between slides."""

import csv
import json
import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import shapely

import segmentation.train as module
from segmentation.classifier import PatchClassifier
from segmentation.classifier_training import train_classifier
from segmentation.config import METHODS, Method
from segmentation.dense import train_dense
from segmentation.heat import ProbabilityMap, write_heat
from segmentation.polygons import PolygonOptions
from segmentation.refine import Refiner, train_refiner
from segmentation.results import outlines_of
from segmentation.sampling import AnnotatedSlide, PatchIndex
from segmentation.segmenter import Segmenter
from segmentation.train import train
from tests.segmentation.trained import CONFIG, TISSUE, config, save_picture, slide, tumour
from wsi.annotation import Annotation
from wsi.errors import CohortError, RunMismatchError, UsageError
from wsi.slide import Slide

HELD_OUT = 77


class Stopped(BaseException):
    """As a kill: nothing handles it."""


@dataclass
class Watching:
    """Notes what it is told; stops training at the start of a stage, or at one of its steps."""

    stop_at: str = ""
    stop_step: int = 0
    stages: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    steps: list[tuple[str, int]] = field(default_factory=list)

    def stage(self, title: str, total: int, unit: str) -> None:
        self.stages.append(title)
        self._check(0)

    def step(self, done: int, said: str) -> None:
        self.steps.append((self.stages[-1], done))
        self._check(done)

    def note(self, text: str) -> None:
        self.notes.append(text)

    def _check(self, done: int) -> None:
        if self.stop_at == self.stages[-1] and self.stop_step == done:
            raise Stopped


@dataclass(frozen=True)
class Trained:
    """A model, and how it came about."""

    folder: Path
    about: dict[str, Any]
    watcher: Watching
    learned: list[set[str]]  # what each classifier was trained on, in order
    judged: list[set[str]]
    scored: list[str]  # slides that were scored in training, with the number of classifiers trained before
    scored_by: list[int]


@pytest.fixture(scope="module")
def slides(tmp_path_factory: pytest.TempPathFactory) -> list[AnnotatedSlide]:
    folder = tmp_path_factory.mktemp("slides")
    return [slide(folder, seed) for seed in range(6)]


def _recorded(slides: list[AnnotatedSlide], method: Method, folder: Path) -> Trained:
    learned: list[set[str]] = []
    judged: list[set[str]] = []
    scored: list[str] = []
    scored_by: list[int] = []
    watcher = Watching()

    def names(index: PatchIndex | None) -> set[str]:
        return set() if index is None else {Path(each.slide.location).name for each in index.slides}

    def recording_fit(classifier: Any, index: PatchIndex, options: Any, validation: PatchIndex | None = None) -> Any:
        learned.append(names(index))
        judged.append(names(validation))
        return train_classifier(classifier, index, options, validation)

    def recording_write(path: Path, opened: Slide, *rest: Any, **named: Any) -> ProbabilityMap:
        scored.append(opened.name)
        scored_by.append(len(learned) - 1)
        return write_heat(path, opened, *rest, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "train_classifier", recording_fit)
        patch.setattr(module, "write_heat", recording_write)
        about = train(slides, config(method), folder, watcher=watcher)
    return Trained(folder, about, watcher, learned, judged, scored, scored_by)


@pytest.fixture(scope="module")
def cascade(slides: list[AnnotatedSlide], tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return _recorded(slides, "cascade", tmp_path_factory.mktemp("models") / "cascade")


@pytest.fixture(scope="module")
def models(
    cascade: Trained, slides: list[AnnotatedSlide], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Trained]:
    folder = tmp_path_factory.mktemp("models")
    others: tuple[Method, ...] = ("patches", "picture", "dense")
    return {"cascade": cascade} | {method: _recorded(slides, method, folder / method) for method in others}


def dice_on(model: Path, picture: Path, seed: int, scratch: Path) -> float:
    segmenter = Segmenter.load(model, device="cpu")
    with Slide.open(picture, mpp=(1.0, 1.0)) as opened:
        heat = None
        if segmenter.first is not None:
            heat = segmenter.score(opened, scratch / "heat.zarr", tissue=[Annotation(TISSUE, "Tissue")])
        outlines = outlines_of(segmenter.find(opened, heat), PolygonOptions())
    found = shapely.union_all([outline.geometry for outline in outlines])
    truth = tumour(seed)
    assert {outline.class_name for outline in outlines} == {"tumour"}
    return float(2 * found.intersection(truth).area / (found.area + truth.area))


@pytest.mark.parametrize("method", METHODS)
def test_every_method_finds_the_tumour_on_a_slide_it_never_saw(
    method: str, models: dict[str, Trained], tmp_path: Path
) -> None:
    picture = save_picture(tmp_path / "held-out.png", HELD_OUT)
    # All of the tissue would be 0.26; patches of 16 px cannot follow the border.
    assert dice_on(models[method].folder, picture, HELD_OUT, tmp_path) > (0.75 if method == "patches" else 0.9)


def test_a_model_folder_is_whole_and_holds_nothing_that_only_training_needs(models: dict[str, Trained]) -> None:
    first = {"classifier.safetensors", "classifier.csv"}
    second = {"refinement.safetensors", "refinement.csv", "refinement.json"}
    always = {"model.json", "training.json"}
    files = {name: {path.name for path in each.folder.iterdir()} for name, each in models.items()}
    dense = {"dense.safetensors", "dense.csv", "dense.json"}
    assert files == {
        "cascade": always | first | second,
        "patches": always | first,
        "picture": always | second,
        "dense": always | dense,
    }


def test_what_is_saved_says_how_the_model_was_made(cascade: Trained, slides: list[AnnotatedSlide]) -> None:
    about = json.loads((cascade.folder / "model.json").read_text(encoding="utf-8"))
    assert about["config"] == json.loads(json.dumps(CONFIG.as_json()))
    assert (about["method"], about["classes"], about["slides"]) == ("cascade", ["tumour"], 6)
    assert set(about["files"]) == {"classifier.safetensors", "refinement.safetensors"}
    assert set(about["validation_slides"]) <= {str(each.location) for each in slides}
    assert about["validation"] == cascade.about["validation"]
    assert about["validation"]["refined_dice"] > 0.9
    assert 0.5 < about["validation"]["patches_dice"] < about["validation"]["refined_dice"]
    with (cascade.folder / "refinement.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == list(range(1, CONFIG.fit.steps + 1))
    assert max(float(row["dice"]) for row in rows if row["dice"]) == pytest.approx(about["validation"]["refined_dice"])
    assert (cascade.folder / "classifier.csv").read_text(encoding="utf-8").count("\n") == CONFIG.classifier.epochs + 1


def test_maps_that_the_refinement_learns_from_are_of_classifiers_that_did_not_see_the_slide(cascade: Trained) -> None:
    everything = {f"slide-{seed}.png" for seed in range(6)}
    assert set(cascade.scored) == everything
    assert len(cascade.scored) == 6
    for name, number in zip(cascade.scored, cascade.scored_by, strict=True):
        assert name not in cascade.learned[number] | cascade.judged[number]
        patient = {"slide-0.png", "slide-1.png"}
        assert not (name in patient and patient & (cascade.learned[number] | cascade.judged[number]))
    assert len(cascade.learned) == CONFIG.folds + 1


def test_slides_for_validation_are_learned_from_in_no_way(
    models: dict[str, Trained], slides: list[AnnotatedSlide]
) -> None:
    for trained in models.values():
        held = {Path(location).name for location in trained.about["validation_slides"]}
        assert held
        assert all(not names & held for names in trained.learned)
    final = models["patches"]
    assert final.judged[-1] == {Path(location).name for location in final.about["validation_slides"]}
    assert len(final.learned[-1] | final.judged[-1]) == len(slides)


def test_the_refinement_is_trained_on_slides_that_are_not_for_validation(
    slides: list[AnnotatedSlide], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, set[bytes]] = {}

    def recording(draw: Any, options: Any, fit_options: Any, validation: Any, **named: Any) -> Any:
        rng = np.random.default_rng(0)
        seen["learned"] = {draw(rng).image.tobytes() for _ in range(60)}
        seen["validation"] = {each.image.tobytes() for each in validation}
        return train_refiner(draw, options, fit_options, validation, **named)

    monkeypatch.setattr(module, "train_refiner", recording)
    short = config("picture", fit=replace(CONFIG.fit, steps=1))
    about = train(slides, short, tmp_path / "model")
    assert len(seen["validation"]) == len(about["validation_slides"])
    assert len(seen["learned"]) == len(slides) - len(about["validation_slides"])
    assert not seen["learned"] & seen["validation"]


@pytest.mark.parametrize(
    ("stage", "step", "there"),
    [
        ("fold 1 of 2: probability maps", 1, ["fold 1 of 2: patch classifier: there already"]),
        ("fold 2 of 2: patch classifier", 3, []),
        ("pictures of slides", 2, ["patch classifier: there already"]),
        ("refinement", 0, ["patch classifier: there already"]),
        ("refinement", 20, ["patch classifier: there already"]),
    ],
)
def test_training_goes_on_after_a_kill_and_ends_with_the_same_weights(
    stage: str, step: int, there: list[str], cascade: Trained, slides: list[AnnotatedSlide], tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    with pytest.raises(Stopped):
        train(slides, CONFIG, folder, watcher=Watching(stage, step))
    assert not (folder / "model.json").exists()
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    assert not [path for path in before if path.name.endswith(".partial")]
    again = Watching()
    written: dict[Path, int] = {}
    remove = shutil.rmtree

    def looking(path: Path, **named: Any) -> None:
        written.update({each: each.stat().st_mtime_ns for each in before if each.exists()})
        remove(path, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shutil, "rmtree", looking)
        about = train(slides, CONFIG, folder, watcher=again)
    assert written == before  # nothing that was there is made anew
    assert [note for note in again.notes if "there already" in note] == there
    assert not {f"{note.removesuffix(': there already')}" for note in there} & set(again.stages)
    for name in ("classifier.safetensors", "refinement.safetensors"):
        assert (folder / name).read_bytes() == (cascade.folder / name).read_bytes()
    assert about["validation"] == cascade.about["validation"]


def test_a_refinement_whose_scores_were_not_written_is_trained_again(
    cascade: Trained, slides: list[AnnotatedSlide], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any) -> None:
        raise Stopped

    with monkeypatch.context() as patch:
        patch.setattr(module, "write_model", stop)
        with pytest.raises(Stopped):
            train(slides, CONFIG, tmp_path / "m")
    (tmp_path / "m" / "refinement.json").unlink()
    again = Watching()
    train(slides, CONFIG, tmp_path / "m", watcher=again)
    assert "refinement" in again.stages
    name = "refinement.safetensors"
    assert (tmp_path / "m" / name).read_bytes() == (cascade.folder / name).read_bytes()


def _begun(slides: list[AnnotatedSlide], folder: Path) -> None:
    with pytest.raises(Stopped):
        train(slides, CONFIG, folder, watcher=Watching("fold 1 of 2: probability maps"))


def test_other_settings_in_a_folder_that_was_begun_are_refused_by_name(
    slides: list[AnnotatedSlide], tmp_path: Path
) -> None:
    _begun(slides, tmp_path / "m")
    other = replace(CONFIG, fit=replace(CONFIG.fit, steps=31), seed=3)
    with pytest.raises(RunMismatchError, match=r"begun here with other settings \(fit, seed\)"):
        train(slides, other, tmp_path / "m")


def test_other_slides_annotations_patients_or_order_in_a_folder_that_was_begun_are_refused(
    slides: list[AnnotatedSlide], tmp_path: Path
) -> None:
    _begun(slides, tmp_path / "m")
    moved = Annotation(shapely.affinity.translate(tumour(0), 1), "tumour")
    others = (
        slides[:5],
        [replace(slides[0], annotations=(moved,)), *slides[1:]],
        [replace(slides[0], facts={"patient": "z"}), *slides[1:]],
        [replace(slides[0], mpp=(1.1, 1.1)), *slides[1:]],
        slides[::-1],
    )
    for other in others:
        with pytest.raises(RunMismatchError, match="other slides or annotations"):
            train(other, CONFIG, tmp_path / "m")


def test_other_weights_of_the_trunk_than_training_began_with_are_refused(
    slides: list[AnnotatedSlide], tmp_path: Path
) -> None:
    _begun(slides, tmp_path / "m")
    (tmp_path / "other.safetensors").write_bytes(b"other weights")
    with pytest.raises(RunMismatchError, match="begun here with other weights of the trunk"):
        train(slides, CONFIG, tmp_path / "m", weights=tmp_path / "other.safetensors")


def test_a_folder_in_which_nothing_came_about_can_be_begun_with_other_settings(
    slides: list[AnnotatedSlide], tmp_path: Path
) -> None:
    with pytest.raises(Stopped):
        train(slides, CONFIG, tmp_path / "m", watcher=Watching("finding patches"))
    about = train(slides[1:], config("picture", fit=replace(CONFIG.fit, steps=1)), tmp_path / "m")
    begun = json.loads((tmp_path / "m" / "training.json").read_text(encoding="utf-8"))
    assert begun["config"] == json.loads(json.dumps(about["config"]))
    assert len(begun["slides"]) == 5


@pytest.mark.parametrize("refinement", [{"network": "u-nett"}, {"hyper": {"filterz": 3}}])
def test_a_second_network_that_cannot_be_built_is_refused_before_the_first_is_trained(
    refinement: dict[str, Any], slides: list[AnnotatedSlide], tmp_path: Path
) -> None:
    watcher = Watching()
    with pytest.raises(UsageError):
        train(slides, config(refinement=replace(CONFIG.refinement, **refinement)), tmp_path / "m", watcher=watcher)
    assert watcher.stages == []


def test_a_finished_folder_and_a_note_that_cannot_be_read_are_refused(
    cascade: Trained, slides: list[AnnotatedSlide], tmp_path: Path
) -> None:
    before = (cascade.folder / "model.json").read_bytes()
    with pytest.raises(UsageError, match="holds a trained model already"):
        train(slides, CONFIG, cascade.folder)
    assert (cascade.folder / "model.json").read_bytes() == before
    (tmp_path / "work").mkdir()
    for text in ("{", "[]", '{"slides": {}}'):
        (tmp_path / "training.json").write_text(text, encoding="utf-8")
        with pytest.raises(RunMismatchError, match=r"training\.json: cannot be read"):
            train(slides, CONFIG, tmp_path)


def test_the_saved_networks_are_what_the_settings_say(cascade: Trained) -> None:
    classifier = PatchClassifier.load(cascade.folder / "classifier.safetensors")
    assert classifier.facts.classes == ("background", "tumour")
    assert (classifier.facts.mpp, classifier.facts.patch_px) == (1.0, 16)
    refiner = Refiner.load(cascade.folder / "refinement.safetensors", device="cpu")
    assert replace(refiner.config, hyper={}) == replace(CONFIG.refinement, hyper={})


def test_without_slides_held_out_every_step_is_made_and_nothing_is_claimed(
    slides: list[AnnotatedSlide], tmp_path: Path
) -> None:
    about = train(slides, config("picture", validation=0, fit=replace(CONFIG.fit, steps=2)), tmp_path / "m")
    assert (about["validation"], about["validation_slides"]) == ({}, [])


def test_held_out_slides_without_every_class_do_not_decide_and_training_says_so(
    slides: list[AnnotatedSlide], tmp_path: Path
) -> None:
    bare = [replace(each, annotations=()) for each in slides[3:]]
    watcher = Watching()
    for seed in range(20):
        options = config("patches", seed=seed, validation=0.1)
        course = module._Course((*slides[:3], *bare), options, tmp_path, None, watcher)
        if all(row >= 3 for row in course._split.validation):
            break
    about = train([*slides[:3], *bare], options, tmp_path / "m", watcher=watcher)
    assert any("trained for all its epochs" in note for note in watcher.notes)
    assert (tmp_path / "m" / "classifier.csv").read_text(encoding="utf-8").count("\n") == CONFIG.classifier.epochs + 1
    assert about["patches"].keys() >= {"background", "tumour"}


def test_cohorts_too_small_are_refused(slides: list[AnnotatedSlide], tmp_path: Path) -> None:
    with pytest.raises(CohortError, match="2 folds need slides of as many patients; there are 1"):
        train(slides[:2], CONFIG, tmp_path / "a")
    with pytest.raises(CohortError, match="nothing to learn from"):
        train(slides[:3], CONFIG, tmp_path / "b")


def test_a_dense_network_is_not_trained_on_the_slides_that_judge_it(
    slides: list[AnnotatedSlide], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[set[str]] = []

    def recording(learned: Any, dense: Any, fit: Any, validation: Any, **named: Any) -> Any:
        seen.extend({str(each.location) for each in part} for part in (learned, validation))
        return train_dense(learned, dense, fit, validation, **named)

    monkeypatch.setattr(module, "train_dense", recording)
    about = train(slides, config("dense", fit=replace(CONFIG.fit, steps=1)), tmp_path / "m")
    learned, judged = seen
    assert judged == set(about["validation_slides"])
    assert judged
    assert learned == {str(each.location) for each in slides} - judged
