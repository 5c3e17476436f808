"""Modules change their place in ``library/memory/`` alone, and idle ones are not on the device."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from library.memory.placing import STAYS, stage
from tests.fixtures.runs import ROOT, run_script

#: names that whole modules have in the library
_MODULES = {
    "adapter", "controlnet", "denoiser", "encoder", "model", "module", "network", "text_encoder", "transformer", "unet",
    "upscaler", "vae",
}  # fmt: skip
#: moves elsewhere, each with its reason; this list may only shrink
ELSEWHERE = {
    "library/training/kinds/adapter.py: model.to_empty(device='cpu')": "models without weights get memory, to be probed",
}


def moves(tree: ast.AST) -> Iterator[str]:
    """Yield the calls that move a whole module, as far as a file shows it.

    A tensor is not changed by ``to``, so a call whose result is not used moves a module. Other calls are known by the
    name of what they move, its annotation, or by ``eval`` and ``train``, which only modules have.
    """
    annotated = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        for argument in (*function.args.args, *function.args.kwonlyargs)
        if argument.annotation is not None and ast.unparse(argument.annotation).endswith("nn.Module")
        for node in ast.walk(function)
        if isinstance(node, ast.Name) and node.id == argument.arg
    }
    unused = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    asked = {
        id(node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and node.attr in ("eval", "train", "parameters", "modules")
    }
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        if node.func.attr not in ("to", "cpu", "cuda", "to_empty") or _keeps_its_place(node):
            continue
        moved = node.func.value
        while isinstance(moved, ast.Call) and isinstance(moved.func, ast.Attribute):
            if moved.func.attr in ("eval", "train"):
                asked.add(id(node))
            moved = moved.func.value
        name = moved.attr if isinstance(moved, ast.Attribute) else getattr(moved, "id", "")
        if name == "torch":  # a tensor that is made here
            continue
        if id(node) in unused | asked or id(moved) in annotated or name.lstrip("_") in _MODULES:
            yield ast.unparse(node)


def _keeps_its_place(call: ast.Call) -> bool:
    return not call.args and {keyword.arg for keyword in call.keywords} == {"memory_format"}


def test_one_folder_moves_modules() -> None:
    found = {
        f"{path.relative_to(ROOT).as_posix()}: {move}"
        for path in sorted((ROOT / "library").rglob("*.py"))
        if path.parent.name != "memory"
        for move in moves(ast.parse(path.read_text(encoding="utf-8")))
    }
    assert found == set(ELSEWHERE)


@pytest.mark.parametrize(
    "line",
    [
        "self._vae.to(device)", "x = network.to(device=device, dtype=dtype).eval()", "encoder.cpu()",
        "self.thing.cuda()", "return load().eval().to(place)", "ps = thing.to(device).parameters()",
        "def f(thing: nn.Module) -> None:\n    other = thing.to(place)",
    ],
)  # fmt: skip
def test_moves_are_found(line: str) -> None:
    assert len(list(moves(ast.parse(line)))) == 1


@pytest.mark.parametrize("line", ["x = latents.to(device)", "denoiser.to(memory_format=f)", "y = rows.cpu().numpy()"])
def test_moves_of_tensors_are_not(line: str) -> None:
    assert not list(moves(ast.parse(line)))


# ---- stages ----


def test_parts_that_stay_are_not_moved() -> None:
    encoder = nn.Linear(2, 2)
    setattr(encoder, STAYS, True)
    with stage(torch.device("meta"), encoder):
        assert encoder.weight.device.type == "cpu"


def test_parts_are_on_the_device_while_they_are_used() -> None:
    """On the stand-in accelerator, where tensors of different devices refuse to mix."""
    done = run_script("tests/fixtures/staged_parts.py")
    assert done.code == 0, done.text
    seen = json.loads(done.out)
    assert seen == {
        "encoding": {"text_encoder": ["standin"], "vae": ["cpu"]},
        "decoding": {"text_encoder": ["cpu"], "vae": ["standin"]},
        "after": {"text_encoder": ["cpu"], "vae": ["cpu"]},
        "after an error": {"text_encoder": ["cpu"], "vae": ["cpu"]},
        "same memory": True,
        "encoded on": "standin",
        "decoded on": "standin",
    }
