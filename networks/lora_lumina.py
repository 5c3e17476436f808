"""LoRA for Lumina-Image 2.0 (``--network_module networks.lora_lumina``), on the transformer and Gemma2.

Adapters are on all linear layers of the blocks, modulations too (``lora_unet_layers_0_attention_qkv``), of the refiners
and of the last layer, and unless only the transformer is trained on Gemma2 (``lora_te_layers_0_self_attn_q_proj``).

Network args are those of the table (ranks of layers such as ``attn_dim``, of ``embedder_dims``, blocks by list and
number) and of ``networks/transformer_lora.py``; docs/lumina.md lists them.
"""

from library.architectures.lumina.lora import LORA
from networks.transformer_lora import preset

LoraLuminaNetwork = preset("LoraLuminaNetwork", "networks.lora_lumina", LORA)

check_network_args = LoraLuminaNetwork.check_network_args
create_network = LoraLuminaNetwork.create
create_network_from_weights = LoraLuminaNetwork.create_from_weights
