"""wsi search: the slides most like a slide, by their embeddings."""

from pathlib import Path

import click

from cli.console import PatientConsole, say

__all__ = ["search"]


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("store", metavar="OUT", type=click.Path(path_type=Path))
@click.option(
    "--embedding", help="Name of the vectors in OUT, as wsi prototypes embed says; may be left out where OUT has one."
)
@click.option("--query", metavar="SLIDE", help="Look for slides like this one: its file name, stem, path or key.")
@click.option("--top", type=click.IntRange(min=1), default=5, show_default=True, help="How many.")
@click.option(
    "--metric",
    type=click.Choice(["cosine", "centred", "prototypes"]),
    default="cosine",
    show_default=True,
    help="centred: cosine less the mean over slides. prototypes: prototype by prototype, those weighing most that both have.",
)
@click.option(
    "--index",
    type=click.Choice(["auto", "exact", "hnsw"]),
    default="auto",
    show_default=True,
    help="hnsw is for many slides and needs FAISS; auto takes it past 10,000 slides where it is installed.",
)
@click.option("--sheet", type=click.Path(dir_okay=False, path_type=Path), help="A picture of the slides found, as PNG.")
@click.option(
    "--labels",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="CSV of what is known of slides: columns slide, patient, and that of --target.",
)
@click.option("--target", help="Column of classes in --labels: shown beside each slide; without --query, judged.")
def search(
    store: Path,
    embedding: str | None,
    query: str | None,
    top: int,
    metric: str,
    index: str,
    sheet: Path | None,
    labels: Path | None,
    target: str | None,
) -> int:
    """Find the slides in OUT that are most like one of them.

    Slides are compared by vectors that were made before (wsi prototypes embed). With --labels and without --query, every slide
    asks for those of other patients, and precision@k and mAP say how often they are of its class.

    \b
    wsi search OUT --query slide-7 --top 5 --sheet alike.png
    wsi search OUT --embedding panther-uni2-h --labels cohort.csv --target subtype
    """
    console = PatientConsole()
    if (labels is None) != (target is None):
        raise click.UsageError("--labels and --target go together")
    if query is None and labels is None:
        raise click.UsageError("what for? --query SLIDE; or --labels and --target to judge the search")
    if sheet is not None and query is None:
        raise click.UsageError("--sheet draws what a --query found")
    with console.status("loading …"):
        from mil.cohort import Cohort
        from mil.prototypes import Embeddings
        from mil.prototypes.palette import slide_name
        from mil.search import INDEX_SLIDES, SlideSearch, evaluate_search

        found = Embeddings.from_store(store, embedding)
        ready = SlideSearch.of(found, metric, index=index)  # type: ignore[arg-type]
        words: dict[str, str] = {}
        patients: dict[str, str] = {}
        if labels is not None and target is not None:
            cohort = Cohort.from_store(store, labels, target, encoder=found.facts["features"]["encoder"])
            if not cohort.target.is_classes:
                raise click.UsageError(f"--target {target} is {cohort.target.kind}; slides are judged by classes")
            task = cohort.tasks[0]
            words = {slide: task.word(row) for row, slide in enumerate(cohort.slides) if task.known[row]}
            patients = dict(zip(cohort.slides, cohort.patients, strict=True))
    if len(ready) > INDEX_SLIDES and ready.index == "exact" and index == "auto":
        say(console, f"{len(ready)} slides are compared one by one; pip install 'wsi-engine[search]' for an index")
    if query is None:
        say(console, f"{found.name}, {metric}:\n{evaluate_search(ready, words, patients)}")
        return 0
    key = ready.key_of(query)
    hits = ready.nearest(key, top)
    width = max((len(slide_name(hit.slide)) for hit in hits), default=0)
    say(
        console,
        f"{slide_name(key)}{_label(words, key)}, {found.name}, {metric}, {ready.index} among {len(ready)} slides:",
    )
    for place, hit in enumerate(hits, 1):
        say(console, f"{place:>4}  {slide_name(hit.slide):{width}}  {hit.similarity:>6.3f}{_label(words, hit.slide)}")
    if sheet is not None:
        from mil.slide_sheet import draw_hits

        gone = draw_hits(store, key, hits, sheet, words)
        for slide in gone:
            say(console, f"{slide_name(slide)}: drawn without its pixels, its file is gone or cannot be read")
        say(console, f"sheet: {sheet}")
        if gone:
            return 4 if len(gone) == len(hits) + 1 else 3
    return 0


def _label(words: dict[str, str], slide: str) -> str:
    return f"  {words[slide]}" if slide in words else ""
