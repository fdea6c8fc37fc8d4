"""What prompt lookup gains where a reply repeats its context: the same replies with lookup and without, in turn.

    python bench/lookup.py [MODEL.gguf] [--tasks edit quote ...] [--rounds 3] [--threads 2] [--tokens 1000]
    python bench/lookup.py [MODEL.gguf] --pair TEXT REPLY     a text and a reply to it, from files

edit, quote, answer (two thirds of its words quoted), summary, fresh (nothing is repeated): the engine works on a reply
that is given. It computes all logits as always, then the reply's next token is made the likeliest, in the rows of
guessed tokens too. So the time is what that reply takes, also on a file of random weights, and what is accepted depends
on the text alone. Ids are those of the bundled vocabulary.
story: the bundled model itself, in a story that it has been told three times (it likes to make up its own).

Time is that of the reply loop from the first token on, with sampling and looking up; medians over the rounds, and the
median of the ratios of each round.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

import llmq
from llmq.generate import Generation
from llmq.store import BUNDLED
from llmq.tokenizer import Tokenizer

TEXT = """\
The garden at the end of Mill Street belongs to everyone who works in it. It began eight years ago, when an old man \
named Peter gave the town a piece of land that nobody wanted. There was a broken wall, a dry well and a lot of \
stones. The first people who came took away the stones, mended the wall and planted six apple trees.

Today there are forty small beds, and each family looks after one of them. You can grow what you like in your bed, \
but you must not use poison, and you must water it at least twice a week when the sun is hot. If you go away, please \
ask a friend to water it for you. A bed that nobody looks after for a month is given to the next family on the list.

The tools are in the green shed next to the gate. Please wash them when you are done and put them back on their \
hooks. The key to the shed is under the blue pot. There are two carts for heavy things, and a ladder for the apple \
trees, which may only be used when another person holds it.

Every Saturday morning we work together for two hours. We cut the grass, clean the paths and turn the big heap of \
leaves behind the shed, which becomes good soil in the spring. After the work there is tea and cake under the oldest \
tree. Children are welcome, and they have a bed of their own near the well, where they grow beans and big yellow \
flowers.

In the autumn we have a party. We pick the apples, press them, and drink the juice by a fire. What is left over goes \
to the school kitchen. Last year we picked more than three hundred pounds of apples, and the children made a very \
long table out of old doors, so that everyone could sit down together."""

EDITED = """\
The garden at the end of Bridge Road belongs to everyone who works in it. It began nine years ago, when an old man \
named Peter gave the town a piece of land that nobody wanted. There was a broken wall, a dry well and a lot of \
stones. The first people who came took away the stones, mended the wall and planted six apple trees.

Today there are fifty small beds, and each family looks after one of them. You can grow what you like in your bed, \
but you must never use poison, and you must water it at least twice a week when the sun is hot. If you go away, \
please ask a neighbour to water it for you. A bed that nobody looks after for three weeks is given to the next family \
on the list.

The tools are in the green shed next to the gate. Please wash them when you are done and put them back on their \
hooks. Anna has the key to the shed. There are two carts for heavy things, and a ladder for the apple trees, which \
may only be used when another person holds it.

Every Sunday morning we work together for three hours. We cut the grass, clean the paths and turn the big heap of \
leaves behind the shed, which becomes good soil in the spring. After the work there is tea and cake under the oldest \
tree. Children are welcome, and they have a bed of their own near the gate, where they grow beans and big yellow \
flowers.

In the autumn we have a party. We pick the apples, press them, and drink the juice by a fire. What is left over goes \
to the hospital kitchen. Last year we picked more than four hundred pounds of apples, and the children made a very \
long table out of old doors, so that everyone could sit down together."""

ANSWERED = """\
Yes, you may go away in the summer, but not without asking someone. The text says: "If you go away, please ask a \
friend to water it for you." It also says what happens if you forget: "A bed that nobody looks after for a month is \
given to the next family on the list."

About the ladder, the rule is clear. "There are two carts for heavy things, and a ladder for the apple trees, which \
may only be used when another person holds it." So do not climb it when you are alone.

You asked where to find the tools. "The tools are in the green shed next to the gate. Please wash them when you are \
done and put them back on their hooks. The key to the shed is under the blue pot."

Your children can come too: "Children are welcome, and they have a bed of their own near the well, where they grow \
beans and big yellow flowers." The best day for a first visit is Saturday, because then "there is tea and cake under \
the oldest tree"."""

SUMMARY = """\
The garden at the end of Mill Street belongs to everyone who works in it. It began eight years ago, when Peter gave \
the town a piece of land that nobody wanted.

- There are forty small beds, and each family looks after one of them. You must not use poison, and you must water it \
at least twice a week when the sun is hot. A bed that nobody looks after for a month is given to the next family.
- The tools are in the green shed next to the gate, and the key is under the blue pot. The ladder may only be used \
when another person holds it.
- Every Saturday morning they work together for two hours: they cut the grass, clean the paths and turn the heap of \
leaves. After the work there is tea and cake. Children have a bed of their own near the well.
- In the autumn they have a party, pick the apples and drink the juice by a fire. What is left over goes to the \
school kitchen."""

QUOTED = """\
These are the rules that the text gives:

