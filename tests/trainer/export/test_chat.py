"""A tokenizer's chat template, special tokens and settings of generation reach the run's folder and its export."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

from tests.trainer.export.test_export import VOCAB, trained
from trainer.config.recipe import Recipe, load_recipe
from trainer.data.prepare import prepare_for
from trainer.data.tokenizer import chat_settings, train_tokenizer
from trainer.export.exported_model import load_export
from trainer.export.saved_run import find_run, load_run
from trainer.export.write import export
from trainer.telemetry.run_folder import RunFolder

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TALK = [{"role": "user", "content": "def main"}, {"role": "assistant", "content": "<|im_end|> return"}]
SPECIAL = ["<s>", "<pad>", "<|im_start|>", "<|im_end|>"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer for conversations, as transformers saves it: its answers end with <|im_end|>."""
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer = train_tokenizer(["def main(argument):\n    return argument\n"], VOCAB - len(SPECIAL))
    tokenizer.add_special_tokens(SPECIAL)
    saved = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="<|endoftext|>",
        pad_token="<pad>",
        extra_special_tokens=SPECIAL[2:],
        chat_template=TEMPLATE,
    )
    saved.save_pretrained(folder)
    assert (folder / "chat_template.jinja").read_text() == TEMPLATE
    ends = tokenizer.token_to_id("<|im_end|>")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ends, "top_p": 0.5, "do_sample": True}))
    return folder


def recipe_for(folder: Path, tmp_path: Path) -> Recipe:
    (tmp_path / "text.txt").write_text("def main(argument):\n    return argument\n" * 200)
    recipe = load_recipe(str(trained("dense")[0] / "checkpoints/step_00000001/recipe.yaml"))
    data = recipe.data.model_copy(
        update={"source": str(tmp_path / "text.txt"), "dir": str(tmp_path / "data"), "tokenizer": str(folder)}
    )
    run = recipe.run.model_copy(update={"dir": str(tmp_path / "new")})
    return recipe.model_copy(update={"data": data, "run": run})


def test_from_the_folder_to_the_runs_folder(folder: Path, tmp_path: Path) -> None:
    """The prepared data keep it: the tokenizer's folder need not be there when a run starts."""
    gone = tmp_path / "gone"
    shutil.copytree(folder, gone)
    prepared = prepare_for(recipe_for(gone, tmp_path), progress=False)
    shutil.rmtree(gone)
    run = RunFolder(recipe_for(folder, tmp_path))
    run.make()
    run.begin(recipe_for(folder, tmp_path), "{}", "CPU", prepared.tokenizer_files(), 0)
    chat = json.loads((run.path / "chat.json").read_text())
    assert chat == chat_settings(str(folder))
    assert chat["chat_template"] == TEMPLATE and chat["special_tokens"]["bos_token"] == "<s>"
    assert chat["generation"]["top_p"] == 0.5
    # Another template is another preparation, as another tokenizer is.
    settings = prepared.training[0][0].path.name
    shutil.copytree(folder, gone)
    (gone / "chat_template.jinja").write_text("{{ messages }}")
    assert prepare_for(recipe_for(gone, tmp_path), progress=False).training[0][0].path.name != settings


def test_from_the_run_to_its_export(folder: Path, tmp_path: Path) -> None:
    """transformers, and both loaders of this project, write a conversation as the tokenizer that was given."""
    run, out = tmp_path / "run", tmp_path / "hf"
    shutil.copytree(trained("dense")[0], run)
    (run / "tokenizer.json").write_text((folder / "tokenizer.json").read_text())
    (run / "chat.json").write_text(json.dumps(chat_settings(str(folder))))
    export(run, out, "hf", "float32")
    given = AutoTokenizer.from_pretrained(folder)
    want: dict[str, Any] = given.apply_chat_template(TALK, add_generation_prompt=True)
    text = given.apply_chat_template(TALK, tokenize=False)
    assert text.startswith("<s><|im_start|>user\ndef main<|im_end|>")
    found = [AutoTokenizer.from_pretrained(out), load_export(out)[1], load_run(find_run(run))[1]]
    for tokenizer in found:
        assert tokenizer.apply_chat_template(TALK, add_generation_prompt=True)["input_ids"] == want["input_ids"]
        assert tokenizer.apply_chat_template(TALK, tokenize=False) == text
        assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<s>", "<|endoftext|>", "<pad>")
        assert tokenizer.decode(want["input_ids"], skip_special_tokens=True).count("<|") == 0
        assert tokenizer("def main")["input_ids"] == given("def main")["input_ids"]
    ends = sorted(given.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"]))
    generation = GenerationConfig.from_pretrained(out)
    assert generation.eos_token_id == ends and (generation.top_p, generation.do_sample) == (0.5, True)
    for model in (load_export(out)[0], load_run(find_run(run))[0]):
        assert model.generation_config.eos_token_id == ends and not model.generation_config.do_sample
