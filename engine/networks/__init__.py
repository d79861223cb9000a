"""The networks, and nothing but networks: tensors in, tensors out."""
