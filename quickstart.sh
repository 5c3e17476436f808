#!/usr/bin/env bash
# From nothing to a trained LoRA and an image of what it taught the model: makes .venv, installs, trains on
# the embedded model and example images, draws the same prompts and seeds before and after.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
source tools/environment.sh
setup_environment requirements.txt

OUTPUT="${OUTPUT:-quickstart_output}"
EXAMPLE=examples/quickstart
PYTHON_BIN="$VENV/bin/python"
rm -rf "$OUTPUT"
mkdir -p "$OUTPUT"

echo "1/3 drawing with the base model"
"$PYTHON_BIN" gen_img.py --ckpt "$EXAMPLE/model" --from_file "$EXAMPLE/prompts.txt" --outdir "$OUTPUT/before" \
    --sequential_file_name --sdpa

echo "2/3 training the LoRA"
"$PYTHON_BIN" train_network.py --config_file "$EXAMPLE/lora.toml" --output_dir "$OUTPUT"

echo "3/3 drawing the same prompts and seeds with the LoRA"
"$PYTHON_BIN" gen_img.py --ckpt "$EXAMPLE/model" --from_file "$EXAMPLE/prompts.txt" --outdir "$OUTPUT/after" \
    --sequential_file_name --sdpa --network_module networks.lora --network_weights "$OUTPUT/quickstart_lora.safetensors"

"$PYTHON_BIN" "$EXAMPLE/side_by_side.py" "$OUTPUT/before" "$OUTPUT/after" "$EXAMPLE/prompts.txt" "$OUTPUT/before_after.png"
