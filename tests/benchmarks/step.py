"""A whole training step on two cores: UniPool, our own baselines, Hugging Face Qwen3-MoE and DeepSpeed's MoE.

All have the same active shape: at `--shape small` 8 layers, hidden 256, 4 heads, one SwiGLU of width 512 per token and
layer, vocabulary 2,048, and 8,192 tokens a step, with AdamW and clipping. UniPool has one pool of 64
experts and the other MoEs have 8 private experts per layer, so all of them have equally many parameters; dense has one
FFN per layer. With this width, trunk and pool take about equally long. On a cluster, the number of ranks of each role
would be chosen for that; two cores only allow 1 + 1.

Every contender is tried in several forms: two ranks of one thread or one rank of two threads, with torch.compile and
without, all with 4 micro-batches a step; then the fastest of them with fewer and larger ones, as long as that is faster
still. The fastest form is kept. `two_plus_two`, `colocated_4` and `every_rank_4` are UniPool's layouts on four ranks,
two of which share a core; they only run if they are named.

python -m tests.benchmarks.step [--shape 182m] [--precision bf16] [--only NAME] [--forms FILE] [--rounds 8] [--json]
"""

from __future__ import annotations

import os
import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import click
from tqdm import tqdm

from tests.benchmarks.contenders import Contender, ContenderFailed, end_in_order
from tests.benchmarks.peers import peers_python
from tests.benchmarks.report import print_report, ratios
from tests.benchmarks.step_forms import CONTENDERS, FOUR_RANKS, PRECISIONS, SHAPES, Form, KnownForms, contender

CORES = 2
TRIALS = 2
"""Steps for which a form is tried against the best one so far, alternately, after one step for warm-up."""

OUR_LAYOUTS = ("one_plus_one", "colocated", "every_rank")
RATIOS = {
    "colocated_over_vanilla": (("colocated",), ("vanilla",)),
    "colocated_over_dense": (("colocated",), ("dense",)),
    "vanilla_over_dense": (("vanilla",), ("dense",)),
    "one_plus_one_over_best_peer": (("one_plus_one",), ("hugging_face", "deepspeed_moe")),
    "one_plus_one_over_dense": (("one_plus_one",), ("dense",)),
    "every_rank_over_best_peer": (("every_rank",), ("hugging_face", "deepspeed_moe")),
    "best_layout_over_best_peer": (OUR_LAYOUTS, ("hugging_face", "deepspeed_moe")),
    "two_plus_two_over_every_rank_4": (("two_plus_two",), ("every_rank_4",)),
    "every_rank_4_over_colocated_4": (("every_rank_4",), ("colocated_4",)),
}
"""Ratios of speeds: the fastest of the first, by its median over the rounds, over the fastest of the second."""


@dataclass(frozen=True)
class Kept:
    """A contender in its fastest form.

    Attributes:
        slower: By how much the other forms were slower, or why they did not run.
    """

    form: Form
    contender: Contender
    slower: dict[Form, str]


def choose(forms: Sequence[Form], make: Callable[[Form], Contender], stack: ExitStack) -> Kept:
    """Try a contender in all its forms, and the fastest with larger micro-batches; keep the fastest alive on the stack.

    At most two are alive at the same time, because each may need gigabytes. A single form is kept as it is.

    Raises:
        ContenderFailed: It runs in none of its forms.
    """
    best: tuple[Form, Contender, ExitStack] | None = None
    slower: dict[Form, str] = {}
    waiting = list(forms)
    while waiting:
        form = waiting.pop(0)
        made = make(form)
        with ExitStack() as own:
            try:
                own.enter_context(made).run(steps=1)
            except ContenderFailed as error:
                slower[form] = f"failed: {_last_line(error)}"
            else:
                new = form, made, own.pop_all()
                if best is None:
                    best = new
                else:
                    theirs, ours = _alternately(best[1], made)
                    loser, best = (best, new) if ours < theirs else (new, best)
                    slower[loser[0]] = f"{min(ours, theirs) / max(ours, theirs):.2f} times as fast"
                    loser[2].close()
        larger = best[0].larger() if best and len(forms) > 1 and not waiting else None
        if larger and larger not in slower:
            waiting.append(larger)
    if best is None:
        raise ContenderFailed(f"{made.name} runs in no form: {'; '.join(slower.values())}")
    stack.push(best[2])
    return Kept(best[0], best[1], slower)


