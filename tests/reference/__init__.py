"""Parity with the PyTorch references of diffusers and transformers on shared random weights."""
