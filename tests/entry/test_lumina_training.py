"""``lumina_train_network.py`` and ``lumina_train.py``: a step against a plain loop, and what only this family has."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from library.architectures.common.joined_layout import join
from library.architectures.lumina import LUMINA as ARCHITECTURE
from library.architectures.lumina.names import diffusers_plan
from library.diffusion.flow import resolution_shift, shift_sigma
from library.diffusion.objective import TimestepRange
from tests.architectures.lumina.opened import diffusers_transformer, opened
from tests.entry.flux.test_step import CAPTIONS, Drawn, drawn, images  # noqa: F401
from tests.fixtures.families import LUMINA, Tiny
from tests.fixtures.runs import logged, make_images, write_dataset
from tests.fixtures.tiny_lumina import TOKENIZER, LuminaFileSizes, MadeLumina, make_tiny_lumina
from tests.fixtures.whole import Whole

pytestmark = pytest.mark.usefixtures("own_root_logger")

SYSTEM = "You paint."
LENGTH = 48


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> MadeLumina:
    return make_tiny_lumina(tmp_path_factory.mktemp("lumina"), sizes=LuminaFileSizes(layers=5))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    return write_dataset(folder / "data.toml", make_images(folder / "images", ((64, 64), (64, 64), (96, 48))))


# ---- a step ----


def gemma_states(made: MadeLumina, texts: list[str]) -> tuple[Tensor, Tensor]:
    """Return the states of transformers' Gemma2 before its last layer, and the mask."""
    from transformers import AutoTokenizer, Gemma2Config, Gemma2Model

    sizes, state = LuminaFileSizes(), load_file(str(made.gemma2))
    config = Gemma2Config(
        vocab_size=sizes.vocabulary, hidden_size=sizes.caption, intermediate_size=sizes.gemma_inner,
        num_hidden_layers=sizes.gemma_layers, num_attention_heads=sizes.gemma_heads,
        num_key_value_heads=sizes.gemma_kv_heads, attn_implementation="eager",
    )  # fmt: skip
    model = Gemma2Model(config).eval()
    model.load_state_dict({name.removeprefix("model."): tensor for name, tensor in state.items()})
    tokenizer = AutoTokenizer.from_pretrained(made.tokenizer_cache_dir / TOKENIZER)
    tokenizer.padding_side = "right"
    given = tokenizer(texts, padding="max_length", max_length=LENGTH, truncation=True, return_tensors="pt")
    with torch.no_grad():
        output = model(given.input_ids, attention_mask=given.attention_mask, output_hidden_states=True)
    return output.hidden_states[-2], given.attention_mask


def test_a_step_is_that_of_a_plain_loop_over_diffusers_model(tmp_path: Path, drawn: Drawn) -> None:  # noqa: F811
    """The loss and every gradient: with plain SGD at a rate of 1 a weight moves by its gradient."""
    made = make_tiny_lumina(tmp_path / "model")
    data = write_dataset(tmp_path / "d.toml", images(tmp_path / "images"), dataset="batch_size = 2")
    Whole("lumina_train", LUMINA, made).train(
        data, tmp_path, optimizer_type="torch.optim.SGD", learning_rate=1.0, max_grad_norm=0, max_train_steps=1,
        system_prompt=SYSTEM, gemma2_max_token_length=LENGTH, timestep_sampling="nextdit_shift",
    )  # fmt: skip
    captions = [CAPTIONS[int(Path(path).stem)] for path in drawn.paths]
    states, mask = gemma_states(made, [f"{SYSTEM} <Prompt Start> {caption}" for caption in captions])
    assert len(set(mask.sum(dim=1).tolist())) == 2, "captions of different length"
    family, checkpoint = opened(made)
    model = diffusers_transformer(family.load_denoiser(checkpoint, dtype=torch.float32, device="cpu"))
    model.requires_grad_(True)
    (latents,), (times,), (noise,) = drawn.latents, drawn.timesteps, drawn.noise
    sigma = (times / 1000).view(-1, 1, 1, 1)
    noisy = (1 - sigma) * latents + sigma * noise
    output = model(noisy, 1 - times / 1000, states, mask.bool(), return_dict=False)[0]
    loss = F.mse_loss(output, latents - noise)
    loss.backward()
    assert logged(tmp_path, "loss/current") == pytest.approx([loss.item()], rel=1e-6)
    before, after = load_file(made.path), load_file(tmp_path / "tiny.safetensors")
    moved = {name: (before[name].double() - after[name].double()).float() for name in before}
    assert not moved.pop("norm_final.weight").any(), "nothing uses it"
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    plan = diffusers_plan({name: tuple(grad.shape) for name, grad in gradients.items()})
    assert plan.keys() == moved.keys()
    for name in plan:
        torch.testing.assert_close(moved[name], join(plan, name, gradients.get), rtol=1e-4, atol=1e-6, msg=name)


