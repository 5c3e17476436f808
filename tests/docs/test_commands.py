"""Every page's commands and files work together: a reader who types what stands there has a run, not an error."""

from __future__ import annotations

import importlib
import runpy
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tests.fixtures.pages import (
    PAGES,
    SHARED,
    Command,
    Stock,
    commands_of,
    files_of,
    furnish,
    make_stock,
    shortened_words,
)
from tests.fixtures.runs import ROOT, train_here

pytestmark = pytest.mark.usefixtures("own_root_logger")

COMMANDS = [command for page in PAGES for command in commands_of(page)]
#: options for which even a dry run needs something that is not here
ELSEWHERE = {"huggingface_repo_id": "the Hub", "resume_from_huggingface": "the Hub", "deepspeed": "DeepSpeed"}
#: values for the published sizes, and the same for the tiny models
TINY = {
    "train_single_block_indices=7,20-25": "train_single_block_indices=0-1",
    "128": "8",
    "transformer/diffusion_pytorch_model-00001-of-00003.safetensors": (
        "FLUX.1-dev/transformer/diffusion_pytorch_model-00001-of-00002.safetensors"
    ),
}
#: options that read what an earlier command of the page has written
NEED_A_RUN = ("resume", "replay")


@pytest.fixture(scope="session")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Stock:
    return make_stock(tmp_path_factory.mktemp("stock"))


@pytest.fixture(scope="session")
def tokenizers(tmp_path_factory: pytest.TempPathFactory, stock: Stock) -> Path:
    return stock.tokenizers(tmp_path_factory.mktemp("tokenizers"))


def module_of(script: str) -> ModuleType:
    return importlib.import_module(script.removesuffix(".py").replace("/", "."))


def trains(script: str) -> bool:
    """Whether a script is one of training: it makes its parser of what a family and a kind declare."""
    return "/" not in script and "script_parser(" in (ROOT / script).read_text(encoding="utf-8")


def has(command: Command, *names: str) -> bool:
    return any(f"--{name}" in command.words for name in names)


def is_part(command: Command) -> bool:
    """Whether the page shows options of training alone, which belong to a whole command elsewhere."""
    return "/" not in command.script and not has(
        command, "pretrained_model_name_or_path", "config_file", "dataset_config", "ckpt", "ckpt_path", "dit", "replay"
    )


def whole(command: Command) -> list[str]:
    """The command with what its page leaves to another: options alone stand for the first command of ``SHARED``."""
    if not is_part(command):
        return [TINY.get(word, word) for word in command.words]
    page = ROOT / "docs" / command.script.replace(".py", ".md")
    base = next(c for c in commands_of(page) if c.script == command.script)
    words = list(base.words)
    for flag in ("--network_dim", "--network_alpha", "--network_module"):
        if flag in command.words:
            place = words.index(flag)
            del words[place : place + 2]
    if "train_t5xxl=True" in command.words:
        words.remove("--network_train_unet_only")
        words.remove("--cache_text_encoder_outputs")
    return [*words, *(TINY.get(word, word) for word in command.words)]


# ---- quick: everything is read, and every run of training is checked without weights ----


def test_the_scripts_exist() -> None:
    assert not [str(command) for command in COMMANDS if not (ROOT / command.script).is_file()]


TRAINING = [c for c in COMMANDS if trains(c.script)]
CHECKED = [c for c in TRAINING if not has(c, *ELSEWHERE, *NEED_A_RUN, "debug_dataset")]


def test_most_commands_of_training_are_checked() -> None:
    assert len(CHECKED) >= 30
    assert len({c.page for c in CHECKED}) >= 8


