"""wsi prototypes: typical tiles of a cohort, and with them one vector for each slide."""

from pathlib import Path
from typing import Any

import click

from cli.console import PatientConsole, say
from cli.embedding import Bar, tell
from features.keys import slide_path
from wsi.settings import pairs_of_words

__all__ = ["prototypes"]

_HELP = {"help_option_names": ["-h", "--help"]}
_METHODS = ("panther", "protocounts", "h2t", "ot", "mean", "mean-variance", "quantiles")


@click.group(context_settings=_HELP)
def prototypes() -> None:
    """Typical tiles of a cohort, and with them one vector for each slide, without labels.

    Prototypes are k tiles' vectors that stand for the k kinds of tissue of a cohort. They are fitted once, on slides that
    nothing will be tested on, and then say of each slide how much of each kind it has and what that looks like.

    \b
    wsi prototypes fit OUT --encoder uni2-h --slides train.csv --out prototypes.zarr
    wsi prototypes embed OUT --prototypes prototypes.zarr
    wsi prototypes show OUT --prototypes prototypes.zarr
    """


@prototypes.command(context_settings=_HELP)
@click.argument("store", metavar="OUT", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), help="Where the prototypes go; prototypes.zarr, say.")
@click.option("--encoder", help="Whose features; may be left out where OUT has one encoder.")
@click.option(
    "--slides",
    "table",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="CSV of the slides to fit on: column slide. Those you will test on should not be among them.  [default: all]",
)
@click.option("--k", type=click.IntRange(min=1), default=16, show_default=True, help="How many prototypes.")
@click.option(
    "--seed", type=click.IntRange(min=0), default=0, show_default=True, help="The same seed, the same prototypes."
)
@click.option(
    "--tiles",
    "n_tiles",
    type=click.IntRange(min=1),
    default=100_000,
    show_default=True,
    help="Tiles to fit on, in all; each slide gives at most its equal share.",
)
@click.option(
    "--balance",
    type=click.Choice(["slides", "sites"]),
    default="slides",
    show_default=True,
    help="Who gives an equal share: slides, or the sites of the CSV's column site.",
)
@click.option(
    "--scale",
    type=click.Choice(["none", "standard"]),
    default="none",
    show_default=True,
    help="standard: every feature counts alike, whatever its variance. none: as PANTHER was published.",
)
@click.option(
    "--restarts",
    type=click.IntRange(min=1),
    default=3,
    show_default=True,
    help="Starts of k-means; the best is kept.",
)
@click.option(
    "--report",
    "ks",
    metavar="K,K,…",
    help="Fit nothing yet: say how good and how stable each of these k would be.",
)
@click.option(
    "--device", default="auto", show_default=True, help="auto, cpu or cuda; auto takes a GPU for large pools."
)
def fit(store: Path, out: Path | None, encoder: str | None, table: Path | None, ks: str | None, **values: Any) -> int:
    """Fit prototypes on the features in OUT.

    Tiles are drawn from all slides alike and grouped by k-means; the most common prototype comes first. The same command
    gives the same prototypes.

    \b
    wsi prototypes fit OUT --encoder uni2-h --slides train.csv --out prototypes.zarr
    wsi prototypes fit OUT --encoder uni2-h --slides train.csv --report 8,16,32
    """
    console = PatientConsole()
    if out is None and ks is None:
        raise click.UsageError("where to? --out prototypes.zarr; or --report 8,16,32 to choose k first")
    if out is not None and out.exists():
        raise click.UsageError(f"{out} is there already; give another --out, or delete it")
    with console.status("loading …"):  # torch alone takes seconds
        from mil.prototypes import SlideSet, draw_tiles, fit_prototypes, report_k
        from mil.sources import encoder_of

        slides = SlideSet.from_store(store, encoder or encoder_of(store), table)
    for left in slides.left_out:
        say(console, f"{slide_path(left.slide)}: left out, {left.reason}")
    with Bar(console, "reading", len(slides.slides), "slides") as bar:
        pool = draw_tiles(
            slides, values["n_tiles"], seed=values["seed"], balance=values["balance"], done=lambda _: bar.step()
        )
    say(console, f"{len(pool)} tiles of {len(pool.slides)} slides")
    if out is None or ks is not None:
        asked = _numbers(ks or "")
        with Bar(console, "fitting", len(asked), "values of k") as bar:
            found = report_k(
                pool, asked, seed=values["seed"], restarts=values["restarts"], scale=values["scale"],
                done=lambda _: bar.step(),
            )  # fmt: skip
        say(console, str(found))
        return 0
    with console.status("k-means …"):
        fitted = fit_prototypes(
            pool, values["k"], seed=values["seed"], restarts=values["restarts"], scale=values["scale"],
            device=values["device"],
        )  # fmt: skip
        fitted.save(out)
    shares = ", ".join(f"{share:.1%}" for share in fitted.shares[:8])
    more = f" and {fitted.k - 8} smaller ones" if fitted.k > 8 else ""
    say(console, f"{fitted.k} prototypes of {' and '.join(fitted.encoders)}: {shares}{more} of the tiles")
    say(console, f"prototypes: {out}  (wsi prototypes embed {store} --prototypes {out} uses them)")
    return 0


