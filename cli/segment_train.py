"""wsi segment train: slides and annotations into a model."""

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn

from cli.console import PatientConsole, WithBars, say
from cli.options import MppType, words_of
from cli.run import EXIT_CODES
from wsi.discover import discover
from wsi.settings import changed, nested, read_values, values_of_words

if TYPE_CHECKING:
    from segmentation.config import SegmentationConfig  # would load torch for every --help

__all__ = ["train"]

_LINE_EVERY_S = 30.0


@click.command(epilog=f"Exit codes: {EXIT_CODES}")
@click.option(
    "--slides", required=True, type=click.Path(exists=True, path_type=Path),
    help="Folder of slides, or a CSV with a column slide; its other columns (patient, grade …) are facts of slides.",
)  # fmt: skip
@click.option(
    "--annotations", required=True, type=click.Path(exists=True, path_type=Path),
    help="Folder of what people drew: GeoJSON, ASAP or ImageScope XML, or masks; named as the slides are.",
)  # fmt: skip
@click.option(
    "--classes", required=True,
    help="What to learn, as it is named in the annotations; several with commas.",
)  # fmt: skip
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder of the model.")
@click.option(
    "--method", type=click.Choice(["cascade", "patches", "picture", "dense"]), default="cascade", show_default=True,
    help="cascade: patches find, a second network draws the border. patches, picture: one of the two alone. "
    "dense: one network at full resolution, for glands and the like.",
)  # fmt: skip
@click.option(
    "--mpp",
    type=click.FloatRange(min=0, min_open=True),
    help="Microns per pixel of patches, or of what the dense network sees.  [default: 1.0]",
)
@click.option(
    "--patch", "tile_px", type=click.IntRange(min=1), help="Width and height of these.  [default: 256, dense: 512]"
)
@click.option(
    "--rim", "contour_um", type=click.FloatRange(min=0, min_open=True), metavar="µm",
    help="dense: learn objects' rims, so wide, too; touching objects are told apart by them.  [default: areas only]",
)  # fmt: skip
@click.option(
    "--trunk",
    help="Network of the patch classifier, or below a dense one on tokens: h2g-mobilenet, timm:MODEL, or any of "
    "wsi encoders.  [default: h2g-mobilenet]",
)
@click.option("--frozen", is_flag=True, help="Leave the trunk as it is and learn only the layers after it.")
@click.option(
    "--weights", type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Weights of the trunk from this file and not from the hub.",
)  # fmt: skip
@click.option(
    "--random-weights", "random_seed", type=int, metavar="SEED", help="Begin with random weights of the trunk from this seed.",
)  # fmt: skip
@click.option(
    "--folds", type=click.IntRange(min=2), help="Parts of the cohort that a classifier does not see.  [default: 3]"
)
@click.option("--epochs", type=click.IntRange(min=1), help="Of the classifier, at most.  [default: 200]")
@click.option(
    "--steps",
    type=click.IntRange(min=1),
    help="Of the second network, at most, or of the dense one.  [default: 1000, dense: 3000]",
)
@click.option("--side", "side_px", type=click.IntRange(min=1), help="What the second network sees.  [default: 1024]")
@click.option(
    "--slide-mpp", type=MppType(), help="Microns per pixel of the slides' sharpest level, where files are silent."
)
@click.option("--device", help="auto, cpu, mps or cuda.  [default: auto]")
@click.option("--seed", type=click.IntRange(min=0), help="Of everything that is drawn.  [default: 0]")
@click.option("--config", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="JSON file of settings.")
@click.option(
    "--set", "settings", multiple=True, metavar="KEY=VALUE",
    help="Any other setting, such as classifier.lr=1e-3, patches.min_coverage=0.5 or refinement.network=agu-net.",
)  # fmt: skip
def train(slides: Path, annotations: Path, classes: str, out: Path, **values: Any) -> int:
    """Learn to find what people drew, from slides and their annotations.

    Nothing is stored on the way but small maps: patches are drawn from the slides themselves. The same command goes on after
    a kill, behind the last stage that was finished.

    \b
    wsi segment train --slides cohort.csv --annotations annotations/ --classes tumour --out model/
    wsi segment run slides/ out/ --model model/
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    console = PatientConsole()
    with console.status("loading …"):  # torch alone takes seconds
        from segmentation.annotated import annotated_slides
        from segmentation.train import train as train_model

    config = _config_of(words_of(classes), values)
    found = discover(slides.parent, table=slides) if slides.suffix.lower() == ".csv" else discover(slides)
    with console.status("reading annotations …"):
        cohort = annotated_slides(found.sources, annotations, config.classes, mpp=values["slide_mpp"])
    for note in cohort.notes:
        say(console, note)
    say(console, f"{len(cohort.slides)} slides to learn {', '.join(config.classes)} from")
    with _TrainingProgress(console) as progress:
        train_model(cohort.slides, config, out, weights=values["weights"], watcher=progress)
    say(console, f"model: {out}")
    say(console, f"next: wsi segment run SLIDES OUT --model {out}")
    return 0


def _config_of(classes: tuple[str, ...], values: dict[str, Any]) -> "SegmentationConfig":
    """Settings of the file, under those of --set, under those of flags."""
    from segmentation.config import SegmentationConfig

    config = SegmentationConfig.of_classes(classes, values["method"])
    if values["config"] is not None:
        config = changed(config, read_values(values["config"]), where=str(values["config"]))
    config = changed(config, values_of_words(values["settings"], where="--set"), where="--set")
    seen = "dense" if config.method == "dense" else "patches.tiling"
    if values["contour_um"] is not None and config.method != "dense":
        raise click.UsageError("--rim is of the method dense")
    flags = (
        (f"{seen}.mpp", values["mpp"]),
        (f"{seen}.tile_px", values["tile_px"]),
        ("dense.contour_um", values["contour_um"]),
        ("network.trunk", values["trunk"]),
        ("network.frozen", values["frozen"] or None),
        ("network.random_seed", values["random_seed"]),
        ("folds", values["folds"]),
        ("classifier.epochs", values["epochs"]),
        ("classifier.device", values["device"]),
        ("fit.steps", values["steps"]),
        ("refinement.side_px", values["side_px"]),
        *((name, values["seed"]) for name in ("seed", "patches.seed", "classifier.seed", "fit.seed")),
    )
    given = nested(((key, value) for key, value in flags if value is not None), where="flags")
    return changed(config, given, where="flags")


class _TrainingProgress(WithBars):
    """On a terminal a bar a stage, elsewhere now and then a line; a ``Watcher`` of ``segmentation.train``."""

    def __init__(self, console: PatientConsole) -> None:
        super().__init__(
            console, TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
            TextColumn("{task.fields[unit]}"), TextColumn("{task.fields[said]}"), TimeElapsedColumn(),
        )  # fmt: skip
        self._title, self._total, self._unit = "", 0, ""
        self._last_line = 0.0

    def stage(self, title: str, total: int, unit: str) -> None:
        self._title, self._total, self._unit, self._last_line = title, total, unit, time.monotonic()
        if not self.shown:
            say(self._console, f"{title}: {total} {unit}")
        self.clear()
        self.bars.add_task(title, total=total, unit=unit, said="")

    def step(self, done: int, said: str) -> None:
        self.bars.update(self.bars.task_ids[-1], completed=done, said=said)
        if not self.shown and time.monotonic() - self._last_line > _LINE_EVERY_S:
            self._last_line = time.monotonic()
            say(self._console, f"{self._title}: {done} of {self._total} {self._unit}, {said}")

    def note(self, text: str) -> None:
        say(self._console, text)
