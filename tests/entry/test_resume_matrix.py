"""Resume of a resume: each set of options is killed twice, and ends with the bits of a run that was left alone.

A kill is an exception out of the middle of a step, after which the run goes on from the last state that it saved.
``test_resume.py`` kills real processes.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.entry.test_resume import assert_same_weights
from tests.fixtures.families import Tiny
from tests.fixtures.killed import killed_in
from tests.fixtures.runs import make_images

STEPS = 9
KILLED_IN = (4, 7)  # steps of which nothing is left

ANEW = "shuffle_caption = true\nkeep_tokens = 1\ncaption_tag_dropout_rate = 0.2\n"
DROPPED = (
    ANEW + "caption_dropout_rate = 0.3\ncaption_dropout_every_n_epochs = 2\ntoken_warmup_step = 0.6\nflip_aug = true\n"
)
SCHEDULE = {"lr_scheduler": "cosine_with_restarts", "lr_scheduler_num_cycles": 2, "lr_warmup_steps": 2}
FREE = {"learning_rate": 1.0}

#: name -> (package, lines for every subset, options)
SETS: dict[str, tuple[str, str, dict[str, object]]] = {
    "AdamW, captions": ("torch", DROPPED, SCHEDULE),
    "AdamW8bit, accumulation": (
        "bitsandbytes", "", {"optimizer_type": "AdamW8bit", "gradient_accumulation_steps": 3, "network_dim": 16}
    ),
    "paged, noise": (
        "bitsandbytes", "", {
            "optimizer_type": "PagedAdamW", "noise_offset": 0.1, "noise_offset_random_strength": True,
            "ip_noise_gamma": 0.1, "multires_noise_iterations": 2, "min_snr_gamma": 5, "loss_type": "huber",
        },
    ),
    "SGDNesterov8bit": ("bitsandbytes", "", {"optimizer_type": "SGDNesterov8bit", **SCHEDULE}),
    "SGDNesterov, average": ("torch", ANEW, {"optimizer_type": "SGDNesterov", "ema_decay": 0.9}),
    "Lion, LoRA+": ("lion_pytorch", "", {"optimizer_type": "Lion", "network_args": ["loraplus_lr_ratio=4"]}),
    "DAdaptAdam": ("dadaptation", "", {"optimizer_type": "DAdaptAdam", **FREE}),
    "Prodigy, dropouts": (
        "prodigyopt", "", {
            "optimizer_type": "Prodigy", "network_dropout": 0.3,
            "network_args": ["rank_dropout=0.2", "module_dropout=0.2"], **FREE,
        },
    ),
    "Adafactor, relative": ("transformers", "", {"optimizer_type": "Adafactor", "max_grad_norm": 0}),
    "schedule-free, average of its own": (
        "schedulefree", "", {"optimizer_type": "AdamWScheduleFree", "optimizer_args": ["warmup_steps=2"]}
    ),
    "text cache with variants": (
        "torch", ANEW, {
            "network_train_unet_only": True, "cache_text_encoder_outputs": True, "text_encoder_cache_variants": 3,
        },
    ),
    "validation, best, patience": (
        "torch", "validation_split = 0.4\n", {
            "save_best": True, "early_stopping_patience": 8, "validate_every_n_steps": 1, "learning_rate": 0.02,
        },
    ),
    "bf16, checkpointing": (
        "torch", DROPPED, {"mixed_precision": "bf16", "gradient_checkpointing": True, "sdpa": True}
    ),
    "DoRA, norms, pixels": (
        "torch", "random_crop = true\ncolor_aug = true\n", {
            "network_args": ["dora=True"], "scale_weight_norms": 0.5, "cache_latents": None,
        },
    ),
    "a start in the middle": ("torch", ANEW, {"initial_step": 2, "gradient_accumulation_steps": 2}),
}  # fmt: skip

#: kept in the fast suite
FAST = "AdamW8bit, accumulation"


def two_datasets(folder: Path, lines: str) -> Path:
    """Datasets of two batch sizes, with three buckets, repeats and a regularization subset."""
    first, second = make_images(folder / "a"), make_images(folder / "b", sizes=[(64, 64), (96, 40)])
    common = "enable_bucket = true\nmin_bucket_reso = 32\nmax_bucket_reso = 128\nbucket_reso_steps = 32\n"
    subset = "[[datasets.subsets]]\ncaption_extension = '.txt'\n"
    path = folder / "data.toml"
    path.write_text(
        f"[[datasets]]\nresolution = 64\nbatch_size = 2\n{common}{subset}image_dir = '{first}'\n{lines}"
        f"[[datasets]]\nresolution = 48\nbatch_size = 3\n{common.replace('128', '64')}"
        f"{subset}image_dir = '{second}'\nnum_repeats = 2\n{lines}"
    )
    return path


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.every_family
@pytest.mark.parametrize("name", [n if n == FAST else pytest.param(n, marks=pytest.mark.slow) for n in SETS])
def test_killed_twice(
    tmp_path: Path,
    tiny: Tiny,
    name: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    package, lines, options = SETS[name]
    pytest.importorskip(package)
    dataset = two_datasets(tmp_path, lines)
    settings = {"max_train_steps": STEPS, "cache_latents": True, **options}
    if "network_args" in options:
        settings["network_args"] = [*options["network_args"], *tiny.family.network_args]
    saving = {"save_every_n_steps": 1, "save_state": True}
    tiny.train(dataset, tmp_path / "whole", **settings, **saving)

    resume: Path | None = None
    output = tmp_path / "out"
    for fatal in KILLED_IN:
        with killed_in(fatal):
            tiny.train(dataset, output, **settings, **saving, resume=resume)
        resume = output / f"tiny-step{fatal - 1:08d}-state"
        assert json.loads((resume / "train_state.json").read_text())["current_step"] == fatal - 1
        assert not (output / f"tiny-step{fatal:08d}-state").exists()
    tiny.train(dataset, output, **settings, **saving, resume=resume)

    whole, parts = ({p.name for p in folder.glob("*.safetensors")} for folder in (tmp_path / "whole", output))
    assert whole == parts, "step numbers and file names go on"
    for file in sorted(whole):
        assert_same_weights(output / file, tmp_path / "whole" / file)
    states = [
        json.loads((folder / "tiny-state/train_state.json").read_text()) for folder in (tmp_path / "whole", output)
    ]
    assert states[0] == states[1], "average loss, best validation and patience too"
    assert "not exactly" not in caplog.text
