"""Models and file layouts that several families share: CLIP, T5, the KL autoencoder, the LDM U-Net, attention."""
