"""Options of training text encoders, for families whose text encoders stay frozen when whole models are trained."""

from __future__ import annotations

from library.config.declaration import Declaration

_FROZEN = "with this model, whose text encoders are files of their own and are not trained with it"

FROZEN_ENCODERS = Declaration(
    unused=dict.fromkeys(
        ("learning_rate_te", "learning_rate_te1", "learning_rate_te2", "stop_text_encoder_training"), _FROZEN
    )
)
