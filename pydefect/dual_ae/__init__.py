"""The spatial-channel dual autoencoder: structural and logical defects; with no additions, EfficientAD."""
