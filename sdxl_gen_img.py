"""``gen_img.py`` under the name that it once had for SDXL; SDXL is what it takes a model for that does not say it.

python sdxl_gen_img.py --ckpt model.safetensors --outdir outputs --bf16 --prompt "a cat on a mat --n blurry --d 1"
"""

from __future__ import annotations

import gen_img

setup_parser = gen_img.setup_parser

if __name__ == "__main__":
    arguments = setup_parser().parse_args()
    arguments.sdxl = True
    gen_img.main(arguments)
