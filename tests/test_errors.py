"""Messages for users."""

from __future__ import annotations

from library.errors import did_you_mean


def test_a_suggestion_is_another_word() -> None:
    assert did_you_mean("networks.lor", ["networks.lora"]) == ' (did you mean "networks.lora"?)'
    assert did_you_mean("cat.png", ["cat.png"]) == ""
    assert did_you_mean("cat.png", ["cat.png", "cat.jpg"]) == ' (did you mean "cat.jpg"?)'
