"""Whether llmq can run a model, told by the header of its file."""

from llmq.config import ModelConfig, check_tensors, read_config
from llmq.gguf import GGUF
from llmq.tokenizer import load_tokenizer


def check_supported(gguf: GGUF) -> ModelConfig:
    """The model's configuration. Raises FileFormatError and UnsupportedError, which say why it cannot be run."""
    config = read_config(gguf)
    check_tensors(gguf, config)
    load_tokenizer(gguf.metadata)
    return config
