"""The quantizer: checkpoints in, GGUF files out."""
