"""What can be typed in a chat besides messages: /help, /clear, /system, /set, /stats and /exit."""

import dataclasses
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cli.reply import figures
from cli.screen import note, one_line, table
from llmq.errors import UsageError

if TYPE_CHECKING:
    from cli.chat import Conversation

# A slash and one word; "/usr/bin is full" is a message.
COMMAND = re.compile(r"/(\w*)(?:\s+(.*))?", re.DOTALL)

# Name in /set: field of Sampling, and how its value is read.
SETTINGS: dict[str, tuple[str, Callable[[str], float]]] = {
    "temp": ("temperature", float),
    "top-k": ("top_k", int),
    "top-p": ("top_p", float),
    "min-p": ("min_p", float),
    "repeat-penalty": ("repetition_penalty", float),
    "seed": ("seed", int),
}
SETTING_NAMES = [*SETTINGS, "n"]


@dataclass(frozen=True, slots=True)
class Command:
    act: Callable[["Conversation", str], None]
    usage: str
    what: str


def help_(conversation: "Conversation", argument: str) -> None:
    del conversation, argument
    rows = [(command.usage, command.what) for command in COMMANDS.values()]
    rows += [
        ("Enter, Alt-Enter", "send; break the line"),
        ("Ctrl-C", "stop the reply; at an empty line, twice: leave"),
    ]
    note(table(rows))


def clear(conversation: "Conversation", argument: str) -> None:
    del argument
    conversation.turns.clear()
    note("[conversation forgotten]")


def system(conversation: "Conversation", argument: str) -> None:
    if argument:
        conversation.system = "" if argument == "-" else argument
    note(f"[system prompt: {one_line(conversation.system) or 'none'}]")


def set_(conversation: "Conversation", argument: str) -> None:
    """Raises UsageError for an unknown name or a value out of range."""
    name, _, value = argument.partition(" ")
    if name and name not in SETTING_NAMES:
        raise UsageError(f"there is no setting {name[:40]!a}; there are {', '.join(SETTING_NAMES)}")
    if value:
        change(conversation, name, value.strip())
    shown = [name] if name else SETTING_NAMES
    note(table([(each, read(conversation, each)) for each in shown]))


def change(conversation: "Conversation", name: str, value: str) -> None:
    convert = int if name == "n" else SETTINGS[name][1]
    try:
        number = convert(value)
    except ValueError:
        kind = "a whole number" if convert is int else "a number"
        raise UsageError(f"{name} must be {kind}, not {value[:40]!a}") from None
    if name != "n":
        changed: dict[str, Any] = {SETTINGS[name][0]: number}
        conversation.sampling = dataclasses.replace(conversation.sampling, **changed)
    elif number < 1:
        raise UsageError("n must be at least 1: it is the most tokens in one reply")
    else:
        conversation.max_tokens = int(number)


def read(conversation: "Conversation", name: str) -> str:
    if name == "n":
        return str(conversation.max_tokens)
    value = getattr(conversation.sampling, SETTINGS[name][0])
    return "random" if value is None else str(value)


def stats(conversation: "Conversation", argument: str) -> None:
    del argument
    model = conversation.model
    note(f"[{one_line(model.path.name)}: {len(conversation.turns)} turns, {model.n_threads} threads]")
    if conversation.last:
        note(figures(conversation.last, model.n_ctx))


def exit_(conversation: "Conversation", argument: str) -> None:
    del conversation, argument
    raise EOFError


COMMANDS = {
    "help": Command(help_, "/help", "this list"),
    "clear": Command(clear, "/clear", "forget the conversation, keep the system prompt"),
    "system": Command(system, "/system [TEXT]", "show or set the system prompt; - removes it"),
    "set": Command(set_, "/set [NAME VALUE]", f"show or change {', '.join(SETTING_NAMES)}"),
    "stats": Command(stats, "/stats", "figures of the last reply"),
    "exit": Command(exit_, "/exit", "leave, as Ctrl-D does"),
}


def run_command(conversation: "Conversation", text: str) -> bool:
    """Runs the text if it is a command, and says whether it was one. EOFError where it means to leave."""
    match = COMMAND.fullmatch(text)
    if not match:
        return False
    name, argument = match.groups()
    if name not in COMMANDS:
        raise UsageError(f"there is no command /{name[:40]}; /help lists them")
    COMMANDS[name].act(conversation, (argument or "").strip())
    return True
