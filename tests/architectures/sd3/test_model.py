"""The transformer computes what diffusers' own code computes on the same weights, outputs and gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from library.architectures.sd3.model import MMDiT
from library.architectures.sd3.positions import PositionTables, cropped, random_crops, scaled_table
from library.architectures.sd3.sizes import infer_sizes
from library.errors import UserError
from library.randomness import Draw
from tests.fixtures.tiny_sd3 import FULL, MODELS, SD3FileSizes, transformer_shapes, transformer_tensors

H, W = 10, 14  # latent cells


def ours(sizes: SD3FileSizes) -> MMDiT:
    tensors = transformer_tensors(sizes)
    model = MMDiT(infer_sizes({name: tuple(tensor.shape) for name, tensor in tensors.items()}))
    model.load_state_dict(tensors)
    return model


def theirs(sizes: SD3FileSizes) -> nn.Module:
    """diffusers' model, loaded by diffusers' own conversion."""
    from diffusers import SD3Transformer2DModel
    from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers

    model = SD3Transformer2DModel(
        num_layers=sizes.depth,
        attention_head_dim=sizes.head,
        num_attention_heads=sizes.depth,
        joint_attention_dim=sizes.context,
        caption_projection_dim=sizes.hidden,
        pooled_projection_dim=sizes.pooled,
        pos_embed_max_size=sizes.grid,
        dual_attention_layers=sizes.dual,
        qk_norm="rms_norm" if sizes.qk_norm else None,
        sample_size=8,
    )
    model.load_state_dict(convert_sd3_transformer_checkpoint_to_diffusers(dict(transformer_tensors(sizes))))
    return model


def inputs(sizes: SD3FileSizes) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = ((2, 16, H, W), (2, 5, sizes.context), (2, sizes.pooled))
    latents, context, pooled = (torch.randn(shape, generator=generator).requires_grad_() for shape in shapes)
    return latents, torch.tensor([13.0, 970.5]), context, pooled


@pytest.mark.parametrize("model", MODELS)
def test_outputs_and_gradients_equal_diffusers(model: str) -> None:
    sizes = MODELS[model]
    latents, timesteps, context, pooled = inputs(sizes)
    leaves = (latents, context, pooled)
    found = ours(sizes)(latents, timesteps, context, pooled)
    expected = theirs(sizes)(latents, context, pooled, timesteps, return_dict=False)[0]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    pairs = (torch.autograd.grad(out.square().mean(), leaves) for out in (found, expected))
    for mine, other in zip(*pairs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-7)


def test_checkpointing_changes_nothing() -> None:
    sizes = MODELS["5-medium"]
    latents, timesteps, context, pooled = inputs(sizes)
    model = ours(sizes)
    plain = torch.autograd.grad(model(latents, timesteps, context, pooled).sum(), latents)[0]
    model.enable_gradient_checkpointing()
    again = torch.autograd.grad(model(latents, timesteps, context, pooled).sum(), latents)[0]
    torch.testing.assert_close(again, plain, rtol=0, atol=0)


@pytest.mark.parametrize("model", FULL)
def test_full_sizes_are_inferred(model: str) -> None:
    shapes = transformer_shapes(FULL[model])
    sizes = infer_sizes(shapes)
    assert (sizes.depth, sizes.heads, sizes.grid, sizes.version) == (
        FULL[model].depth, FULL[model].depth, FULL[model].grid, model,
    )  # fmt: skip
    with torch.device("meta"):
        made = MMDiT(sizes)
    assert {name: tuple(t.shape) for name, t in made.state_dict().items()} == shapes


# ---- positions ----


def test_the_scaled_table_holds_sines_and_cosines_of_column_and_row() -> None:
    edge, grid, width = 8, 12, 64
    table = scaled_table(float(edge), width, grid)
    coordinates = torch.arange(grid, dtype=torch.float64) * 16 / edge - 16 * (grid - edge) / (2 * edge)
    frequencies = 10_000 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    row, column = 3, 7
    angles = [coordinates[at] * frequencies for at in (column, row)]
    expected = torch.cat([half for angle in angles for half in (angle.sin(), angle.cos())]).float()
    torch.testing.assert_close(table[0, row * grid + column], expected, rtol=0, atol=1e-6)


def test_windows_are_random_where_asked_and_in_the_middle_elsewhere() -> None:
    grid, rows, columns = 12, 5, 7
    table = torch.arange(grid * grid, dtype=torch.float32).view(1, -1, 1)
    middle = cropped(table, rows, columns)
    assert middle[0, 0, 0] == 3 * grid + 2
    draw = Draw(tuple(range(400)))
    still = cropped(table, rows, columns, random_crops(draw, 0.0))
    assert torch.equal(still, middle.expand(400, -1, -1))
    moved = cropped(table, rows, columns, random_crops(draw, 1.0))[:, 0, 0]
    tops, lefts = moved.long() // grid, moved.long() % grid
    assert set(tops.tolist()) == set(range(grid - rows + 1)) and set(lefts.tolist()) == set(range(grid - columns + 1))
    half = cropped(table, rows, columns, random_crops(draw, 0.5))
    unmoved = sum(torch.equal(window, middle[0]) for window in half)
    assert 150 < unmoved < 260


def test_images_beyond_the_table_are_refused() -> None:
    with pytest.raises(UserError, match="an image of 208x80 pixels is larger than the model's table of positions"):
        cropped(torch.zeros(1, 144, 4), 5, 13)


def test_tables_go_by_the_area_of_images() -> None:
    tables = PositionTables.of([(512, 512), (1024, 1024), (1024, 1024)])
    assert tables.edges == (32.0, 64.0)
    limit = (32**2 + 64**2) // 2
    assert [tables.edge_for(n) for n in (16, 32 * 32, limit, limit + 1, 64 * 64, 96 * 96 + 1)] == [
        32,
        32,
        32,
        64,
        64,
        64,
    ]
    assert tables.table(32, 32, 16, "cpu").shape == (1, 48 * 48, 16)
    assert tables.table(10, 100, 16, "cpu").shape == (1, 150 * 150, 16), "a longer side has a table of its own"
