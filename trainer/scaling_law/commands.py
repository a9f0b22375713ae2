"""`law` of the command line."""

from __future__ import annotations

from pathlib import Path

import click

from trainer.common.errors import UserError
from trainer.common.strict_json import dumps

_PICTURE = "law.png"


@click.command()
@click.argument("sources", nargs=-1, required=True, metavar="RESULT...", type=click.Path(exists=True, path_type=Path))
@click.option("--variant", "variants", multiple=True, metavar="NAME", help="Take only this variant; may be repeated.")
@click.option(
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE.png",
    help=f"The picture, and beside it .svg; default: {_PICTURE} beside the first result.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def law(sources: tuple[Path, ...], variants: tuple[str, ...], out: Path | None, as_json: bool) -> None:
    """Fit validation loss against the size of the pool, the active parameters and the depth of a sweep's runs.

    RESULT is a sweep's folder, or its result.json. Variants of one method (sharing, router, balance loss) are a family;
    each family with enough sizes has its law, with a term for every factor that varies: at least 4 pool sizes for a law
    of the pool, 2 more sizes for each factor besides. A term is a power law only if that predicts sizes left out a
    tenth better than a straight line, and better than a constant, and the exponent's interval is above zero and
    bounded; else a straight line or no dependence is what it says.
    Tokens trained, data and tokenizer must be the same.

    \b
    Examples:
      unipool law runs/sweeps/small-figure-2a
      unipool law runs/sweeps/figure-2a-182m runs/sweeps/figure-2a-469m runs/sweeps/figure-2a-650m --out law.png
    """
    from trainer.scaling_law import result as law_result
    from trainer.scaling_law.plot import write_picture
    from trainer.scaling_law.points import read_families, result_file
    from trainer.scaling_law.report import all_json, print_law
    from trainer.telemetry.console import say

    out = out or result_file(sources[0]).with_name(_PICTURE)
    families = sorted(read_families(sources, variants), key=lambda family: -len(family.points))
    laws, skipped = [], []
    for family in families:
        if len(family.points) > 1:
            say(f"fitting a law to {len(family.points)} points of {family.name}")
        try:
            laws.append(law_result.find_law(family, law_result.REPLICATES))
        except UserError as error:
            skipped.append(str(error))
    if not laws:
        raise UserError(skipped[0] if skipped else "no runs with experts are done: there is nothing to fit")
    try:
        written = write_picture(laws, out)
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror})") from None
    if as_json:
        print(dumps(all_json(laws, skipped)))
        return
    for found in laws:
        print_law(found)
    for line in skipped:
        say(f"not fitted: {line}")
    say(f"written: {', '.join(map(str, written))}")
