"""The command lines of the tools for images, captions and metadata have every published option, and few more."""

from __future__ import annotations

import importlib

import pytest

from tests.fixtures.file_tools import check_option, published_options

#: of all that go through images with a model
WORK = {"overwrite", "on_bad_image", "dry_run", "device"}
#: options that the published command line does not have
MORE = {
    "finetune/clean_captions_and_tags.py": {"dry_run", "more"},  # the last is the old command line's folder
    "finetune/make_captions.py": WORK,
    "finetune/make_captions_by_git.py": WORK,
    "finetune/merge_captions_to_metadata.py": {"dry_run"},
    "finetune/merge_dd_tags_to_metadata.py": {"dry_run"},
    "finetune/prepare_buckets_latents.py": {"dry_run", "device", "on_bad_image"},
    "finetune/tag_images_by_wd14_tagger.py": WORK,
    "tools/canny.py": set(),
    "tools/detect_face_rotate.py": {"face_model", "score"},
    "tools/resize_images_to_resolution.py": set(),
}
#: options that take a value in another way: published, --alpha_mask must have one
ELSE = {("finetune/prepare_buckets_latents.py", "alpha_mask")}


@pytest.mark.parametrize("tool", MORE)
def test_flags(tool: str) -> None:
    module = importlib.import_module(tool.removesuffix(".py").replace("/", "."))
    parser = module.setup_parser()
    actions = {action.dest: action for action in parser._actions if action.dest != "help"}
    published = published_options(tool)
    more = actions.keys() - {option["dest"] for option in published} - MORE[tool]
    # every family that has a flag of its own may have one here
    assert not more - _family_flags()
    for option in published:
        if (tool, option["dest"]) not in ELSE:
            check_option(actions[option["dest"]], option)
    places = [action.dest for action in parser._actions if not action.option_strings]
    assert [p for p in places if p != "more"] == [option["dest"] for option in published if not option["flags"]]
    if tool.startswith("finetune/prepare"):
        words = ["images", "in.json", "out.json", "vae"]
        assert parser.parse_args([*words, "--alpha_mask", "1"]).alpha_mask == "1"
        assert parser.parse_args([*words, "--alpha_mask"]).alpha_mask == "true"


def _family_flags() -> set[str]:
    from library.architectures.registry import tool_flags

    return set(tool_flags())
