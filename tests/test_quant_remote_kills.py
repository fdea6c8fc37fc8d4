"""Weights quantized as they arrive, killed at any moment: never half a file, and the next run goes on.

With -s it says how many kills there were.
"""

import random
import sys
from pathlib import Path

import pytest
from hub import Hub
from kills import KILLED, forking
from published import PATIENT, asked_twice, make_small, most_twice, opened, publish, run, written

from llmq.part import part_paths

SEED = 20261123
PROGRAM = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import pytest
import published
from llmq import part
published.make_small(pytest.MonkeyPatch())
part.SAVE_SECONDS = 0
def run():
    published.run(published.opened(published.PATIENT), Path(sys.argv[2]))
"""


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("n_kills", [20, pytest.param(100, marks=pytest.mark.slow)])
def test_kills_at_random_moments(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, n_kills: int) -> None:
    make_small(monkeypatch)
    experts = {"model_type": "mixtral", "num_local_experts": 3, "num_experts_per_tok": 2, "intermediate_size": 256}
    folder = written(tmp_path, shards=3, num_hidden_layers=1, **experts)
    publish(hub, folder, monkeypatch)
    run(folder, tmp_path / "expected.gguf")
    expected, out, rng = (tmp_path / "expected.gguf").read_bytes(), tmp_path / "out.gguf", random.Random(SEED)
    wrong, fired, continued, most = [], 0, 0, 0
    with forking(PROGRAM, str(Path(__file__).parent), str(out)) as child:
        code, took = child(None)
        assert (code, out.read_bytes() == expected) == (0, True)
        for _ in range(10 * n_kills):
            out.unlink(missing_ok=True)
            hub.reset()
            seconds = rng.uniform(0, took)
            if child(seconds)[0] not in KILLED:
                continue
            fired += 1
            moment = f"seed {SEED}, kill {fired}, after {seconds:.4f} s"
            if out.exists() and out.read_bytes() != expected:
                wrong.append(f"{moment}: half a file")
            is_kept = part_paths(out)[1].exists()  # else it was killed when all was done
            continued += any(report.resumed for report in run(opened(PATIENT), out))
            twice = asked_twice(hub, folder) if is_kept else 0
            most = max(most, twice)
            if out.read_bytes() != expected:
                wrong.append(f"{moment}: other bytes than without a kill")
            if any(path.exists() for path in part_paths(out)):
                wrong.append(f"{moment}: something is left over")
            # What was written and not yet told of is one tensor and the next.
            if twice > most_twice(folder, tensors=2):
                wrong.append(f"{moment}: {twice} chunks were asked for twice")
            if fired == n_kills:
                break
    sys.stdout.write(f"{fired} kills, {continued} runs continued, {most} chunks twice at most, {len(wrong)} wrong\n")
    assert not wrong
    assert fired == n_kills
    assert continued > 0
