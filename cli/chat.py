"""llmq chat: a conversation in the terminal, or through a pipe with one message a line."""

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cli import options
from cli.commands import COMMANDS, SETTING_NAMES, run_command
from cli.reply import StopKey, explain_stop, show_figures, speak
from cli.screen import note, one_line
from llmq.errors import LlmqError
from llmq.store import BUNDLED, state_dir

if TYPE_CHECKING:
    from llmq.generate import Generation
    from llmq.model import Model
    from llmq.prompt import Message
    from llmq.sampler import Sampling

STORYTELLER = f"""\
{BUNDLED}: a small model that comes with llmq and tells children's stories. Ask it for one.
For a real conversation, `llmq pull mistral-7b` fetches a model, and `llmq list --available` names others.
`llmq chat path/to/file.gguf` runs a GGUF file, and `llmq quantize FOLDER` makes one from a checkpoint."""


@dataclass(frozen=True, slots=True)
class Turn:
    """A message and its reply; a reply with stop_reason "interrupted", "length" or "context" is not a whole one."""

    question: str
    answer: str
    stop_reason: str


class Conversation:
    """The turns so far, and what shapes the next one."""

    def __init__(
        self, model: "Model", system: str, sampling: "Sampling", max_tokens: int, stop: list[str], lookup: bool
    ) -> None:
        self.model = model
        self.system = system
        self.sampling = sampling
        self.max_tokens = max_tokens
        self.stop = stop
        self.lookup = lookup
        self.turns: list[Turn] = []
        self.last: Generation | None = None

    def messages(self, question: str) -> "list[Message]":
        from llmq.prompt import Message

        messages = [Message("system", self.system)] if self.system else []
        for turn in self.turns:
            messages += [Message("user", turn.question), Message("assistant", turn.answer)]
        return [*messages, Message("user", question)]

    def ask(self, question: str, key: StopKey | None) -> None:
        """Puts the question, shows the reply, and keeps both; a reply stopped before it began leaves no trace."""
        generation = self.model.chat(
            self.messages(question),
            sampling=self.sampling,
            max_tokens=self.max_tokens,
            stop=self.stop,
            lookup=self.lookup,
        )
        text = speak(generation, key)
        interrupted = key is not None and key.pressed
        stop_reason = "interrupted" if interrupted else generation.stop_reason
        if text or not interrupted:
            self.turns.append(Turn(question, text, stop_reason))
        self.last = generation
        explain_stop(stop_reason, self.max_tokens, self.model.n_ctx)
        show_figures(generation, self.model.n_ctx)


def chat(
    model: options.ModelName = BUNDLED,
    system: options.System = "",
    max_tokens: options.MaxTokens = options.MAX_TOKENS,
    stop: options.Stop = None,
    temp: options.Temperature = None,
    top_k: options.TopK = None,
    top_p: options.TopP = None,
    min_p: options.MinP = None,
    repeat_penalty: options.RepeatPenalty = None,
    seed: options.Seed = None,
    lookup: options.Lookup = False,
    ctx: options.Context = None,
    window: options.Window = None,
    kv_type: options.KVType = "f16",
    threads: options.Threads = None,
) -> None:
    """Chat with a model.

    Without a terminal, each line of stdin is one message and stdout carries the replies.
    """
    sampling = options.sampling(temp, top_k, top_p, min_p, repeat_penalty, seed)
    with options.open_model(model, options.Engine(ctx, window, threads, kv_type)) as loaded:
        conversation = Conversation(loaded, options.utf8(system), sampling, max_tokens, stop or [], lookup)
        if sys.stdin.isatty() and sys.stdout.isatty():
            from cli.keyboard import kept_terminal

            greet(loaded, model)
            with kept_terminal():
                converse(conversation)
        else:
            from cli.keyboard import piped_messages

            read_through(conversation, piped_messages())


def greet(model: "Model", name: str) -> None:
    if name == BUNDLED:
        note(STORYTELLER)
    else:
        note(f"{one_line(model.config.name, 80)}: context of {model.n_ctx} tokens, {model.n_threads} threads.")
    note("/help lists the commands, Ctrl-C stops a reply, Ctrl-D leaves.")


def converse(conversation: Conversation) -> None:
    """Messages from the keyboard: an error costs its turn only, and Ctrl-C a reply only."""
    from cli.keyboard import editor, typed_messages

    session = editor(state_dir() / "chat_history", [f"/{name}" for name in COMMANDS], SETTING_NAMES)
    for text in typed_messages(session):
        try:
            with StopKey() as key:
                respond(conversation, text, key)
        except EOFError:
            return
        except KeyboardInterrupt:
            note("[interrupted]")
        except LlmqError as error:
            note(f"llmq: {one_line(str(error))}")


def read_through(conversation: Conversation, lines: Iterable[str]) -> None:
    """Messages from a pipe: the first error ends it, as a script wants, and Ctrl-C ends the program."""
    for text in lines:
        try:
            respond(conversation, text, None)
        except EOFError:
            return


def respond(conversation: Conversation, text: str, key: StopKey | None) -> None:
    """A command is carried out, anything else is said to the model, and a blank line is nothing."""
    text = text.strip()
    if text and not run_command(conversation, text):
        conversation.ask(text, key)
