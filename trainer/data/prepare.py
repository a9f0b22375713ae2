"""The data of a recipe: every source is tokenised and packed once, and later runs find the result.

Each source has a folder:

    <data.dir>/<source>-v<vocab>-s<seq_len>-<fingerprint>/
        train.arrow  validation.arrow  test.arrow  train-counts.npy  tokenizer.json  facts.json
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from trainer.common.errors import UserError
from trainer.common.strict_json import dumps
from trainer.config.recipe import Recipe
from trainer.config.sections import Source, Sources
from trainer.data.cache import make_once
from trainer.data.prepared_data import TOKENIZER_FILE, PreparedData, PreparedSource, open_prepared
from trainer.data.reading.documents import Progress
from trainer.data.settings import TRAIN, SourceSettings
from trainer.data.source_builder import SourceBuilder
from trainer.data.splitting import SPLITS, Parts, choose_splitter
from trainer.data.tokenizer import SMALLEST_VOCABULARY, train_tokenizer

TOKENIZER_SAMPLE_BYTES = 50_000_000
"""UTF-8 bytes of training text that a tokenizer is trained on."""

Mixture = list[tuple[SourceSettings, float]]
"""Sources, each with its share; shares add up to 1."""


def prepare_for(recipe: Recipe, progress: bool = True) -> PreparedData:
    """Prepare the recipe's data unless that has been done.

    Args:
        progress: Whether to show bars and notes on stderr.

    Raises:
        UserError: See `prepare_source`.
    """
    d = recipe.data
    train, validation, test = d.split
    training = _mixture(recipe, d.source, d.split if d.validation is None else (train + validation, 0, test))
    held_out = None if d.validation is None else _mixture(recipe, d.validation, (0, 1, 0))
    return prepare(training, held_out, progress)


def _mixture(recipe: Recipe, sources: Sources, split: Parts) -> Mixture:
    """The settings and the share of each source. `data.max_tokens` applies to what is trained on."""
    d, m = recipe.data, recipe.model
    listed = (Source(source=sources),) if isinstance(sources, str) else sources
    total = sum(s.weight for s in listed)
    return [
        (
            SourceSettings(
                source=s.source,
                tokenizer=d.tokenizer,
                vocab=m.vocab,
                seq_len=m.seq_len,
                split=split,
                text_field=s.text_field or d.text_field,
                max_documents=s.max_documents or d.max_documents,
                directory=d.dir,
                max_tokens=s.max_tokens or (d.max_tokens if split[0] else None),
                max_bad_share=d.max_bad_share,
                end_of_document=d.end_of_document,
            ),
            s.weight / total,
        )
        for s in listed
    ]


def prepare(training: Mixture, held_out: Mixture | None, progress: bool) -> PreparedData:
    """Prepare the data of a run unless that has been done.

    Args:
        held_out: Text for validation; None takes the validation splits of `training`.
        progress: Whether to show bars and notes on stderr.

    Raises:
        UserError: See `prepare_source`.
    """
    sources = [*training, *(held_out or [])]
    if training[0][0].tokenizer == TRAIN:
        tokenizer = _train_on(training, progress)
        sources = [(replace(settings, tokenizer=tokenizer), share) for settings, share in sources]
    own = tuple((prepare_source(settings, progress), share) for settings, share in sources[: len(training)])
    if held_out is None:
        return PreparedData(own, own)
    try:
        others = tuple((prepare_source(settings, progress), share) for settings, share in sources[len(training) :])
    except UserError as error:
        raise UserError(str(error).replace("data.source", "data.validation", 1)) from error
    return PreparedData(own, others)


def prepare_source(settings: SourceSettings, progress: bool) -> PreparedSource:
    """Return the prepared data of one source; make them first if they are not there.

    They are there if they were made with the same settings, source files (names, sizes, modification times) and
    tokenizer files; then nothing but their facts is read.

    Args:
        progress: Whether to show bars and notes on stderr.

    Raises:
        UserError: The input is bad (see `Documents` and `load_tokenizer`), the tokenizer does not fit into the model's
            vocabulary, a split has too little text for one sequence, or a folder cannot be written.
    """

    def fill(folder: Path) -> None:
        SourceBuilder(settings, folder, progress).run()

    name = f"{settings.short_name}-v{settings.vocab}-s{settings.seq_len}-{settings.fingerprint()}"
    prepared = open_prepared(make_once(Path(settings.directory).expanduser(), name, fill, progress))
    bad, documents = prepared.bad_records, sum(prepared.facts(split).documents for split in SPLITS)
    progress_then = Progress(documents=documents, records=bad.records, bad_records=bad.count, first_bad=list(bad.first))
    progress_then.refuse_bad_share(settings.max_bad_share)
    return prepared


def _train_on(sources: Mixture, progress: bool) -> str:
    """Train a tokenizer of `vocab` entries on the beginning of the training text; return its folder.

    Each source contributes its share of `TOKENIZER_SAMPLE_BYTES`.
    """
    vocab = sources[0][0].vocab
    if vocab < SMALLEST_VOCABULARY:
        raise UserError(
            f"model.vocab = {vocab}: a trained tokenizer has at least {SMALLEST_VOCABULARY} entries; set it to "
            f"{SMALLEST_VOCABULARY} or more"
        )

    def fill(folder: Path) -> None:
        from tqdm import tqdm

        def sample() -> Iterator[str]:
            for settings, share in sources:
                yield from _training_text(settings, int(TOKENIZER_SAMPLE_BYTES * share))

        bar = tqdm(sample(), "training the tokenizer", unit=" documents", disable=not progress)
        tokenizer = train_tokenizer(bar, vocab)
        (folder / TOKENIZER_FILE).write_text(tokenizer.to_str(pretty=True), encoding="utf-8")

    fingerprints = [(replace(settings, seq_len=0).fingerprint(), share) for settings, share in sources]
    digest = hashlib.sha256(dumps(fingerprints).encode()).hexdigest()[:12]
    directory = Path(sources[0][0].directory).expanduser()
    return str(make_once(directory, f"tokenizer-v{vocab}-{digest}", fill, progress))


def _training_text(settings: SourceSettings, size: int) -> Iterator[str]:
    """The beginning of a source's training text: whole documents or passages, until they have `size` UTF-8 bytes."""
    splitter = choose_splitter(settings.pieces(), settings.split)
    for piece in settings.pieces():
        for passage in splitter.assign(piece):
            if passage.split == "train":
                yield passage.text
                size -= len(passage.text.encode())
                if size <= 0:
                    return