def _alternately(*contenders: Contender) -> tuple[float, ...]:
    """Return the seconds of every contender's fastest step."""
    seconds = [[made.run(steps=1) for made in contenders] for _ in range(TRIALS)]
    return tuple(map(min, zip(*seconds, strict=True)))


def _last_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or ["nothing said"])[-1]


def step_ratios(seconds: Mapping[str, Sequence[float]], precision: str) -> dict[str, list[float]]:
    """Return the named ratios of one precision, from the contenders' seconds per step, round by round.

    Ratios of contenders that were not measured are left out.
    """
    results = {}
    for name, (ours, theirs) in RATIOS.items():
        if seconds.keys() >= {*ours, *theirs}:
            fastest = (min((seconds[one] for one in group), key=statistics.median) for group in (theirs, ours))
            results[f"{name}_{precision}"] = ratios(*fastest)
    return results


def measure(
    names: Sequence[str],
    shape: str,
    precision: str,
    rounds: int,
    known: KnownForms,
    python: str,
    advance: Callable[[str], None],
) -> tuple[dict[str, list[float]], list[str]]:
    """Return every contender's seconds per step, round by round, and a note on each."""
    seconds: dict[str, list[float]] = {name: [] for name in names}
    kept: dict[str, Kept] = {}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        for name in names:
            advance(f"{precision} {name}")
            forms = known.to_try(name, shape, precision)
            make = partial(
                contender, name, shape=SHAPES[shape], precision=precision, python=python, folder=Path(folder)
            )
            kept[name] = choose(forms, make, stack)
            known.keep(name, shape, precision, kept[name].form)
        for _ in range(rounds):
            advance(f"{precision} rounds")
            for name in names:
                seconds[name].append(kept[name].contender.run(steps=1))
    return seconds, list(_notes(precision, SHAPES[shape].tokens, seconds, kept))


def _notes(precision: str, tokens: int, seconds: dict[str, list[float]], kept: dict[str, Kept]) -> Iterator[str]:
    for name, taken in seconds.items():
        note = f"{precision} {name}: {tokens / statistics.median(taken):,.0f} tokens/s, {kept[name].form}"
        tried = "; ".join(f"{form}: {what}" for form, what in kept[name].slower.items())
        yield note + (f" (tried: {tried})" if tried else "")


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--shape", default="small", show_default=True, type=click.Choice(list(SHAPES)), help="Shape of the model."
)
@click.option("--precision", "precisions", multiple=True, type=click.Choice(list(PRECISIONS)), help="Default: both.")
@click.option(
    "--only",
    "names",
    multiple=True,
    type=click.Choice([*CONTENDERS, *FOUR_RANKS]),
    help="Contenders; default: all that run on at most two ranks.",
)
@click.option(
    "--forms",
    type=click.Path(dir_okay=False, path_type=Path),
    help="File of the fastest forms: those in it are not searched again, others are added.",
)
@click.option("--rounds", default=8, show_default=True, type=click.IntRange(min=1), help="Interleaved rounds.")
@click.option("--json", "as_json", is_flag=True, help="Also print one JSON object at the end.")
def main(
    shape: str, precisions: Sequence[str], names: Sequence[str], forms: Path | None, rounds: int, as_json: bool
) -> None:
    """Measure whole training steps on two cores.

    The peers are first installed into an environment of their own.

    \b
    Example:
      python -m tests.benchmarks.step --precision bf16 --rounds 5 --json
    """
    python = peers_python()
    end_in_order()
    os.sched_setaffinity(0, set(sorted(os.sched_getaffinity(0))[:CORES]))  # processes that are started here inherit it
    precisions, names = precisions or list(PRECISIONS), names or list(CONTENDERS)
    known = KnownForms(forms)
    results: dict[str, list[float]] = {}
    notes: list[str] = []
    with tqdm(total=len(precisions) * (len(names) + rounds), dynamic_ncols=True) as bar:

        def advance(what: str) -> None:
            bar.set_description(what)
            bar.update()

        for precision in precisions:
            seconds, more = measure(names, shape, precision, rounds, known, python, advance)
            results |= step_ratios(seconds, precision)
            notes += more
    title = f"A training step on two cores, shape {shape}: ratios of tokens per second"
    print_report(title, f"python -m tests.benchmarks.step --shape {shape}", results, notes, as_json)


if __name__ == "__main__":
    main()