@pytest.mark.parametrize(
    "command", [pytest.param(c, marks=[pytest.mark.slow] if is_part(c) else []) for c in CHECKED], ids=str
)
def test_a_dry_run_finds_no_fault(
    command: Command, tmp_path: Path, stock: Stock, tokenizers: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "lycoris.kohya" in command.words:
        pytest.importorskip("lycoris.kohya")
    furnish(tmp_path, ROOT / command.page, stock, small=False)
    monkeypatch.chdir(tmp_path)
    words = [*whole(command), "--dry_run", "--strict", "--tokenizer_cache_dir", tokenizers]
    train_here(*words, script=command.script.removesuffix(".py"))


@pytest.mark.parametrize("command", [c for c in COMMANDS if c not in TRAINING], ids=str)
def test_the_tool_takes_the_options(
    command: Command, tmp_path: Path, stock: Stock, monkeypatch: pytest.MonkeyPatch
) -> None:
    furnish(tmp_path, ROOT / command.page, stock, small=False)
    monkeypatch.chdir(tmp_path)
    module = module_of(command.script)
    if not hasattr(module, "setup_parser"):
        return  # of the examples; they have tests of their own
    if hasattr(module, "read_args"):
        module.read_args(module.setup_parser(), list(command.words))
    else:
        module.setup_parser().parse_args(list(command.words))


def test_the_shared_dataset_file_fits_cached_text_encoder_outputs() -> None:
    """Readers take it to the pages of SDXL and FLUX.1, whose commands cache these outputs."""
    text = files_of(SHARED)["dataset.toml"]
    for key in ("shuffle_caption", "caption_tag_dropout_rate", "enable_wildcard", "random_crop"):
        assert f"{key} = true" not in text


# ---- slow: every page from its first command to its last, on tiny models ----

#: pages that have a test of their own, which makes the files that they name
ELSEWHERE_RUN = {
    "docs/adapter_tools.md",  # tests/tools/test_adapter_tools_page.py
    "docs/captioning.md",  # tests/captioning/test_page.py
    "docs/tools.md",  # tests/tools/test_tools_page.py
}
WORKED = sorted({command.page for command in COMMANDS} - ELSEWHERE_RUN)


@pytest.mark.slow
@pytest.mark.parametrize("page", WORKED)
def test_the_page_works_from_top_to_bottom(
    page: str, tmp_path: Path, stock: Stock, tokenizers: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    furnish(tmp_path, ROOT / page, stock, small=True)
    monkeypatch.chdir(tmp_path)
    if any(word.startswith("quickstart_output/") for command in commands_of(ROOT / page) for word in command.words):
        run = ["--config_file", "examples/quickstart/lora.toml", "--max_train_steps", "2", "--lr_warmup_steps", "0"]
        train_here(*run, "--max_data_loader_n_workers", "0")
    for command in commands_of(ROOT / page):
        module = module_of(command.script)
        if has(command, *ELSEWHERE, "replay", "interactive") or command.processes > 1:
            continue  # these have tests of their own
        if (command in TRAINING and is_part(command)) or not hasattr(module, "setup_parser"):
            continue  # these too
        words = shortened_words(tuple(whole(command)))
        more = {"--max_data_loader_n_workers": "0", "--tokenizer_cache_dir": str(tokenizers), "--max_train_steps": "2"}
        if "examples/quickstart/lora.toml" not in words or "--lr_warmup_steps" in words:
            del more["--max_train_steps"]
        else:
            more["--lr_warmup_steps"] = "0"
        if command in TRAINING:
            added = [word for flag, value in more.items() if flag not in words for word in (flag, value)]
            train_here(*words, *added, script=command.script.removesuffix(".py"))
            continue
        known = {name for action in module.setup_parser()._actions for name in action.option_strings}
        if "--tokenizer_cache_dir" in known:
            words += ["--tokenizer_cache_dir", str(tokenizers)]
        monkeypatch.setattr(sys, "argv", [command.script, *words])
        assert code_of(command.script) in (0, 1), (
            command
        )  # 1: findings in images of noise; names that are right already


def code_of(script: str) -> int:
    """The exit code of a script that runs in this process, with the words of ``sys.argv``."""
    try:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0
