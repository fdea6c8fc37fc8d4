"""The Python face: load a model, generate, chat, look at logits."""

import dataclasses
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType

import numpy as np

from llmq.config import MAX_POSITIONS, ModelConfig, check_tensors, choose_context, read_config
from llmq.cores import allowed_cpus
from llmq.engine.cpu import Engine
from llmq.errors import FileFormatError, ResourceError, UsageError
from llmq.generate import Generation
from llmq.gguf import GGUF, open_gguf, quoted
from llmq.jit import compile_log
from llmq.kernels.kv import F16_KV, KV_FORMATS, KVFormat
from llmq.layout import BATCH
from llmq.machine import default_threads
from llmq.memory import memory_free, ring_bytes, ring_capacity
from llmq.prompt import Message, build_prompt, prompt_version
from llmq.sampler import Sampling
from llmq.store import resolve
from llmq.tokenizer import Tokenizer, load_tokenizer

DEFAULT_SAMPLING = Sampling()


class Model:
    """A loaded model and one conversation's cache. Not for use by several threads at once.

    One reply is read at a time: when the next begins, an older one that is read on raises UsageError, as does every
    use after close().
    """

    def __init__(self, gguf: GGUF, config: ModelConfig, n_ctx: int, n_threads: int, kv: KVFormat = F16_KV) -> None:
        self.path: Path = gguf.path
        self.config = config
        self.n_ctx = n_ctx
        self.n_threads = n_threads
        self._gguf = gguf
        self._status = self.path.stat()
        self._engine = Engine(gguf, config, n_threads, kv=kv)
        self._ring = self._engine.ring(n_ctx)
        self._ids: list[int] = []  # what the ring holds, from position 0
        self._tokenizer: Tokenizer | None = None
        self._turns = 0
        self._closed = False

    @property
    def tokenizer(self) -> Tokenizer:
        """Raises UnsupportedError for a vocabulary that is not SentencePiece's."""
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self._gguf.metadata)
        return self._tokenizer

    @property
    def prompt_version(self) -> str:
        """The chat format, "v1" to "v3"; raises UnsupportedError for one that llmq does not build."""
        return prompt_version(self.tokenizer, self._gguf.metadata)

    @property
    def room(self) -> int:
        """Positions left in the context."""
        return self.n_ctx - len(self._ids)

    def generate(
        self,
        prompt: str | Sequence[int],
        *,
        sampling: Sampling = DEFAULT_SAMPLING,
        max_tokens: int = 256,
        stop: Sequence[str] = (),
        lookup: bool = False,
    ) -> Generation:
        """Continue a text, or token ids (which then must bring their own BOS).

        lookup: guess tokens from what stands before and check several at once: the same reply, sooner where it repeats
        its context, and a little later where guesses are wrong.

        Raises UsageError for an empty prompt, one that does not fit the context, or an id outside the vocabulary.
        """
        ids = self.encode(prompt) if isinstance(prompt, str) else list(prompt)
        return self._generation(ids, sampling, max_tokens, stop, continues=True, lookup=lookup)

    def chat(
        self,
        messages: Sequence[Message],
        *,
        sampling: Sampling = DEFAULT_SAMPLING,
        max_tokens: int = 256,
        stop: Sequence[str] = (),
        lookup: bool = False,
    ) -> Generation:
        """The assistant's next message. What earlier calls have in common with this one is not read again.

        lookup: as in generate().

        Raises UsageError for messages out of order or too long for the context.
        """
        ids = build_prompt(self.tokenizer, messages, self.prompt_version)
        continues = messages[-1].role == "assistant"
        return self._generation(ids, sampling, max_tokens, stop, continues=continues, lookup=lookup)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, with BOS where the model wants one."""
        start = [self.tokenizer.bos_id] if self.tokenizer.add_bos else []
        return start + self.tokenizer.encode(text)

    def logits(self, ids: Sequence[int], *, all_positions: bool = True) -> np.ndarray:
        """Logits f32 [n, vocab_size] after each id, or after the last (n = 1); the conversation is left alone.

        Raises UsageError for no ids, more than the context holds, or an id outside the vocabulary.
        """
        self._check_ids(ids)
        self._check_file()
        ring = self._engine.ring(self.n_ctx)
        found = []
        for part, outputs in self._parts(ids, len(ids) if all_positions else 1):
            positions = range(ring.length, ring.length + len(part))
            found.append(self._engine.forward(part, positions, [ring] * len(part), outputs))
            ring.advance(len(part))
        return np.concatenate(found)

    def start(self, ids: Sequence[int]) -> int:
        """Go back to where the cache and `ids` part; the number of ids that stay cached (never all of them)."""
        self._turns += 1
        same = 0
        for mine, theirs in zip(self._ids[: self._ring.length], ids[:-1], strict=False):
            if mine != theirs:
                break
            same += 1
        same = self._ring.keepable(same)
        self._ring.truncate(same)
        del self._ids[same:]
        return same

    def read(self, ids: Sequence[int], n_last: int = 1) -> np.ndarray:
        """Append ids to the conversation; logits f32 [n_last, vocab_size] after each of the last `n_last`."""
        self._check_file()
        found = []
        for part, outputs in self._parts(ids, n_last):
            at = len(self._ids)
            self._ring.claim(len(part))
            found.append(self._engine.forward(part, range(at, at + len(part)), [self._ring] * len(part), outputs))
            self._ids += part
            self._ring.advance(len(part))
        return np.concatenate(found)

    def _parts(self, ids: Sequence[int], n_last: int) -> Iterator[tuple[list[int], range]]:
        """Ids by batches, and which rows of each are among the last `n_last`."""
        for first in range(0, len(ids), self._engine.batch):
            part = list(ids[first : first + self._engine.batch])
            yield part, range(max(0, len(ids) - n_last - first), len(part))

    def take_back(self, n: int) -> None:
        """Remove the last `n` ids of the conversation.

        Raises UsageError when a window has moved past what the next id would see; fewer than the last `read` appended
        in one batch can always be taken back.
        """
        self._ring.truncate(self._ring.length - n)
        del self._ids[self._ring.length :]

    def close(self) -> None:
        """Ends the threads and lets go of the file."""
        self._closed = True
        self._engine.close()
        self._gguf.close()

    def __enter__(self) -> "Model":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _generation(
        self,
        ids: list[int],
        sampling: Sampling,
        max_tokens: int,
        stop: Sequence[str],
        *,
        continues: bool,
        lookup: bool,
    ) -> Generation:
        self._check_file()
        self._check_ids(ids)
        if isinstance(stop, str):
            raise UsageError("stop is one text; give a list of texts")
        if max_tokens < 1:
            raise UsageError(f"max_tokens is {max_tokens}; it must be at least 1")
        return Generation(
            Turn(self), ids, sampling=sampling, max_tokens=max_tokens, stop=stop, continues=continues, lookup=lookup
        )

    def _check_ids(self, ids: Sequence[int]) -> None:
        if len(ids) == 0:
            raise UsageError("the prompt is empty")
        if len(ids) > self.n_ctx:
            raise UsageError(
                f"the prompt has {len(ids)} tokens and the context holds {self.n_ctx}; shorten it, or give a larger "
                "context (--ctx)"
            )
        if min(ids) < 0 or max(ids) >= self.config.vocab_size:
            raise UsageError(f"token ids go from 0 to {self.config.vocab_size - 1}")

    def _check_file(self) -> None:
        """A file that is unmapped, or has been cut short, would end the process at the first missing page."""
        if self._closed:
            raise UsageError(f"{quoted(self.path.name)} has been closed; load it again")
        try:
            now = self.path.stat()
        except OSError:
            return  # removed: what is mapped lives on, as it does behind another file of that name
        if os.path.samestat(now, self._status) and now.st_size < self._status.st_size:
            raise FileFormatError(f"{quoted(self.path.name)} has become shorter since it was opened; get it again")


class Turn:
    """One reply's hold on a model's cache, lost when the next one starts."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._number = 0
        self.tokenizer = model.tokenizer

    @property
    def room(self) -> int:
        return self._model.room

    def start(self, ids: Sequence[int]) -> int:
        reused = self._model.start(ids)
        self._number = self._model._turns
        return reused

    def read(self, ids: Sequence[int], n_last: int = 1) -> np.ndarray:
        if self._lost:
            raise UsageError("another reply of this model has begun since; read one at a time, or load it twice")
        return self._model.read(ids, n_last)

    def take_back(self, n: int) -> None:
        if not self._lost:  # else the next reply has found what there was, and kept what it could
            self._model.take_back(n)

    @property
    def _lost(self) -> bool:
        return self._number != self._model._turns


