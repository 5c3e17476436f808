"""LoRA for FLUX.1 and Chroma (``--network_module networks.lora_flux``), on transformer, CLIP-L and T5-XXL.

It adapts all linear layers of the blocks, the modulations too (Chroma has none), as
``lora_unet_double_blocks_0_img_attn_qkv``, ``lora_unet_single_blocks_0_linear1``; CLIP-L (``lora_te1_*``) unless the
transformer alone is trained, and with ``train_t5xxl=True`` T5-XXL (``lora_te3_*``).

Network args are those of the table (ranks of layers such as ``img_attn_dim``, of ``in_dims``, blocks by number and
kind) and of ``networks/transformer_lora.py``; docs/adapters.md lists them.
"""

from library.architectures.flux.lora import LORA
from networks.transformer_lora import preset

LoraFluxNetwork = preset("LoraFluxNetwork", "networks.lora_flux", LORA)

check_network_args = LoraFluxNetwork.check_network_args
create_network = LoraFluxNetwork.create
create_network_from_weights = LoraFluxNetwork.create_from_weights
