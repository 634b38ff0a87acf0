"""Run a cohort: slides to look for, encoders to load, the pipeline over them, and the report."""

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from features.devices import devices_of, extract_on_devices
from features.encoder import Encoder, EncoderRequest, load_encoder
from features.outcome import Ledger, NullObserver, Observer, Report
from features.pipeline import ExtractOptions, Pipeline
from features.runner import EncoderRunner
from features.store import FeatureStore
from features.writing import check_writable, sweep
from wsi.discover import Discovery, discover
from wsi.errors import UsageError

__all__ = ["extract_cohort", "extract_found", "extract_slides"]

AnyEncoder = str | EncoderRequest | Encoder


def extract_slides(
    slides: str | Path,
    out: str | Path,
    encoder: AnyEncoder | Sequence[AnyEncoder],
    options: ExtractOptions | None = None,
    *,
    table: str | Path | None = None,
    pattern: str | None = None,
    observer: Observer | None = None,
) -> Report:
    """Features of a folder of slides, of one, or of a table of them, into a store at ``out``.

    >>> extract_slides("slides/", "out", "uni2-h").count("done")

    Args:
        encoder: a name that ``wsi encoders`` lists, a request with weights and device, or an encoder of your own; or
            several of these, which then share one pass over the pixels.
        table, pattern: see ``wsi.discover.discover``.

    Raises:
        UsageError, SlideNotFoundError: nothing has been touched.
        EnvironmentFaultError: the run cannot begin, or go on.
    """
    table, out = None if table is None else Path(table), Path(out)
    return extract_found(discover(slides, table=table, pattern=pattern, out=out), out, encoder, options, observer)


def extract_found(
    found: Discovery,
    out: Path,
    encoder: AnyEncoder | Sequence[AnyEncoder],
    options: ExtractOptions | None = None,
    observer: Observer | None = None,
) -> Report:
    """``extract_slides`` for slides that were looked for already."""
    options = options or ExtractOptions()
    if not found.sources:
        raise UsageError(f"no slides found ({len(found.unlisted)} other files); check SLIDES, --slides and --pattern")
    asked = [encoder] if isinstance(encoder, AnyEncoder) else list(encoder)
    wanted = [EncoderRequest(each) if isinstance(each, str) else each for each in asked]
    requests = [each for each in wanted if isinstance(each, EncoderRequest)]
    in_processes = len(requests) == len(wanted) and len(devices_of(requests)) > 1
    runners = [] if in_processes else [EncoderRunner(_loaded(each)) for each in wanted]
    check_writable(out)
    store = FeatureStore.create(out, options.prepare.tiling, options.prepare.select_facts)
    sweep(store)
    if in_processes:
        return extract_on_devices(found, store, requests, options, observer or NullObserver())
    return extract_cohort(found, store, runners, options, observer)


def _loaded(encoder: EncoderRequest | Encoder) -> Encoder:
    return encoder if isinstance(encoder, Encoder) else load_encoder(encoder)


def extract_cohort(
    found: Discovery,
    store: FeatureStore,
    runners: EncoderRunner | Sequence[EncoderRunner],
    options: ExtractOptions | None = None,
    observer: Observer | None = None,
) -> Report:
    """Bring every slide's features into ``store``; what is complete there already is not touched.

    A slide that fails is recorded with its code and the others go on. Faults of the machine (no space, no device) stop
    the run. ``report.jsonl`` in the store is kept up to date all along.

    Raises:
        UsageError: two encoders would be stored under one name, or the store is of another tiling.
        EnvironmentFaultError: the run cannot go on; everything finished stays.
    """
    runners = [runners] if isinstance(runners, EncoderRunner) else list(runners)
    options, observer = options or ExtractOptions(), observer or NullObserver()
    pipeline = Pipeline(store, runners, options, observer)
    ledger = Ledger(found, store.root / "report.jsonl", lambda: pipeline.timing, options.describe)
    observer.started(len(found.sources), sum(source.bytes for source in found.sources))
    try:
        with ledger, closing(pipeline.run(found.sources)) as finished:
            for source, outcome in finished:
                ledger.add(outcome)
                observer.slide_finished(source, outcome)
    finally:
        pipeline.release_all()
    return ledger.report()
