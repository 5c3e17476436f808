"""Names of the files and scripts of Stable Diffusion XL."""

from __future__ import annotations

from library.architectures.signs import About, Recognised, Sign

_USE = (
    "use sdxl_train_network.py, sdxl_train.py, sdxl_train_textual_inversion.py, sdxl_train_control_net.py or "
    "sdxl_train_control_net_lllite.py"
)

ABOUT = About(
    instance="SDXL",
    script="sdxl_train_network",
    training=_USE,
    images="use gen_img.py --sdxl",
    title="Stable Diffusion XL",
    tool_flag="sdxl",
    signs=(
        Sign(
            ("conditioner.embedders.0.model.",),
            Recognised("the refiner of Stable Diffusion XL", "give the base model, or another checkpoint made from it"),
        ),
        Sign(("conditioner.embedders.",), Recognised("a Stable Diffusion XL checkpoint", _USE, "sdxl")),
        Sign(("diffusion_model.label_emb.",), Recognised("a Stable Diffusion XL U-Net", _USE)),
    ),
    pipelines=(("StableDiffusionXL", Recognised("a Stable Diffusion XL model", _USE, "sdxl")),),
    adapter_keys=("sdxl",),
    in_gen_img=True,
)
