"""llmq: local, quantized language models. The runtime; `quant` makes model files, `cli` is the terminal."""

__version__ = "0.1.0"
