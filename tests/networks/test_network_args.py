from __future__ import annotations

import pytest

from library.errors import UserError
from networks.lora import check_network_args
from networks.network_args import read_bool, read_network_args


@pytest.mark.parametrize("text", ["true", "True", "1", "yes", "ON"])
def test_true_words(text):
    assert read_bool(text) is True


@pytest.mark.parametrize("text", ["false", "False", "0", "no", "off"])
def test_false_words_are_false(text):
    assert read_network_args({"enable": text}, {"enable": read_bool}, "m") == {"enable": False}


@pytest.mark.parametrize("text", ["", "none", "flase", "2"])
def test_other_words_are_refused(text):
    with pytest.raises(UserError, match="enable.*must be true or false"):
        read_network_args({"enable": text}, {"enable": read_bool}, "m")


def test_unknown_key_gets_a_suggestion_and_all_problems_are_told():
    with pytest.raises(UserError) as caught:
        check_network_args({"conv_dmi": "4", "rank_dropout": "1.5", "module_dropout": "a"})
    lines = str(caught.value).splitlines()
    assert len(lines) == 3
    assert 'did you mean "conv_dim"' in lines[0]
    assert "rank_dropout" in lines[1] and "less than 1" in lines[1]
    assert "module_dropout" in lines[2] and "number" in lines[2]


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ({"conv_alpha": "1"}, "no effect without conv_dim"),
        ({"conv_block_alphas": ",".join(["1"] * 25)}, "no effect without conv_dim"),
        ({"block_lr_zero_threshold": "0.1"}, "no effect without one of"),
        ({"block_dims": "4,4"}, "must have 25 comma-separated values, has 2"),
        ({"down_lr_weight": "sine"}, "must have 12 comma-separated values"),
        ({"block_dims": ",".join(["4"] * 24 + ["x"])}, 'value 25 \\("x"\\) must be a whole number'),
        ({"conv_dim": "4.5"}, "whole number"),
        ({"loraplus_lr_ratio": "0"}, "greater than 0"),
    ],
)
def test_wrong_values_and_keys_without_effect_are_refused(args, said):
    with pytest.raises(UserError, match=said):
        check_network_args(args)


def test_absent_values_count_as_not_given():
    check_network_args({"dropout": None, "conv_dim": None})
