"""Keyed randomness: equal keys give equal draws, any different part gives others."""

import pytest
import torch

from library.randomness import key, permutation, python_rng, torch_generator, visit_key


def test_keys_depend_on_every_part_and_its_type() -> None:
    parts = [(1, "a"), (1, "b"), (2, "a"), ("1", "a"), ("a", 1), (1, "a", 0), ("1a",), (12,), (1, 2)]
    keys = [key(*each) for each in parts]
    assert len(set(keys)) == len(keys)
    assert all(0 <= k < 2**63 for k in keys)
    assert key(1, "a") == key(1, "a")


def test_keys_are_stable_over_releases() -> None:
    # a resumed run of an older release must draw the same numbers
    assert key(42, "visit", 0) == 2089275949620722253


def test_names_of_files_that_are_no_utf_8_are_parts_too() -> None:
    # how Python hands out names in another encoding, such as those of old archives
    assert len({key("caf\udce9.png"), key("caf\udcea.png"), key("café.png")}) == 3


def test_only_int_and_str() -> None:
    for part in (1.0, True, None):
        with pytest.raises(TypeError):
            key(part)


def test_draws() -> None:
    first, again = (torch.randn(4, generator=torch_generator(1, "x")) for _ in range(2))
    assert torch.equal(first, again)
    assert python_rng(1, "x").random() == python_rng(1, "x").random() != python_rng(2, "x").random()
    assert sorted(permutation(50, 1, "order")) == list(range(50))
    assert permutation(50, 1, "order") != permutation(50, 2, "order")


def test_visits_differ() -> None:
    visits = {visit_key(7, e, d, r, n) for e in range(3) for d in range(2) for r in range(5) for n in range(2)}
    assert len(visits) == 60
