"""The metadata of published files: a FLUX.1 or Chroma transformer, or an adapter for one."""

from __future__ import annotations

from library.architectures.flux.names import CHROMA, DEV, SCHNELL
from library.files.modelspec import build_modelspec

#: ModelSpec's names: architecture, implementation
IDS = {
    DEV: ("flux-1-dev", "https://github.com/black-forest-labs/flux"),
    SCHNELL: ("flux-1-schnell", "https://github.com/black-forest-labs/flux"),
    CHROMA: ("chroma", "https://huggingface.co/lodestones/Chroma"),
}


def model_metadata(kind: str, *, title: str, merged_from: str | None = None) -> dict[str, str]:
    """Return the ``modelspec.*`` entries of a transformer's file.

    Args:
        kind: ``DEV``, ``SCHNELL`` or ``CHROMA``.
        merged_from: the source files of a merged one.
    """
    return _modelspec(kind, "", title, merged_from)


def adapter_metadata(
    kind: str, *, rank: int | None, alpha: float | None, title: str, merged_from: str | None, modelspec: bool
) -> dict[str, str]:
    """Return the metadata of a LoRA file that was not trained: what loaders need, and ``modelspec.*``.

    Args:
        rank, alpha: ``None`` where modules differ.
        modelspec: whether to include those entries.
    """
    entries = {
        "ss_v2": "False",
        "ss_base_model_version": "chroma" if kind == CHROMA else "flux1",
        "ss_network_module": "networks.lora_flux",
        "ss_network_dim": "Dynamic" if rank is None else str(rank),
        "ss_network_alpha": "Dynamic" if alpha is None else str(float(alpha)),
    }
    return entries | (_modelspec(kind, "/lora", title, merged_from) if modelspec else {})


def _modelspec(kind: str, ending: str, title: str, merged_from: str | None) -> dict[str, str]:
    architecture, implementation = IDS[kind]
    return build_modelspec(
        architecture_id=architecture + ending,
        implementation=implementation,
        title=title,
        resolution=None,
        default_resolution="1024x1024",
        prediction_type=None,
        merged_from=merged_from,
    )
