"""Network and learning-rate options without effect."""

from __future__ import annotations

from library.config.arguments import TrainNetworkOptions
from library.config.no_effect.declare import idle


@idle("text_encoder_lr", "text_encoder_lr1", "text_encoder_lr2", reason="with --network_train_unet_only")
def text_encoders_are_frozen(o: TrainNetworkOptions) -> bool:
    return o.network.network_train_unet_only


@idle("unet_lr", reason="with --network_train_text_encoder_only")
def denoiser_is_frozen(o: TrainNetworkOptions) -> bool:
    return o.network.network_train_text_encoder_only


@idle("learning_rate", reason="where all that is trained has a rate of its own (--unet_lr, --text_encoder_lr)")
def every_part_has_its_rate(o: TrainNetworkOptions) -> bool:
    has_unet = o.optimizer.unet_lr is not None or o.network.network_train_text_encoder_only
    numbered = o.optimizer.text_encoder_lr1 is not None and o.optimizer.text_encoder_lr2 is not None
    has_text = bool(o.optimizer.text_encoder_lr) or numbered or o.network.network_train_unet_only
    return has_unet and has_text


@idle("network_dim", "network_alpha", reason="with --dim_from_weights, which takes ranks and alphas from the file")
def ranks_come_from_the_file(o: TrainNetworkOptions) -> bool:
    return o.network.dim_from_weights


@idle("network_weights", reason="with --resume, whose state holds the weights")
def weights_come_from_the_state(o: TrainNetworkOptions) -> bool:
    return bool(o.resume.resume) and not o.network.dim_from_weights
