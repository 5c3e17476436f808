"""From options to settings."""

from __future__ import annotations

import argparse

from library.config.arguments import TrainNetworkOptions
from library.training.settings import rates_of_parts


def test_every_option_that_gives_a_part_its_own_rate_is_named() -> None:
    def found(**given: object) -> list[str]:
        return rates_of_parts(TrainNetworkOptions.from_args(argparse.Namespace(**given)))

    assert found(network_args=["conv_dim=4", "dora=True"]) == []
    assert found(unet_lr=0.0, text_encoder_lr=[1e-4]) == ["--unet_lr", "--text_encoder_lr"]
    assert found(text_encoder_lr1=0.0, text_encoder_lr2=1e-4) == ["--text_encoder_lr1", "--text_encoder_lr2"]
    args = ["loraplus_lr_ratio=16", "up_lr_weight=sine", "network_reg_lrs=attn=1"]
    assert found(network_args=args) == ["loraplus_lr_ratio", "up_lr_weight", "network_reg_lrs"]