def load(
    name_or_path: str | os.PathLike[str],
    *,
    n_ctx: int | None = None,
    window: int | None = None,
    threads: int | None = None,
    kv_type: str = "f16",
    on_event: Callable[[str], None] | None = None,
) -> Model:
    """Open a model by name (in the store, or "storyteller") or by the path of a GGUF file.

    n_ctx: positions kept (default: the model's own limit, at most 4096 where there is no window to bound the cache).
    window: sliding window in tokens, 0 for none; default: what the file says. threads: default one per physical core,
    fewer where this machine reads memory clearly faster with fewer.
    kv_type: "f16", or "q8_0" for a cache of about half the size (docs/performance.md has what it costs).
    on_event: told the name of each kernel that has to be compiled, and MEASURING (cores.py) before the measurement
    that the default for threads needs once per machine.

    Raises UsageError (no such model, bad number), FileFormatError (damaged), UnsupportedError (cannot be run),
    ResourceError (not enough memory).
    """
    gguf = open_gguf(resolve(name_or_path))
    config = read_config(gguf)
    check_tensors(gguf, config)
    config = _with_window(config, window)
    n_ctx = choose_context(config, n_ctx)
    kv = _kv_format(config, kv_type)
    _check_memory(config, n_ctx, kv)
    compile_log.listener = on_event
    n_threads = default_threads(on_event) if threads is None else _threads(threads)
    return Model(gguf, config, n_ctx, n_threads, kv)


