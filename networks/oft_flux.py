"""OFT for FLUX.1 and Chroma (``--network_module networks.oft_flux``): output features of the transformer are rotated.

It adapts the attentions' layers of the blocks with two streams; with ``enable_all_linear=True`` all linear layers of
all blocks. The text encoders are not adapted. ``networks/transformer_oft.py`` says more.
"""

from library.architectures.flux.lora import LORA
from networks.transformer_oft import preset

OftFluxNetwork = preset("OftFluxNetwork", "networks.oft_flux", LORA)

check_network_args = OftFluxNetwork.check_network_args
create_network = OftFluxNetwork.create
create_network_from_weights = OftFluxNetwork.create_from_weights