1. "You can grow what you like in your bed, but you must not use poison, and you must water it at least twice a week \
when the sun is hot."
2. "If you go away, please ask a friend to water it for you."
3. "A bed that nobody looks after for a month is given to the next family on the list."
4. About the tools: "Please wash them when you are done and put them back on their hooks."
5. "There are two carts for heavy things, and a ladder for the apple trees, which may only be used when another \
person holds it."
6. "Every Saturday morning we work together for two hours. We cut the grass, clean the paths and turn the big heap of \
leaves behind the shed, which becomes good soil in the spring."

The last one may not be a rule, but it is good to come."""

TASKS = {
    "edit": (f"The garden has moved; bring the text up to date.\n\n{TEXT}\n\n", EDITED),
    "quote": (f"List the rules, each in the words of the text.\n\n{TEXT}\n\n", QUOTED),
    "answer": (f"Answer the questions of a new family, and quote the text.\n\n{TEXT}\n\n", ANSWERED),
    "summary": (f"Sum up the text in a few lines.\n\n{TEXT}\n\n", SUMMARY),
    "fresh": ("Write about a garden that belongs to a town.\n\n", TEXT),
}
STORY = """\
Once upon a time, there was a little dog named Spot. Spot loved to play in the park with his red ball. One day the \
ball rolled into the pond. Spot was sad. A big duck saw him and said, "Do not cry. I will help you." The duck swam to \
the ball and pushed it back. Spot was very happy, and they became good friends.

"""
SAMPLING = llmq.Sampling(seed=1)

Reply = Callable[[bool], Generation]  # with lookup, or without


class Scripted:
    """A conversation whose next tokens are given; all else is computed by the model."""

    def __init__(self, model: llmq.Model, tokenizer: Tokenizer, ids: Sequence[int]) -> None:
        """`ids`: the prompt and the reply."""
        self.model, self.tokenizer, self.ids = model, tokenizer, ids
        self.start, self.take_back = model.start, model.take_back

    @property
    def room(self) -> int:
        return self.model.room

    def read(self, ids: Sequence[int], n_last: int = 1) -> np.ndarray:
        logits = self.model.read(ids, n_last)
        end = self.model.n_ctx - self.room
        for row, token in zip(logits, self.ids[end - n_last + 1 : end + 1], strict=False):
            row[token] = row.max() + 50
        return logits


def scripted(model: llmq.Model, tokenizer: Tokenizer, prompt: str, reply: str, n: int) -> Reply:
    said = tokenizer.encode(reply)[:n]
    ids = [tokenizer.bos_id, *tokenizer.encode(prompt)]

    def run(lookup: bool) -> Generation:
        context = Scripted(model, tokenizer, ids + said)
        return Generation(
            context, ids, sampling=SAMPLING, max_tokens=len(said), stop=(), continues=False, lookup=lookup
        )

    return run


def story(model: llmq.Model, n: int) -> Reply:
    opening = STORY[: STORY.index(" One day")]

    def run(lookup: bool) -> Generation:
        return model.generate(STORY * 3 + opening, sampling=SAMPLING, max_tokens=min(200, n), lookup=lookup)

    return run


def measure(reply: Reply, lookup: bool) -> tuple[float, Generation]:
    """Tokens per second after the first piece."""
    made = reply(lookup)
    next(made)
    before, start = len(made.ids), time.perf_counter()
    for _ in made:
        pass
    return (len(made.ids) - before) / (time.perf_counter() - start), made


def report(task: str, reply: Reply, rounds: int) -> None:
    next(reply(True))  # reads the prompt, and compiles
    plain, guessed = [], []
    for _ in range(rounds):
        speed, expected = measure(reply, False)
        plain.append(speed)
        speed, made = measure(reply, True)
        guessed.append(speed)
    ratio = statistics.median(b / a for a, b in zip(plain, guessed, strict=True))
    stats, steps = made.stats, made.stats.tokens - made.stats.accepted
    print(  # noqa: T201
        f"{task:8} {len(made.ids):4} tokens  plain {statistics.median(plain):7.2f}  lookup "
        f"{statistics.median(guessed):7.2f} tokens/s  ratio {ratio:.2f}  accepted {stats.accepted}/{stats.drafted}, "
        f"{stats.tokens / steps:.2f} tokens a step{'' if made.ids == expected.ids else ', NOT THE SAME REPLY'}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default=BUNDLED)
    parser.add_argument("--tasks", nargs="+", choices=[*TASKS, "story"], default=[])
    parser.add_argument("--pair", nargs=2, type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--tokens", type=int, default=1000, help="of a reply, at most")
    arguments = parser.parse_args()
    with llmq.load(BUNDLED, threads=1) as bundled:
        tokenizer = bundled.tokenizer
    with llmq.load(arguments.model, threads=arguments.threads) as model:
        if arguments.pair:
            text, said = (path.read_text("utf-8") for path in arguments.pair)
            report("pair", scripted(model, tokenizer, text, said, arguments.tokens), arguments.rounds)
            return
        natural = ["story"] if arguments.model == BUNDLED else []
        for task in arguments.tasks or [*TASKS, *natural]:
            if task == "story":
                reply = story(model, arguments.tokens)
            else:
                reply = scripted(model, tokenizer, *TASKS[task], arguments.tokens)
            report(task, reply, arguments.rounds)


if __name__ == "__main__":
    main()