@prototypes.command(context_settings=_HELP)
@click.argument("store", metavar="OUT", type=click.Path(path_type=Path))
@click.option(
    "--prototypes",
    "path",
    type=click.Path(path_type=Path),
    help="Made by wsi prototypes fit; only mean, mean-variance and quantiles do without.",
)
@click.option(
    "--method", type=click.Choice(_METHODS), default="panther", show_default=True, help="How a slide is described."
)
@click.option("--encoder", help="Whose features.  [default: that of the prototypes, or the only one]")
@click.option("--name", help="Name of the vectors in the store.  [default: method and encoder, such as panther-uni2-h]")
@click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="KEY=VALUE",
    help="A hyper-parameter of the method, such as em_iter=3, tau=1 or eps=1.",
)
@click.option("--replace", is_flag=True, help="Make vectors anew that are there and were made otherwise.")
def embed(
    store: Path,
    path: Path | None,
    method: str,
    encoder: str | None,
    name: str | None,
    settings: tuple[str, ...],
    replace: bool,
) -> int:
    """Write one vector for each slide into OUT.

    Run it again after an interruption, or when slides have come: what is there is not made again. In Python,
    mil.prototypes.Embeddings.from_store(OUT, "panther-uni2-h") reads all of them as a matrix.

    Exit code 0: every slide with features has its vector. 3: some could not be embedded; 4: none could.

    \b
    wsi prototypes embed OUT --prototypes prototypes.zarr
    wsi prototypes embed OUT --method mean --encoder uni2-h
    """
    console = PatientConsole()
    with console.status("loading …"):
        from features.store import FeatureStore
        from mil.prototypes import Prototypes, build_embedder, embed_slides

        embedder = build_embedder(method, **dict(pairs_of_words(settings, where="--set")))
        fitted = None if path is None else Prototypes.load(path)
        opened = FeatureStore(store)
    with Bar(console, "embedding", len(opened), "slides") as bar:
        report = embed_slides(
            opened, fitted, embedder, encoder=encoder, name=name, replace=replace, done=lambda *_: bar.step()
        )
    return tell(console, report)


