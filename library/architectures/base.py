"""The interface of a model family, which is all that trainers know of its models.

A family's folder holds a subclass of ``Architecture`` and one instance of it (``SD``, ``SDXL``, ...).
Nothing outside the folder compares a family's name or class: this interface covers what differs.

Shape legend: B batch, C latent channels, (h, w) latent size, (H, W) pixels, T tokens, D features.
"""

from __future__ import annotations

import copy
import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from library.architectures.common import kl_vae
from library.architectures.conditioning import CaptionLength, Conditioning, Control, SampleFacts
from library.architectures.formats import LatentFormat, TextFormat
from library.architectures.lora_target import LoraTarget
from library.architectures.model_info import ModelInfo, WeightsIdentity
from library.architectures.part import DENOISER, VAE, text_encoder_name
from library.architectures.whole_models import WholeModels
from library.config.declaration import Declaration, Facts
from library.config.prompt_options import DDPM_FIELDS, TextRole
from library.memory.attention import attention_backend
from library.randomness import Draw

if TYPE_CHECKING:
    from typing_extensions import Self

    from library.config.arguments import RunOptions, TrainingOptions
    from library.config.image_settings import ImageSettings
    from library.diffusion.objective import Objective

O = TypeVar("O")


class Architecture(WholeModels, ABC):
    """A model family. Instances hold no weights and no state of a run."""

    name: str
    latent: LatentFormat
    text: TextFormat
    text_encoder_targets: tuple[LoraTarget, ...]  # one per text encoder, in the encoders' order
    denoiser_target: LoraTarget
    #: class names of the denoiser's blocks: ``--torch_compile`` compiles and FSDP shards each by itself
    compiled_blocks: tuple[str, ...] = ()
    #: its own groups of options with their rules, and what becomes of those of all families: they join the command
    #: line, the configuration file, ``--explain``, ``docs/options/`` and what a resumed run must share
    declaration: Declaration = Declaration()
    sample_defaults: Mapping[str, Any] = MappingProxyType({})  # width, height, steps, guidance scale of sample images
    #: settings of a sample prompt that are used, beside the declaration's prompt options; a warning names others
    sample_fields: frozenset[str] = DDPM_FIELDS
    #: settings that this model of the family does not use: field -> reason, completing "--g has no effect ..."
    idle_sample_fields: Mapping[str, str] = MappingProxyType({})
    #: whether a model of it reads the images of ``conditioning_data_dir``, which ``encode_control`` prepares
    takes_images: bool = False
    #: the option that sets how many tokens of a caption are read; empty for none
    length_option: str = "max_token_length"
    #: file of ``library/inference/features/`` with the guidance of its images
    guidance: str = "guidance"
    #: sample images of equal settings that are generated together
    sample_batch_size: int = 1
    sample_size_step: int = 8  # sides of sample images are multiples of this many pixels

    #: values of the family's own option groups; empty until it is configured. Instances never change, copies do
    _chosen: Mapping[str, Any] = MappingProxyType({})

    # ---- own options ----

    def facts(self, options: Any) -> Facts:
        """Return what rules ask where nothing is trained, as in tools; a kind of training has its own answers."""
        return Facts(trained_encoders=(False,) * len(self.text_encoder_targets))

    def configured(self, options: Any) -> Self:
        """Return this family with the values of its own options; the same instance if it has none.

        Args:
            options: option groups that contain all of its own, whatever the groups are called.
        """
        if not self.declaration.groups:
            return self
        groups = [getattr(options, f.name) for f in dataclasses.fields(options)]
        values = {f.name: getattr(group, f.name) for group in groups for f in dataclasses.fields(group)}
        found = {}
        for name, kind in self.declaration.groups.items():
            found[name] = kind(**{f.name: values[f.name] for f in dataclasses.fields(kind) if f.name in values})
        return self._with_chosen(found)

    def chosen(self, kind: type[O]) -> O:
        """Return the values of one of its own groups; the defaults, if it is not configured.

        Args:
            kind: the class in the declaration, or a base class of it.

        Raises:
            LookupError: it has no such group.
        """
        for name, group in self.declaration.groups.items():
            if issubclass(group, kind):
                return self._chosen[name] if name in self._chosen else group()
        raise LookupError(f"{self.name} has no options {kind.__name__}")

    def changed(self, kind: type[Any], **values: Any) -> Self:
        """Return a copy with other values for some options of ``chosen(kind)``."""
        name = next(name for name, group in self.declaration.groups.items() if issubclass(group, kind))
        group = dataclasses.replace(self.chosen(kind), **values)
        return self._with_chosen({**self._chosen, name: group})

    def normalized(self, options: O) -> O:
        """Return the options of a training run with the consequences of own options for others."""
        return options

    def _with_chosen(self, groups: dict[str, Any]) -> Self:
        made = copy.copy(self)
        made._chosen = groups
        return made

    def guidance_settings(self, settings: ImageSettings) -> Mapping[str, Any]:
        """Return what the family's guidance needs to know of an image beside its scale, by the names of the feature."""
        return {}

    def for_image(self, settings: ImageSettings) -> Self:
        """Return this family with the settings of one image, such as the guidance of its prompt."""
        return self

    # ---- files ----

    @abstractmethod
    def inspect(
        self,
        path_or_id: str,
        *,
        v2: bool,
        v_parameterization: bool,
        vae: str | None,
        tokenizer_cache_dir: str | None,
        disable_mmap: bool = False,
    ) -> Any:
        """Find and recognize a checkpoint from headers and configurations alone, in well under a second.

        Return the family's checkpoint object, which has ``info: ModelInfo``, ``path: str`` (the local file
        or folder, or the Hub id's local snapshot), and is passed back to the loaders below.

        Args:
            disable_mmap: read weights into memory instead of mapping their files.

        Raises:
            UserError: file missing, not a checkpoint of this family, torn, flags that contradict it, no tokenizer.
        """

    def for_model(self, checkpoint: Any) -> Self:
        """Return this family for a model that ``inspect`` found; families with one kind of model return themselves."""
        return self

    def for_resolutions(self, resolutions: Sequence[tuple[int, int]]) -> Self:
        """Return this family for data sets of these (width, height) in pixels, one for each."""
        return self

    # the loaders below also take the device "meta": they check the header's names and shapes and read no weights

    @abstractmethod
    def load_tokenizers(self, checkpoint: Any) -> list[Any]: ...

    def load_text_encoder(self, checkpoint: Any, index: int, *, dtype: torch.dtype, device: str) -> nn.Module:
        """Load one text encoder, frozen, in eval mode; ``index`` counts from 0, in the order of the targets."""
        return self.parts(checkpoint)[text_encoder_name(index + 1)].load(dtype=dtype, device=device)

    def load_text_encoders(self, checkpoint: Any, *, dtype: torch.dtype, device: str) -> list[nn.Module]:
        """Load all text encoders, in their order."""
        count = len(self.text_encoder_targets)
        return [self.load_text_encoder(checkpoint, index, dtype=dtype, device=device) for index in range(count)]

    def block_lists(self, denoiser: nn.Module) -> Sequence[Sequence[nn.Module]]:
        """Return the lists of the denoiser's repeated blocks, in the order in which they run; heavy blocks first.

        A denoiser whose blocks do not run strictly one after the other has none.
        """
        return ()

    @property
    def blocks_to_swap(self) -> int:
        """Return the number of the denoiser's blocks that wait in host memory, as its own option says."""
        return 0

    def live_encoders(self, trained: Sequence[bool]) -> tuple[bool, ...]:
        """For each text encoder, return whether it runs in each step where ``trained`` ones are trained.

        The outputs of the others may come from a cache. Families that encode with some encoders beside cached outputs
        of others have their own answer.
        """
        return (any(trained),) * len(trained)

    @property
    def fp8_encoders(self) -> tuple[int, ...]:
        """Return the text encoders, counted from 0, that its own options keep in fp8."""
        return ()

    def adapted_encoders(self, network: Any) -> tuple[bool, ...]:
        """For each text encoder, return whether a network with these options may train it."""
        return (not network.network_train_unet_only,) * len(self.text_encoder_targets)

    def load_vae(self, checkpoint: Any, *, dtype: torch.dtype, device: str) -> nn.Module:
        """Load the VAE, frozen, in eval mode; ``--vae`` wins over the checkpoint's own."""
        return self.parts(checkpoint)[VAE].load(dtype=dtype, device=device)

    @abstractmethod
    def vae_identity(self, checkpoint: Any) -> str:
        """Return a text that changes with the VAE's weights, for the stamp of latent caches. Reads little."""

    @abstractmethod
    def text_identity(self, checkpoint: Any) -> WeightsIdentity:
        """Return the identity of text encoders and tokenizers, for the stamp of caches of encoded captions."""

    def load_denoiser(self, checkpoint: Any, *, dtype: torch.dtype, device: str) -> nn.Module:
        """Load the denoiser, frozen, in eval mode; streamed, so that peak memory is about one copy."""
        return self.parts(checkpoint)[DENOISER].load(dtype=dtype, device=device)

    # ---- text ----

    def worded(self, text: str, role: TextRole) -> str:
        """Return what the text encoders read for a text in its role, such as with a system prompt before it.

        ``tokenize`` and ``caption_length`` get the result; equal results have equal encodings.
        """
        return text

    @abstractmethod
    def tokenize(
        self, tokenizers: Sequence[Any], captions: Sequence[str], *, max_token_length: int | None, weighted: bool
    ) -> dict[str, Tensor]:
        """Turn captions into token tensors, batch first; called in data-loader workers.

        SD: ``{"input_ids": (B, n, 77) int64}`` and, when weighted, ``"weights": (B, n, 77) float32``.
        """

    @abstractmethod
    def tokenizers_in(self, folder: Path, *, v2: bool) -> list[Any]:
        """Load the tokenizers from a folder of tokenizer files, without a checkpoint.

        Raises:
            UserError: the folder holds none.
        """

    @abstractmethod
    def caption_length(
        self, tokenizers: Sequence[Any], caption: str, *, max_token_length: int | None, weighted: bool
    ) -> CaptionLength:
        """Return how much of a caption ``tokenize`` keeps; of several tokenizers, the shortest."""

    @abstractmethod
    def encode_text(
        self, text_encoders: Sequence[nn.Module], tokens: Mapping[str, Tensor], *, clip_skip: int | None
    ) -> Conditioning:
        """Encode token tensors (on the encoders' device); gradients flow if they are enabled.

        A family that trains some encoders beside cached outputs of others gets ``None`` for the cached ones, and leaves
        out their outputs.
        """

    def condition(self, encoded: Conditioning, facts: SampleFacts, draw: Draw | None) -> Conditioning:
        """Complete encoded captions to the denoiser's whole conditioning.

        Args:
            draw: source of random variation in training, such as dropping an encoder; ``None`` varies nothing.
        """
        return encoded

    # ---- latents ----

    def encode_images(self, vae: nn.Module, pixels: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> (B, C, h, w) latents as cache files store them, one draw per generator."""
        latents = kl_vae.encode_images(vae, pixels, generators)
        return self._scaled(latents) if self.latent.stored_scaled else latents

    def scale_latents(self, latents: Tensor) -> Tensor:
        """Scale stored latents for the denoiser."""
        return latents if self.latent.stored_scaled else self._scaled(latents)

    def _scaled(self, latents: Tensor) -> Tensor:
        return (latents - self.latent.shift) * self.latent.scale

    def decode_latents(self, vae: nn.Module, latents: Tensor) -> Tensor:
        """Denoiser latents (B, C, h, w) -> pixels (B, 3, H, W) in [-1, 1], float32."""
        return kl_vae.decode_latents(vae, latents / self.latent.scale + self.latent.shift)

    # ---- diffusion ----

    @abstractmethod
    def objective(self, *, v_prediction: bool, zero_terminal_snr: bool) -> Objective:
        """Return the objective: how timesteps are drawn, noise is added, outputs are compared and images are sampled.

        Args:
            v_prediction: what ``ModelInfo`` says.
            zero_terminal_snr: end the schedule in pure noise; families without a schedule ignore it.
        """

    @abstractmethod
    def predict(
        self,
        denoiser: nn.Module,
        noisy: Tensor,
        timesteps: Tensor,
        conditioning: Conditioning,
        control: Control | None = None,
    ) -> Tensor:
        """(B, C, h, w) noisy latents at timesteps (B,) -> the model's raw prediction (B, C, h, w).

        Args:
            timesteps: of the objective: int64, 0 to 999, or with flow matching float32, 0 to 1000.
            control: the residuals of a ControlNet.
        """

    def encode_control(self, vae: nn.Module, images: Tensor, generators: Sequence[torch.Generator]) -> Control:
        """Prepare control images (B, 3, H, W) in [-1, 1] for ``predict``, in families with ``takes_images``."""
        raise NotImplementedError(f"{self.name} reads no images")

    def text_layers(self, denoiser: nn.Module) -> Mapping[str, Sequence[nn.Module]]:
        """Return the cross-attention modules of each layer that can read a text of its own, by published names, in the
        order in which they run; none where the denoiser has no such layers. It may be a ControlNet of one, too."""
        return {}

    def shrink_points(self, denoiser: nn.Module) -> Sequence[nn.Module]:
        """Return the modules of a U-Net's way down before which features may be shrunk, by depth; none without one."""
        return ()

    # ---- memory and speed ----

    def attention(self, options: TrainingOptions) -> str:
        """Return the implementation of attention that a run's options ask for, for ``set_attention``."""
        return attention_backend(options)

    @abstractmethod
    def set_attention(self, denoiser: nn.Module, backend: str, *, split: bool = False) -> None:
        """Choose the implementation of attention.

        Args:
            backend: one of ``BACKENDS`` of common/attention.py.
            split: compute image by image, which takes less memory.

        Raises:
            UserError: it is not available.
        """

    @abstractmethod
    def enable_gradient_checkpointing(self, denoiser: nn.Module, text_encoders: Sequence[nn.Module]) -> None: ...

    # ---- records ----

    @abstractmethod
    def metadata(self, info: ModelInfo) -> dict[str, str]:
        """Return the family's ss_* keys: ss_v2, ss_base_model_version, ..."""

    @abstractmethod
    def modelspec(self, info: ModelInfo) -> dict[str, str]:
        """``architecture`` (no adapter suffix), ``implementation``, ``default_resolution``, ``prediction_type``."""

    def check_options(self, options: RunOptions, info: ModelInfo) -> None:
        """Check the family's rules that need the checkpoint. Raises UserError."""
