"""Make captions and tags of images, and bring them into metadata files: what ``finetune/`` has command lines for."""