@prototypes.command(context_settings=_HELP)
@click.argument("store", metavar="OUT", type=click.Path(path_type=Path))
@click.option(
    "--prototypes", "path", required=True, type=click.Path(path_type=Path), help="Made by wsi prototypes fit."
)
@click.option(
    "--out", type=click.Path(file_okay=False, path_type=Path),
    help="Folder; is made.  [default: beside the prototypes, as prototypes-pictures]",
)  # fmt: skip
@click.option(
    "--slides",
    "table",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="CSV of the slides to look at: column slide.  [default: all]",
)
@click.option(
    "--labels",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="CSV of what is known of slides: columns slide, patient, and that of --target.",
)
@click.option("--target", help="Column of --labels to compare prototypes with; for survival the time.")
@click.option("--event", help="Column of --labels that says whether the event was seen; makes --target survival.")
@click.option(
    "--tiles", "n_near", type=click.IntRange(1, 64), default=12, show_default=True, help="Tiles on each contact sheet."
)
@click.option(
    "--per-slide", type=click.IntRange(1, 2), default=1, show_default=True, help="How many of them one slide may give."
)
@click.option("--maps/--no-maps", default=True, show_default=True, help="A map of each slide, as picture and GeoJSON.")
def show(
    store: Path,
    path: Path,
    out: Path | None,
    table: Path | None,
    labels: Path | None,
    target: str | None,
    event: str | None,
    n_near: int,
    per_slide: int,
    maps: bool,
) -> int:
    """Draw what each prototype looks like, and where and how much of it slides have.

    \b
    prototypes.png       all prototypes, a row each: the tiles nearest to it, of different slides
    sheets/              the same larger, one prototype each, with the slide and the distance of every tile
    maps/SLIDE.jpg       which prototype each tile belongs to, over the slide
    maps/SLIDE.geojson   the same for QuPath: drag it onto the slide
    shares.csv, .png     how much of each prototype each slide has
    cohort.png           slides × prototypes, like ones side by side
    outcome.csv          with --labels and --target: which prototypes go with it, p corrected for their number

    Pixels are read from the slides where OUT says they were. Exit code 0: all is drawn. 3: pixels of some slides could not be
    read; 4: of none. Everything else is drawn all the same.

    \b
    wsi prototypes show OUT --prototypes prototypes.zarr
    wsi prototypes show OUT --prototypes prototypes.zarr --out pictures/ --labels cohort.csv --target subtype
    """
    console = PatientConsole()
    if (labels is None) != (target is None) or (event is not None and target is None):
        raise click.UsageError("--labels and --target go together (and --event only with them)")
    out = out or path.with_name(f"{path.stem}-pictures")
    with console.status("loading …"):
        from mil.cohort import Cohort
        from mil.prototypes import Prototypes, SlideSet, outcome_table, survey_slides
        from mil.prototypes.pictures import draw_charts, draw_maps, draw_sheets
        from mil.target import Labels

        fitted = Prototypes.load(path)
        if len(fitted.encoders) != 1:
            raise click.UsageError(
                f"{path}: fitted on arrays, or on several encoders' features; a store has none like them"
            )
        slides = SlideSet.from_store(store, fitted.encoders[0], table)
        cohort = None
        if labels is not None and target is not None:
            cohort = Cohort.from_store(store, labels, Labels(target, event=event), encoder=fitted.encoders[0])
    for left in slides.left_out:
        say(console, f"{slide_path(left.slide)}: left out, {left.reason}")
    with Bar(console, "reading features", len(slides.slides), "slides") as bar:
        survey = survey_slides(slides, fitted, n_near=n_near, per_slide=per_slide, done=lambda _: bar.step())
    found = None if cohort is None else outcome_table(survey, cohort)
    with Bar(console, "reading tiles", len({tile.slide for near in survey.nearest for tile in near}), "slides") as bar:
        failed = draw_sheets(survey, slides.source, out, done=lambda _: bar.step())
    draw_charts(survey, out, cohort)
    if maps:
        with Bar(console, "maps", len(slides.slides), "slides") as bar:
            failed |= draw_maps(survey, slides.source, out, done=lambda _: bar.step())
    for slide, reason in failed.items():
        say(console, f"{slide_path(slide)}: drawn without its pixels, {reason}")
    if found is not None:
        found.write(out / "outcome.csv")
        say(console, str(found))
    say(console, f"{fitted.k} prototypes in {len(survey.slides)} slides, {int(survey.n_tiles.sum())} tiles: {out}")
    if failed:
        return 4 if len(failed) == len(survey.slides) else 3
    return 0


def _numbers(words: str) -> list[int]:
    try:
        return [int(word) for word in words.split(",")]
    except ValueError as error:
        raise click.UsageError(f"--report {words}: write whole numbers with commas, such as 8,16,32") from error
