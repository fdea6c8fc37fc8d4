"""llmq: local, quantized language models. The runtime; `quant` makes model files, `cli` is the terminal.

with llmq.load("storyteller") as model:
    story = "".join(model.chat([llmq.Message("user", "Tell me a story about a cat.")]))
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llmq.errors import LlmqError
    from llmq.generate import Generation, Stats
    from llmq.model import Model, load
    from llmq.prompt import Message
    from llmq.sampler import Sampling

__version__ = "0.1.0"
__all__ = ["Generation", "LlmqError", "Message", "Model", "Sampling", "Stats", "load"]

# Looked up on first use: importing the engine costs the compiler's start-up time, and `llmq --help` needs none of it.
_HOMES = {
    "Generation": "generate", "Stats": "generate", "LlmqError": "errors", "Message": "prompt", "Model": "model",
    "Sampling": "sampler", "load": "model",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'llmq' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"llmq.{_HOMES[name]}"), name)
