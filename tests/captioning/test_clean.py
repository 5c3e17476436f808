"""The rules that tidy tags and captions: each with the examples of its table, then together, then the script."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from finetune import clean_captions_and_tags
from library.captioning.clean import (
    CAPTION_EXAMPLES,
    CAPTION_RULES,
    TAG_RULES,
    TagRule,
    clean_caption,
    clean_tags,
    split,
)

pytestmark = pytest.mark.usefixtures("own_root_logger")


@pytest.mark.parametrize(("rule", "before", "after"), [(rule, *pair) for rule in TAG_RULES for pair in rule.examples])
def test_rules_of_tags(rule: TagRule, before: str, after: str) -> None:
    assert ", ".join(rule.apply(split(before))) == after


@pytest.mark.parametrize(("before", "after"), CAPTION_EXAMPLES)
def test_rules_of_captions(before: str, after: str) -> None:
    assert clean_caption(before) == after


def test_every_rule_of_captions_does_something() -> None:
    for rule in CAPTION_RULES:
        assert rule.apply(f"see {rule.old}") == f"see {rule.new}"
        assert rule.apply(f"see x{rule.old}") == f"see x{rule.old}"  # whole words alone


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (
            "2girls, long_hair, blonde_hair, black_hair, shirt, white_shirt, rating:safe",
            "2girls, long hair, white shirt",
        ),
        ("1boy, single_hair_bun, blue_eyes", "1boy, single hair bun, blue eyes"),
        ("3boys, ponytail, side_braid, red_eyes", "3boys, red eyes"),
        ("multiple_girls, short_sleeves, long_sleeves, hime_cut, bob_cut", "multiple girls"),
        ("", ""),
    ],
)
def test_all_rules_of_tags(before: str, after: str) -> None:
    assert clean_tags(before) == after
    assert clean_tags(after) == after


def run(*words: object) -> None:
    parser = clean_captions_and_tags.setup_parser()
    clean_captions_and_tags.main(parser.parse_args([str(word) for word in words]))


def test_the_script(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, target = tmp_path / "in.json", tmp_path / "out.json"
    entries = {
        "a": {"tags": "long_hair, hat", "caption": "a young woman", "train_resolution": [64, 64]},
        "b": {"tags": "hat"},
        "c": {"caption": "a cat"},
    }
    source.write_text(json.dumps(entries))
    run(source, target, "--dry_run")
    assert not target.exists() and "2 texts of 3 images changed" in capsys.readouterr().err
    run(source, target, "--debug")
    assert json.loads(target.read_text()) == {
        "a": {"tags": "long hair, hat", "caption": "a girl", "train_resolution": [64, 64]},
        "b": {"tags": "hat"},
        "c": {"caption": "a cat"},
    }
    shown = capsys.readouterr()
    assert "a: tags:\n  long_hair, hat\n  long hair, hat" in shown.out and "no tags: c" in shown.err
    run("folder", source, target)  # the old command line
    assert "not needed any more" in capsys.readouterr().err
    for words in (("a", "b", "c", "d"), (tmp_path / "none.json", target)):
        with pytest.raises(SystemExit) as end:
            run(*words)
        assert end.value.code == 2
    source.write_text('{"a": "b"}')
    with pytest.raises(SystemExit):
        run(source, target)
    assert 'must be {"image": {"caption"' in capsys.readouterr().err
