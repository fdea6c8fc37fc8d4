"""Conversations as token ids, in the Mistral instruct formats v1, v2 and v3.

Ids are those of mistral-common. Every text is tokenized by itself and joined as ids, so that a typed `</s>` (and, from
v2 on, a typed `[INST]`) stays text; in v1 `[INST]` is ordinary text on both sides.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from operator import attrgetter
from typing import Any

from llmq.errors import FileFormatError, UnsupportedError, UsageError
from llmq.tokenizer import Tokenizer

ROLES = ("system", "user", "assistant")


@dataclass(frozen=True, slots=True)
class Message:
    """One turn; `role` is "system", "user" or "assistant"."""

    role: str
    content: str


def prompt_version(tokenizer: Tokenizer, metadata: dict[str, Any]) -> str:
    """Instruct format of a model, "v1", "v2" or "v3", told by its control tokens.

    Raises UnsupportedError for v7 and for Tekken vocabularies, FileFormatError for half a pair of [INST] tokens.
    """
    pre = metadata.get("tokenizer.ggml.pre")
    if pre == "tekken":
        raise UnsupportedError(
            "the model uses a Tekken vocabulary; llmq builds prompts for Mistral v1, v2 and v3 models"
        )
    if "[SYSTEM_PROMPT]" in tokenizer.specials:
        raise UnsupportedError(
            "the model uses instruct format v7; llmq builds prompts for Mistral v1, v2 and v3 models"
        )
    if ("[INST]" in tokenizer.specials) != ("[/INST]" in tokenizer.specials):
        raise FileFormatError("the vocabulary has only one of the control tokens [INST] and [/INST]")
    if "[INST]" not in tokenizer.specials:
        return "v1"
    return "v3" if "[PREFIX]" in tokenizer.specials else "v2"


def build_prompt(tokenizer: Tokenizer, messages: Sequence[Message], version: str) -> list[int]:
    """Ids of a conversation, BOS first, ready for the model to answer.

    Neighbours of one role are joined by an empty line. The system text goes before the first user turn in v1, before
    the last in v2 and v3. A last message of the assistant is left open: the model continues it. Raises UsageError for
    a conversation that has no valid order.
    """
    _check(messages)
    system = _join([message for message in messages if message.role == "system"])
    turns = _turns(messages)
    users = [i for i, turn in enumerate(turns) if turn.role == "user"]
    system_turn = users[0] if version == "v1" else users[-1]
    ids = [tokenizer.bos_id]
    for i, turn in enumerate(turns):
        if turn.role == "user":
            text = f"{system}\n\n{turn.content}" if system and i == system_turn else turn.content
            ids += _user_ids(tokenizer, text, version)
        else:
            ids += tokenizer.encode(turn.content if version == "v1" else turn.content.rstrip(" "))
            ids.append(tokenizer.eos_id)
    return ids[:-1] if turns[-1].role == "assistant" else ids


def _user_ids(tokenizer: Tokenizer, text: str, version: str) -> list[int]:
    if version == "v1":
        return tokenizer.encode(f"[INST] {text} [/INST]")
    return [tokenizer.specials["[INST]"], *tokenizer.encode(text), tokenizer.specials["[/INST]"]]


def _turns(messages: Sequence[Message]) -> list[Message]:
    """User and assistant turns, beginning with a user's; a system message between two of a role keeps them apart."""
    groups = [(role, list(group)) for role, group in groupby(messages, key=attrgetter("role"))]
    turns = [Message(role, _join(group)) for role, group in groups if role != "system"]
    return turns if turns[0].role == "user" else [Message("user", ""), *turns]


def _join(messages: Sequence[Message]) -> str:
    return "\n\n".join([message.content for message in messages if message.content])


def _check(messages: Sequence[Message]) -> None:
    for i, message in enumerate(messages):
        if message.role not in ROLES:
            raise UsageError(f"message {i + 1} has role {ascii(message.role)[:40]}; roles are {', '.join(ROLES)}")
        if message.role == "assistant" and not message.content:
            raise UsageError(f"message {i + 1} is an empty reply of the assistant; leave it out")
    for i, (before, message) in enumerate(pairwise(messages)):
        if (before.role, message.role) == ("assistant", "system"):
            raise UsageError(f"message {i + 2} is a system message after a reply; it must come before a user message")
    if not any(message.role == "user" for message in messages):
        raise UsageError("the conversation has no user message; add one")