def test_densities_of_noise_levels() -> None:
    """nextdit_shift is uniform, moved by the number of image tokens."""
    objective = ARCHITECTURE.changed(
        ARCHITECTURE.declaration.groups["flow"], timestep_sampling="nextdit_shift"
    ).objective(v_prediction=False, zero_terminal_snr=False)
    density = objective.density(TimestepRange(), (128, 128))
    for share in (0.1, 0.5, 0.9):
        assert density.quantile(share) == pytest.approx(shift_sigma(share, resolution_shift(4096)))


# ---- runs ----


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "tiny.safetensors")


def test_swapped_blocks_change_no_number(tmp_path: Path, made: MadeLumina, dataset: Path) -> None:
    tiny = Tiny(LUMINA, made)
    tiny.train(dataset, tmp_path / "plain", gradient_checkpointing=True)
    tiny.train(dataset, tmp_path / "swapped", blocks_to_swap=3)
    plain, swapped = weights(tmp_path / "plain"), weights(tmp_path / "swapped")
    assert plain.keys() == swapped.keys() and all(torch.equal(plain[name], swapped[name]) for name in plain)


def test_another_system_prompt_makes_the_caches_again(tmp_path: Path, made: MadeLumina) -> None:
    folder = make_images(tmp_path / "images", ((64, 64),))
    data = write_dataset(tmp_path / "data.toml", folder)
    tiny, found = Tiny(LUMINA, made), []
    for number, system in enumerate(("", SYSTEM, SYSTEM)):
        tiny.train(
            data, tmp_path / str(number), cache_text_encoder_outputs_to_disk=True, network_train_unet_only=True,
            max_train_steps=1, system_prompt=system, gemma2_max_token_length=LENGTH,
        )  # fmt: skip
        (file,) = folder.glob("*_lumina_te.npz")
        found.append((np.load(file)["attention_mask"].sum(), file.stat().st_mtime_ns))
    (plain, _), (system, made_at), (again, kept_at) = found
    assert plain < system == again and made_at == kept_at


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"network_args": ["split_qkv=True", "rank_dropout=0.1"]}, id="split with rank dropout"),
        pytest.param({"network_args": ["dora=True", "train_blocks=refiners"]}, id="DoRA of the refiners"),
        pytest.param({"network_train_text_encoder_only": True, "gradient_checkpointing": True}, id="Gemma2 alone"),
        pytest.param({"mixed_precision": "bf16", "fp8_base": True, "network_train_unet_only": True}, id="fp8"),
        pytest.param({"gradient_checkpointing": True, "cpu_offload_checkpointing": True}, id="offloaded"),
        pytest.param({"mem_eff_attn": True, "timestep_sampling": "sigma", "weighting_scheme": "mode"}, id="mode"),
        pytest.param({"network_module": "networks.oft"}, id="another module"),
    ],
)
def test_adapters_train(
    tmp_path: Path, made: MadeLumina, dataset: Path, settings: dict[str, object], capsys: pytest.CaptureFixture[str]
) -> None:
    """And a second run goes on with the file; modules for U-Nets are refused."""
    tiny = Tiny(LUMINA, made)
    if settings.get("network_module"):
        with pytest.raises(SystemExit):
            tiny.train(dataset, tmp_path, **settings)
        assert "networks.lora_lumina" in capsys.readouterr().err
        return
    tiny.train(dataset, tmp_path / "one", **settings)
    first = weights(tmp_path / "one")
    ups = [tensor for name, tensor in first.items() if name.endswith("lora_up.weight")]
    # Gemma2's last layer is not used
    unused = [name for name in first if name.startswith("lora_te_layers_2_") and name.endswith("lora_up.weight")]
    assert sum(bool(up.any()) for up in ups) == len(ups) - len(unused)
    tiny.train(dataset, tmp_path / "two", network_weights=tmp_path / "one" / "tiny.safetensors", **settings)
    assert first.keys() == weights(tmp_path / "two").keys()


@pytest.mark.parametrize(
    ("script", "settings", "words"),
    [
        ("lumina_train_network", {"use_sage_attn": True}, "--use_sage_attn: its attention has no backward pass"),
        ("lumina_train_network", {"use_flash_attn": True}, "--use_flash_attn: the package flash_attn is not installed"),
        ("lumina_train_network", {"blocks_to_swap": 4}, "--blocks_to_swap 4: the model has 5 blocks, of which 3 can"),
        ("lumina_train_network", {"gemma2_max_token_length": 0}, "--gemma2_max_token_length 0: must be at least 1"),
        ("lumina_train_network", {"timestep_sampling": "nextdit"}, 'did you mean "nextdit_shift"'),
        ("lumina_train_network", {"network_args": ["mlp_dims=4"]}, "mlp_dims"),
        ("lumina_train", {"gemma2": "nothing.safetensors"}, "--gemma2 nothing.safetensors: no such file"),
        ("lumina_train", {"save_model_as": "diffusers"}, "--save_model_as"),
    ],
)
def test_mistakes_are_named(
    tmp_path: Path, made: MadeLumina, dataset: Path, script: str, settings: dict[str, object], words: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    run = Tiny(LUMINA, made) if script == "lumina_train_network" else Whole(script, LUMINA, made)
    with pytest.raises(SystemExit) as ended:
        run.train(dataset, tmp_path, **settings)
    assert ended.value.code == 2 and words in capsys.readouterr().err
