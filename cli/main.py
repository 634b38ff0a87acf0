"""wsi: the command with a verb for each thing."""

import click

from cli.encoders import encoders
from cli.extract import extract
from cli.info import info
from cli.phantom import phantom
from cli.predict import predict
from cli.prototypes import prototypes
from cli.remove import gc, remove
from cli.run import EXIT_CODES, run
from cli.search import search
from cli.segment import segment
from cli.slide_encoder import slide_encoder
from cli.train import train
from cli.tune import tune
from cli.verify import verify
from wsi._version import __version__

__all__ = ["main", "wsi"]


@click.group(epilog=f"Exit codes: {EXIT_CODES}", context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="wsi")
def wsi() -> None:
    """Whole-slide pathology: slides into feature stores, and what stands on them."""


for verb in (
    extract, train, tune, predict, prototypes, search, slide_encoder, segment,
    encoders, info, phantom, verify, remove, gc,
):  # fmt: skip
    wsi.add_command(verb)


def main() -> None:
    """Entry point of ``wsi``."""
    run(wsi, "wsi")
