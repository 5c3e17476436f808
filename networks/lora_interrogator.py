"""Show which tokens a LoRA of Stable Diffusion 1.x or 2.x changes most in the text encoder.

    python networks/lora_interrogator.py --sd_model model.safetensors --model lora.safetensors
    python networks/lora_interrogator.py --v2 --sd_model sd2.safetensors --model lora.safetensors --clip_skip 2

Every token of the vocabulary is encoded alone, between start and end, without and with the LoRA. The 100 tokens whose
encoding changes most (mean absolute difference) are printed. Trigger words show up here if the text encoder was
trained.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __package__ in (None, ""):  # run as a script: the repository is one folder up
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from library.config.arguments import ConsoleOptions
from library.config.console import setup_console
from library.config.tool_parser import tool_parser
from library.errors import UserError, exits_on_user_error
from networks.files.options import required

if TYPE_CHECKING:
    from torch import Tensor, nn

logger = logging.getLogger(__name__)

#: lines that are printed
SHOWN = 100


def setup_parser() -> argparse.ArgumentParser:
    parser = tool_parser(__doc__)
    add = parser.add_argument
    add("--v2", action="store_true", help="the model is Stable Diffusion 2.x")
    add("--sd_model", metavar="MODEL", help="checkpoint: a file, a diffusers folder or a Hub id")
    add("--model", metavar="FILE", help="LoRA file")
    add(
        "--batch_size", type=int, default=16, metavar="N", help="number of tokens that are encoded at once (default 16)"
    )
    add("--clip_skip", type=int, metavar="N", help="use the n-th layer from the end (default: the last)")
    add("--tokenizer_cache_dir", metavar="FOLDER", help="folder of the tokenizers (default: the Hub's cache)")
    return parser


@exits_on_user_error
def main(args: argparse.Namespace) -> None:
    """Print the tokens.

    Raises:
        SystemExit: with code 2, after one clear line.
    """
    setup_console(ConsoleOptions())
    required("sd_model", args.sd_model, "name the checkpoint that the LoRA is for")
    file = required("model", args.model, "name the LoRA file")
    if args.batch_size < 1:
        raise UserError(f"--batch_size {args.batch_size}: must be at least 1")
    # only now, as torch takes seconds to load
    import torch

    from library.architectures.registry import default_architecture

    family = default_architecture()
    from networks.lora import create_network_from_weights
    from networks.weights import read_weights

    weights = read_weights(file)
    if not any(name.startswith(family.text_encoder_targets[0].prefix) for name in weights):
        raise UserError(f"--model {file}: has nothing for the text encoder, so that no token changes")
    checkpoint = family.inspect(
        args.sd_model, v2=args.v2, v_parameterization=args.v2, vae=None, tokenizer_cache_dir=args.tokenizer_cache_dir
    )
    layers = checkpoint.info.settings["text_layers"]
    if args.clip_skip is not None and not 1 <= args.clip_skip <= layers:
        raise UserError(f"--clip_skip {args.clip_skip}: the text encoder has {layers} layers; give 1 to {layers}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.float16 if device == "cuda" else torch.float32
    (tokenizer,) = family.load_tokenizers(checkpoint)
    (encoder,) = family.load_text_encoders(checkpoint, dtype=dtype, device=device)
    # names and shapes alone: the denoiser in the file is checked but not used
    denoiser = family.load_denoiser(checkpoint, dtype=dtype, device="meta")
    tokens = torch.arange(max(tokenizer.all_special_ids) + 1)
    before = encodings(encoder, tokenizer, tokens, args.batch_size, args.clip_skip)
    network, _ = create_network_from_weights(1.0, str(file), None, encoder, denoiser, weights, for_inference=True)
    network.apply_to(encoder, denoiser, True, False)
    network.load_state_dict({name: weights[name] for name in network.state_dict()}, strict=True)
    network.to(device=device, dtype=dtype)
    after = encodings(encoder, tokenizer, tokens, args.batch_size, args.clip_skip)
    differences = (after - before).abs().mean(dim=(1, 2))
    for place in differences.argsort(descending=True)[:SHOWN].tolist():
        print(f"[{place}]: {place} {tokenizer.decode([place])}: {float(differences[place]):.7f}")


def encodings(encoder: nn.Module, tokenizer: Any, tokens: Tensor, batch_size: int, clip_skip: int | None) -> Tensor:
    """Return the states (tokens, 3, D) of each token between start and end, float32 on the host."""
    import torch

    found = []
    device = next(encoder.parameters()).device
    for batch in tokens.split(batch_size):
        ends = [torch.full_like(batch, i) for i in (tokenizer.bos_token_id, tokenizer.eos_token_id)]
        ids = torch.stack([ends[0], batch, ends[1]], dim=1).to(device)  # (B, 3)
        with torch.no_grad():
            output = encoder(ids, output_hidden_states=True)
            if clip_skip is None or clip_skip <= 1:
                states = output.last_hidden_state
            else:
                model = getattr(encoder, "text_model", encoder)
                states = model.final_layer_norm(output.hidden_states[-clip_skip])
        found.append(states.float().cpu())
    return torch.cat(found)


if __name__ == "__main__":
    main(setup_parser().parse_args())
