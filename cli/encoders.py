"""wsi encoders: which encoders are known by name."""

import click
from rich.table import Table

from cli.console import PatientConsole

__all__ = ["encoders"]


@click.command()
def encoders() -> int:
    """List the encoders that are known by name; beside them any timm model works as timm:MODEL."""
    from features.encoder import known_encoders

    table = Table(box=None, pad_edge=False)
    for column in ("name", "vector", "tile", "mpp", "weights", "licence"):
        table.add_column(column, overflow="fold")
    for spec in known_encoders():
        mpp = "any" if spec.mpp is None else f"{spec.mpp:g}"
        table.add_row(spec.name, str(spec.dim), f"{spec.tile_px} px", mpp, spec.hub_id or "none needed", spec.licence)
    PatientConsole().print(table, highlight=False)
    return 0