def _with_window(config: ModelConfig, window: int | None) -> ModelConfig:
    if window is None:
        return config
    if not 0 <= window <= MAX_POSITIONS:
        raise UsageError(f"the window is {window}; give a number of tokens up to {MAX_POSITIONS}, or 0 for none")
    return dataclasses.replace(config, window=window)


def _threads(threads: int) -> int:
    available = len(allowed_cpus())
    if not 1 <= threads <= 4 * available:
        raise UsageError(f"{threads} threads; give 1 to {4 * available} (this machine runs {available} at once)")
    return threads


def _kv_format(config: ModelConfig, name: str) -> KVFormat:
    if name not in KV_FORMATS:
        raise UsageError(f"there is no KV cache type {quoted(name)}; give one of {', '.join(KV_FORMATS)}")
    kv = KV_FORMATS[name]
    if config.head_dim % kv.multiple:
        raise UsageError(
            f"a {name} cache needs heads of a multiple of {kv.multiple}; this model's are {config.head_dim}: use f16"
        )
    return kv


def _check_memory(config: ModelConfig, n_ctx: int, kv: KVFormat) -> None:
    """Refuse what would make the machine swap: the weights are mapped and can be dropped, the cache cannot."""
    needed = ring_bytes(config, ring_capacity(n_ctx, config.window, BATCH), kv.layout)
    available = memory_free()
    if needed > available:
        raise ResourceError(
            f"a context of {n_ctx} tokens needs {needed / 2**30:.1f} GiB and {available / 2**30:.1f} GiB are free; "
            "give a smaller --ctx, or a --window"
        )
