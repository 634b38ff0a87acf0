"""wsi slide-encoder: one vector for each slide, by a network that was trained for that; published, or your own."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.table import Table

from cli.console import PatientConsole, say
from cli.embedding import Bar, tell

if TYPE_CHECKING:
    from mil.slide_encoders.contrastive import TrainingEpoch  # would load torch for every --help

__all__ = ["slide_encoder"]

_HELP = {"help_option_names": ["-h", "--help"]}


@click.group("slide-encoder", context_settings=_HELP)
def slide_encoder() -> None:
    """One vector for each slide, by a network that was trained for that without labels.

    The vectors are for search, for clustering, and for simple classifiers where labels are few. Take a published encoder,
    or train one on the features you have.

    \b
    wsi slide-encoder list
    wsi slide-encoder embed OUT --model cobra --encoder uni
    wsi slide-encoder train OUT --encoder uni --encoder virchow2 --out own/
    wsi slide-encoder embed OUT --model own/encoder.safetensors --encoder uni
    """


@slide_encoder.command("list", context_settings=_HELP)
def list_() -> int:
    """List the published slide encoders, and which tile features each of them needs."""
    from mil.slide_encoders.zoo import SLIDE_ZOO

    table = Table(box=None, pad_edge=False)
    for column in ("name", "vector", "tile features", "tile", "weights", "licence"):
        table.add_column(column, overflow="fold")
    for spec in SLIDE_ZOO.values():
        takes = ", ".join(f"{tile.encoder} ({tile.dim})" for tile in spec.tiles)
        tile = "any" if spec.mpp is None else f"{spec.tile_px} px at {spec.mpp:.3g} mpp"
        dim = "as the tiles'" if spec.dim is None else str(spec.dim)
        table.add_row(spec.name, dim, takes, tile, spec.hub_id or spec.fetch_from, spec.licence)
    PatientConsole().print(table, highlight=False)
    return 0


@slide_encoder.command(context_settings=_HELP)
@click.argument("store", metavar="OUT", type=click.Path(path_type=Path))
@click.option(
    "--model", required=True, help="A name of wsi slide-encoder list, or the encoder.safetensors of one you trained."
)
@click.option(
    "--weights", type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="The authors' weights file, where it is not to come from the hub.",
)  # fmt: skip
@click.option("--encoder", help="Whose tile features; may be left out where OUT has one encoder.")
@click.option("--average", help="COBRA: weigh tiles by --encoder's features, and take the mean of this encoder's.")
@click.option("--name", help="Name of the vectors in the store.  [default: model and encoder, such as cobra-uni]")
@click.option("--replace", is_flag=True, help="Make vectors anew that are there and were made otherwise.")
@click.option("--revision", help="Revision of the weights on the hub.")
@click.option("--offline", is_flag=True, help="Never ask the hub; what is missing is named.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:1.")
def embed(store: Path, model: str, **values: Any) -> int:
    """Write one vector for each slide into OUT.

    Run it again after an interruption, or when slides have come: what is there is not made again. In Python,
    mil.prototypes.Embeddings.from_store(OUT, "cobra-uni") reads all of them as a matrix.

    Exit code 0: every slide with features has its vector. 3: some could not be embedded; 4: none could.

    \b
    wsi slide-encoder embed OUT --model cobra --encoder uni
    wsi slide-encoder embed OUT --model madeleine --weights model.pt
    """
    console = PatientConsole()
    with console.status("loading …"):  # torch alone takes seconds
        from features.store import FeatureStore
        from mil.slide_encoders import SlideEncoderRequest, load_slide_encoder
        from mil.slide_encoders.embedding import EncodeOptions, encode_slides, remarks

        opened = FeatureStore(store)
        asked = {key: values[key] for key in ("weights", "revision", "offline", "device")}
        loaded = load_slide_encoder(SlideEncoderRequest(model, **asked))
        options = EncodeOptions(**{key: values[key] for key in ("encoder", "average", "name", "replace")})
    for remark in remarks(opened, loaded, options):
        say(console, f"note: {remark}")
    with Bar(console, "embedding", len(opened), "slides") as bar:
        report = encode_slides(opened, loaded, options, done=lambda *_: bar.step())
    return tell(console, report)


@slide_encoder.command(context_settings=_HELP)
@click.argument("store", metavar="OUT", type=click.Path(path_type=Path))
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder of the run; is made.")
@click.option(
    "--encoder", multiple=True, required=True,
    help="Whose tile features; given twice or more, it learns what does not depend on the encoder.",
)  # fmt: skip
@click.option(
    "--patients", "table", type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="CSV that says whose each slide is; slides of a patient belong together.  [default: each slide by itself]",
)  # fmt: skip
@click.option("--name", help="What the encoder is called.  [default: that of the folder]")
@click.option("--epochs", type=click.IntRange(min=1), help="Passes over the patients.  [default: 200]")
@click.option("--batch-size", type=click.IntRange(min=2), help="Patients a step.  [default: 64]")
@click.option("--tiles", type=click.IntRange(min=1), help="Tiles of a slide in a view, at most.  [default: 768]")
@click.option("--width", type=click.IntRange(min=1), help="Width of the network.  [default: 768]")
@click.option(
    "--lr", type=click.FloatRange(min=0, min_open=True), help="Learning rate.  [default: 5e-4 a batch of 256]"
)
@click.option("--seed", type=click.IntRange(min=0), help="Of everything that is drawn.  [default: 0]")
@click.option("--device", help="auto, cpu, cuda or cuda:1.  [default: auto]")
def train(store: Path, out: Path, encoder: tuple[str, ...], table: Path | None, name: str | None, **values: Any) -> int:
    """Train a slide encoder on the features in OUT, without labels.

    It learns to tell that two handfuls of tiles are of one patient. Keep slides that you will test on out of OUT, as
    always. Run the same command again after an interruption, and it goes on; "found" is how often a view is told from
    those of the other patients of its batch, and should rise.

    \b
    wsi slide-encoder train OUT --encoder uni --encoder virchow2 --out own/
    """
    console = PatientConsole()
    with console.status("loading …"):  # torch alone takes seconds
        from features.store import FeatureStore
        from mil.predict import read_patients
        from mil.slide_encoders.contrastive import ENCODER_FILE, SlideTrainConfig, train_slide_encoder

        opened = FeatureStore(store)
        config = SlideTrainConfig(**{key: value for key, value in values.items() if value is not None})
        patients = None if table is None else read_patients(table, opened)
    with Bar(console, "training", config.epochs, "epochs") as bar:

        def done(epoch: "TrainingEpoch") -> None:
            bar.step(epoch.epoch, f"loss {epoch.loss:.3f}, found {epoch.found:.0%}")
            if not console.is_terminal and (epoch.epoch % 10 == 0 or epoch.epoch in (1, config.epochs)):
                say(console, f"epoch {epoch.epoch} of {config.epochs}: loss {epoch.loss:.3f}, found {epoch.found:.0%}")

        loaded = train_slide_encoder(
            opened, encoder, config, out=out, patients=patients, name=name or out.resolve().name, done=done
        )
    say(console, f"{loaded.spec.name}: {loaded.spec.source}")
    say(
        console,
        f"encoder: {out / ENCODER_FILE}  (wsi slide-encoder embed {store} --model {out / ENCODER_FILE} uses it)",
    )
    return 0
