"""Parts are loaded when they are used, and one at a time if wanted."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch import nn

from library.inference.parts import Parts


@pytest.mark.parametrize("one_at_a_time", [False, True])
def test_loading_and_freeing(one_at_a_time: bool) -> None:
    made: list[tuple[str, weakref.ref]] = []

    def alive() -> list[str]:
        return [name for name, part in made if part() is not None]

    def loader(name: str):
        def load() -> nn.Module:
            if one_at_a_time:
                assert not alive()
            module = nn.Linear(2, 2)
            module.itself = (module,)  # a cycle, as adapters make them
            made.append((name, weakref.ref(module)))
            return module

        return load

    parts = Parts({"a": loader("a"), "b": loader("b")}, one_at_a_time=one_at_a_time, device=torch.device("cpu"))
    assert made == []
    for name in ("a", "a", "b", "a"):
        assert parts.get(name) is parts.get(name)
    assert [name for name, _ in made] == (["a", "b", "a"] if one_at_a_time else ["a", "b"])
    assert alive() == (["a"] if one_at_a_time else ["a", "b"])
    assert len(parts.loaded) == (1 if one_at_a_time else 2)
    parts.free()
    assert alive() == [] and parts.loaded == []
