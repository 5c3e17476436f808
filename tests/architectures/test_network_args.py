from __future__ import annotations

import pytest

from library.architectures.network_args import patterns_reader, rates_reader, read_bool, read_network_args, read_rank
from library.errors import UserError
from networks.lora import check_network_args


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
        ({"down_lr_weight": "sin"}, 'or be one of sine, .*did you mean "sine"'),
        ({"down_lr_weight": "sine+much"}, '"much" must be a number'),
        ({"down_lr_weight": "1,1"}, "must have 12 comma-separated values, has 2"),
        ({"mid_lr_weight": "sine"}, "must be a number"),
        ({"network_reg_dims": "attn"}, '"attn" is not pattern=value'),
        ({"network_reg_dims": "attn=a"}, 'the value of "attn", "a", must be a whole number'),
        ({"network_reg_dims": "(=4"}, "no regular expression"),
        ({"network_reg_dims": ""}, "must have pattern=value"),
        ({"network_reg_lrs": "attn=-1"}, "at least 0"),
        ({"dora_on_output": "True"}, "no effect without dora=True"),
        ({"dora": "maybe"}, "true or false"),
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


@pytest.mark.parametrize(
    ("text", "first", "middle", "last"),
    [
        # a quarter of the wave over three blocks: sin 45 degrees in the middle
        ("sine", 0.0, 0.5**0.5, 1.0),
        ("cosine", 1.0, 0.5**0.5, 0.0),
        ("linear", 0.0, 0.5, 1.0),
        ("reverse_linear", 1.0, 0.5, 0.0),
        ("zeros", 0.0, 0.0, 0.0),
        ("cosine+.25", 1.25, 0.25 + 0.5**0.5, 0.25),
        ("zeros + 1", 1.0, 1.0, 1.0),
        ("1, 2,3", 1.0, 2.0, 3.0),
    ],
)
def test_block_rates_are_lists_or_curves(text, first, middle, last):
    assert rates_reader(3)(text) == pytest.approx((first, middle, last), abs=1e-12)


@pytest.mark.parametrize(("text", "zero", "one"), [("cosine", -1, 0), ("reverse_linear", -1, 0), ("sine", 0, -1)])
@pytest.mark.parametrize("count", [2, 9, 12])
def test_curves_end_at_exactly_0_and_1(text, zero, one, count):
    rates = rates_reader(count)(text)
    assert rates[zero] == 0.0 and rates[one] == 1.0


def test_the_first_pattern_found_in_a_name_wins():
    values = patterns_reader(read_rank)(r"attn_to_(q|k)$=8,attn=4, x{1,2}_=2,(?=mlp)m=0")
    assert values.value_of("lora_unet_attn_to_q") == 8
    assert patterns_reader(read_rank)("attn=4,attn_to_q=8").value_of("lora_unet_attn_to_q") == 4
    assert values.value_of("lora_unet_attn_to_out_0") == 4
    assert values.value_of("lora_unet_xx_") == 2
    assert values.value_of("lora_te_mlp_fc1") == 0
    assert values.value_of("lora_unet_proj_in") is None
    with pytest.raises(UserError, match=r'network_reg_dims: "x\{1,2\}_" is in none of the 2 module names'):
        values.refuse_idle("network_reg_dims", ["attn_to_q", "mlp"])
