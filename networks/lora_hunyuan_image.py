"""LoRA for HunyuanImage-2.1 (``--network_module networks.lora_hunyuan_image``), on the transformer.

Adapters are on all linear layers of the double and single blocks, modulations too
(``lora_unet_double_blocks_0_img_attn_qkv``); the text encoders carry none. With ``split_qkv=True`` each projection that
is stacked in a layer has an adapter of its own.

Network args are those of ``networks/transformer_lora.py``; docs/hunyuan_image.md lists them.
"""

from library.architectures.hunyuan_image.lora import LORA
from networks.transformer_lora import preset

LoraHunyuanImageNetwork = preset("LoraHunyuanImageNetwork", "networks.lora_hunyuan_image", LORA)

check_network_args = LoraHunyuanImageNetwork.check_network_args
create_network = LoraHunyuanImageNetwork.create
create_network_from_weights = LoraHunyuanImageNetwork.create_from_weights
