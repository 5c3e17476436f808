"""Models and file layouts that several families share: CLIP, the KL autoencoder, the LDM U-Net."""
