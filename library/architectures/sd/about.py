"""Names of the files and scripts of Stable Diffusion 1.x and 2.x."""

from __future__ import annotations

from library.architectures.signs import About, Recognised, Sign

_USE = (
    "use train_network.py, fine_tune.py, train_db.py, train_textual_inversion.py, train_textual_inversion_XTI.py, "
    "train_control_net.py or train_control_net_lllite.py"
)

ABOUT = About(
    instance="SD",
    script="train_network",
    training=_USE,
    images="use gen_img.py",
    title="Stable Diffusion 1.x and 2.x",
    tool_flag="",
    signs=(
        Sign(
            ("cond_stage_model.", "diffusion_model.input_blocks."),
            Recognised("a Stable Diffusion 1.x or 2.x checkpoint", _USE, "sd"),
        ),
    ),
    pipelines=(("StableDiffusion", Recognised("a Stable Diffusion 1.x or 2.x model", _USE, "sd")),),
    adapter_keys=("sd2", "sd"),
    in_gen_img=True,
)
