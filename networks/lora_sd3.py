"""LoRA for Stable Diffusion 3 and 3.5 (``--network_module networks.lora_sd3``), on transformer and text encoders.

Adapters are on all linear layers of the joint blocks, modulations too (``lora_unet_joint_blocks_0_x_block_attn_qkv``),
on CLIP-L and CLIP-G (``lora_te1_*``, ``lora_te2_*``) unless only the transformer is trained, and with
``train_t5xxl=True`` on T5-XXL (``lora_te3_*``).

Network args are those of the table (ranks of layers such as ``x_attn_dim``, of ``emb_dims``, blocks by number) and of
``networks/transformer_lora.py``; docs/sd3.md lists them.
"""

from library.architectures.sd3.lora import LORA
from networks.transformer_lora import preset

LoraSD3Network = preset("LoraSD3Network", "networks.lora_sd3", LORA)

check_network_args = LoraSD3Network.check_network_args
create_network = LoraSD3Network.create
create_network_from_weights = LoraSD3Network.create_from_weights
