"""wsi remove, wsi gc: take a slide out of a store; delete what is left over."""

from pathlib import Path

import click

from features.store import FeatureStore
from features.writing import collect_garbage, replace_slide

__all__ = ["gc", "remove"]


@click.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.argument("slides", nargs=-1, required=True)
def remove(out: Path, slides: tuple[str, ...]) -> int:
    """Take SLIDES (relative paths, names or keys) out of the store OUT, so that the next run makes them anew.

    They are moved to OUT/.replaced, not deleted; wsi gc deletes them.
    """
    store = FeatureStore(out)
    for name in slides:
        key = store.key_of(name)
        click.echo(f"{name}: moved to {replace_slide(store, key)}")
    return 0


@click.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--keep-staging", is_flag=True, help="Keep the half-done work of interrupted runs, so that it is resumed."
)
def gc(out: Path, keep_staging: bool) -> int:
    """Delete what is left over in the store OUT: replaced slides, and the staged work of runs that no longer live."""
    freed = collect_garbage(FeatureStore(out), staging=not keep_staging)
    click.echo(f"{freed / 1e6:.1f} MB freed")
    return 0
