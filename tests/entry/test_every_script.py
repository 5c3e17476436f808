"""Every script starts from nothing, in a process of its own."""

from __future__ import annotations

import pytest

from tests.fixtures.runs import ROOT, run_script

SCRIPTS = sorted(
    str(path.relative_to(ROOT))
    for folder in ("", "finetune", "networks", "tools")
    for path in (ROOT / folder).glob("*.py")
    if 'if __name__ == "__main__":' in path.read_text(encoding="utf-8")
)


def test_the_scripts_are_found() -> None:
    assert {"train_network.py", "gen_img.py", "tools/cache_latents.py", "networks/convert_lora.py"} <= set(SCRIPTS)


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_from_a_fresh_process(script: str) -> None:
    done = run_script(script, "--help", fresh=True)
    assert (done.code, done.err) == (0, "") and done.out.startswith("usage: ")
