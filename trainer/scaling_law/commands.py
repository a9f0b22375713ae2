"""The command `law`."""

from __future__ import annotations

from pathlib import Path

import click

from trainer.common.errors import UserError
from trainer.common.strict_json import dumps
from trainer.config.options import json_option

_PICTURE = "law.png"


@click.command(short_help="Fit the loss against pool size, active parameters and depth.")
@click.argument("sources", nargs=-1, required=True, metavar="RESULT...", type=click.Path(exists=True, path_type=Path))
@click.option("--variant", "variants", multiple=True, metavar="NAME", help="Use only this variant; can be repeated.")
@click.option(
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE.png",
    help=f"File for the picture, also written as .svg; default: {_PICTURE} beside the first result.",
)
@json_option
def law(sources: tuple[Path, ...], variants: tuple[str, ...], out: Path | None, as_json: bool) -> None:
    """Fit a law of the validation loss over pool size, active parameters and depth to the results of finished sweeps.

    RESULT is the folder of a sweep, or its result.json. Variants of one method (sharing, router, balance loss) are a
    family, and every family with enough sizes gets a law with a term for each factor that varies. A law needs at least
    4 pool sizes, 2 more sizes for each further factor, and 3 values of every factor. A term is a power law only if it
    then predicts sizes that were left out better than a constant and a tenth better than a straight line, and if the
    interval of its exponent is bounded and above zero. Otherwise it is a straight line in the logarithm, or no
    dependence. Tokens trained, data and tokenizer must be the same in all results.

    \b
    Examples:
      unipool law runs/sweeps/small-figure-2a
      unipool law runs/sweeps/figure-2a-182m runs/sweeps/figure-2a-469m runs/sweeps/figure-2a-650m --out law.png
    """
    from trainer.common.figure_style import write_png_and_svg
    from trainer.scaling_law import result as law_result
    from trainer.scaling_law.plot import draw
    from trainer.scaling_law.points import read_families, result_file
    from trainer.scaling_law.report import print_law, to_json
    from trainer.telemetry.console import say

    out = out or result_file(sources[0]).with_name(_PICTURE)
    laws, skipped = [], []
    for family in sorted(read_families(sources, variants), key=lambda family: -len(family.points)):
        if len(family.points) > 1:
            say(f"fitting a law to {len(family.points)} points of {family.name}")
        try:
            laws.append(law_result.find_law(family, law_result.REPLICATES))
        except UserError as error:
            skipped.append(str(error))
    if not laws:
        raise UserError(skipped[0] if skipped else "law: no run with experts is finished, so there is nothing to fit")
    try:
        written = write_png_and_svg(draw(laws), out)
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror})") from None
    if as_json:
        print(dumps({"laws": [to_json(found) for found in laws], "not_fitted": skipped}))
        return
    for found in laws:
        print_law(found)
    for line in skipped:
        say(f"not fitted: {line}")
    say(f"written: {', '.join(map(str, written))}")
