"""From a prompt to the tensors that condition the U-Net."""
