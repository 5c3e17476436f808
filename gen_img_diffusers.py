"""``gen_img.py`` under the name that it once had for Stable Diffusion 1.x and 2.x.

python gen_img_diffusers.py --ckpt model.safetensors --outdir outputs --bf16 --prompt "a cat on a mat --n blurry --d 1"
"""

from __future__ import annotations

import gen_img

setup_parser = gen_img.setup_parser

if __name__ == "__main__":
    gen_img.main(setup_parser().parse_args())
