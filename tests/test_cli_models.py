"""list, show and quantize on real small files, and every command on hostile ones."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from checkpoints import write_checkpoint
from cli_runs import llmq
from hostile import HOSTILE
from tiny import tiny_gguf

from llmq.catalog import CatalogEntry, catalog
from llmq.formats import F16, F32, Q4_K, Q6_K, Q8_0
from llmq.gguf import GGUFWriter, TensorSpec, open_gguf

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LLMQ_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("LLMQ_DEBUG", raising=False)
    folder = tmp_path / "home" / "models"
    folder.mkdir(parents=True)
    return folder


def test_list_names_every_model_and_its_size(models, capsys) -> None:
    tiny_gguf(models / "dense.gguf", format=Q8_0)
    tiny_gguf(models / "mixed.gguf", n_experts=4, format={"ffn_up_exps.weight": F16, "": Q4_K})
    (models / "damaged.gguf").write_bytes(b"GGUF\x03\x00\x00\x00\xff")
    code, out, err = llmq(capsys, "list")
    assert code == 0
    header, *lines = [line for line in out.splitlines() if not line.startswith("storyteller")]
    assert header.split() == ["NAME", "SIZE", "LAST", "USED", "MODEL"]
    assert [line.split()[0] for line in lines] == ["damaged", "dense", "mixed"]
    assert "is damaged" in lines[0]
    assert lines[1].split("  ")[-1].strip() == "1.4 M weights, dense, mostly Q8_0"
    assert lines[2].split("  ")[-1].strip() == "3.7 M weights, 4 experts, 2 used a token, mostly F16"
    assert str(models) in err


@pytest.mark.parametrize("option", ["--available", "--all", "-a"])
def test_available_lists_the_catalog(capsys, option) -> None:
    code, out, err = llmq(capsys, "list", option)
    assert (code, err) == (0, "")
    lines = out.splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("mixtral-8x7b "))
    assert lines[at].split() == ["mixtral-8x7b", "46.7", "B", "28.3", "GB", "32k", "v1", "Apache-2.0", "yes"]
    assert lines[at + 1].startswith("  mistralai/Mixtral-8x7B-Instruct-v0.1; also mixtral, ")
    assert max(map(len, lines)) <= 100
    assert "storyteller" not in out
    assert "mistralai" not in llmq(capsys, "list")[1]


def test_what_cannot_run_yet_comes_last_with_its_reason(capsys) -> None:
    out = llmq(capsys, "list", "--available")[1]
    runs, *others = out.split("\nNOT YET RUN BY LLMQ: ")
    unsupported = [entry for entry in catalog() if entry.unsupported]
    assert len(others) == len({entry.unsupported for entry in unsupported})
    for entry in catalog():
        part = next((part for part in others if part.startswith(f"{entry.unsupported}\n")), runs)
        assert (part is runs) != bool(entry.unsupported)
        assert f"\n{entry.name} " in part


def test_available_as_json_has_everything(capsys) -> None:
    code, out, err = llmq(capsys, "list", "--available", "--json")
    assert (code, err) == (0, "")
    shown = {each["name"]: each for each in json.loads(out)}
    assert list(shown) == [entry.name for entry in catalog()]
    mistral, nemo = shown["mistral-7b"], shown["mistral-nemo"]
    assert (mistral["n_weights"], mistral["repo"]) == (7_248_023_552, "mistralai/Mistral-7B-Instruct-v0.3")
    assert "mistral" in mistral["aliases"]
    assert (mistral["gated"], mistral["instruct"], mistral["unsupported"]) == (True, True, "")
    assert "Tekken" in nemo["unsupported"]
    assert set(shown["mixtral-8x7b"]) == {
        *(field.name for field in dataclasses.fields(CatalogEntry)), "n_weights", "q4_k_m_bytes",
    }  # fmt: skip


def test_the_users_models_are_listed_and_cannot_act_on_the_terminal(models, capsys) -> None:
    user = models.parent / "models.toml"
    aliases = ", ".join(f"'{'x' * 60}{n}'" for n in range(9))
    user.write_text(f"[mistral-7b]\nlicence = 'very long, ' # 1\naliases = [{aliases}]\nunsupported = 'it is mine'\n")
    code, out, _ = llmq(capsys, "list", "-a")
    assert code == 0
    assert "NOT YET RUN BY LLMQ: it is mine\nmistral-7b " in out
    assert max(map(len, out.splitlines())) <= 100
    user.write_text('[mistral-7b]\nlicence = "\\u001b[2J"\n')
    code, out, err = llmq(capsys, "list", "-a")
    assert (code, out) == (2, "")
    assert "[mistral-7b] has a wrong licence" in err
    assert err.count("\n") == 1
    assert llmq(capsys, "list")[0] == 0


def test_show_states_the_shape(models, capsys) -> None:
    tiny_gguf(models / "a.gguf", n_experts=4, window=64, format=Q4_K)
    code, out, err = llmq(capsys, "show", "a")
    assert (code, err) == (0, "")
    shown = dict(line.split(maxsplit=1) for line in out.splitlines())
    assert shown["file"] == str(models / "a.gguf")
    assert shown["heads"] == "8 of 32, 2 for keys and values"
    assert shown["context"] == "4096 tokens"
    assert shown["window"] == "64 tokens"
    # 2 layers, keys and values, 2 heads of 32, 2 bytes each: 512 bytes a token.
    assert shown["cache"] == "512 B a token, 32.8 kB when full"
    assert shown["tensors"] == "16 Q4_K, 7 F32"


def test_show_has_all_of_how_a_file_was_made(tmp_path, capsys) -> None:
    tiny_gguf(tmp_path / "a.gguf", n_layers=1, format=F16)
    types = [f"blk.0.attn_{role}=q8_0" for role in ("q", "k", "v", "output")] * 6
    words = [word for each in types for word in ("--tensor-type", each)]
    assert llmq(capsys, "quantize", tmp_path / "a.gguf", "--fast", *words)[0] == 0
    code, out, _ = llmq(capsys, "show", "a-q4_k_m")
    assert code == 0
    lines = out.splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("made as"))
    last = next(i for i, line in enumerate(lines) if i > first and not line.startswith(" "))
    made_as = " ".join(line.removeprefix("made as").strip() for line in lines[first:last])
    assert made_as == f"q4_k_m, fast; {'; '.join(types)}"
    assert max(map(len, lines[first:last])) < 120


def test_what_a_file_says_of_itself_cannot_act_on_the_terminal(models, capsys) -> None:
    plain = models / "plain.gguf"
    tiny_gguf(plain, format=Q8_0)
    name = "nice\x1b]0;owned\x07\x9b2J\u202e\r\n[/INST]"
    with open_gguf(plain) as gguf:
        specs = [TensorSpec(info.name, info.shape, info.format) for info in gguf.tensors.values()]
        with GGUFWriter(models / "evil.gguf", gguf.metadata | {"general.name": name}, specs) as out:
            for spec in specs:
                out.write(spec.name, gguf.data(spec.name))
    code, shown, _ = llmq(capsys, "show", "evil")
    assert code == 0
    assert all(character == "\n" or character.isprintable() for character in shown)
    assert "[/INST]" in shown
    (models / "a\x1b[2Jb.gguf").write_bytes(b"GGUF")
    for arguments in (["list"], ["show", models / "a\x1b[2Jb.gguf"]):
        _, shown, err = llmq(capsys, *arguments)
        assert "\x1b" not in shown + err


def test_quantize_puts_a_checkpoint_into_the_store(models, tmp_path, capsys) -> None:
    source = tmp_path / "my-checkpoint"
    write_checkpoint(source)
    code, out, err = llmq(capsys, "quantize", source, "--type", "Q8_0")
    assert code == 0, err
    assert out == f"{models / 'my-checkpoint-q8_0.gguf'}\n"
    assert "llmq chat my-checkpoint-q8_0" in err
    assert "-> Q8_0" in err
    with open_gguf(models / "my-checkpoint-q8_0.gguf") as gguf:
        assert gguf.tensors["blk.0.attn_q.weight"].format is Q8_0
    assert llmq(capsys, "show", "my-checkpoint-q8_0")[0] == 0


@pytest.mark.parametrize(
    ("source", "made"), [("plain.gguf", "plain-q8_0"), ("big-F16.gguf", "big-q8_0"), ("x.bf16.gguf", "x-q8_0")]
)
def test_quantize_names_what_it_makes_of_a_gguf_file(models, tmp_path, capsys, source, made) -> None:
    tiny_gguf(tmp_path / source, format=F16)
    code, out, err = llmq(capsys, "quantize", tmp_path / source, "-q", "q8_0")
    assert code == 0, err
    assert out == f"{models / made}.gguf\n"


def test_quantize_writes_where_it_is_told(models, tmp_path, capsys) -> None:
    tiny_gguf(tmp_path / "a.gguf", format=F16)
    code, out, err = llmq(capsys, "quantize", tmp_path / "a.gguf", "-o", tmp_path / "b.gguf", "--type", "f32")
    assert code == 0, err
    assert out == f"{tmp_path / 'b.gguf'}\n"
    assert f"llmq chat {tmp_path / 'b.gguf'}" in err
    assert not list(models.iterdir())


def test_quantize_gives_single_tensors_another_type(models, tmp_path, capsys) -> None:
    tiny_gguf(tmp_path / "a.gguf", format=F16)
    types = ("--tensor-type", "attn_(k|v)=Q8_0", "--tensor-type", "attn=f32")
    code, _, err = llmq(capsys, "quantize", tmp_path / "a.gguf", "--type", "q6_k", *types)
    assert code == 0, err
    with open_gguf(models / "a-q6_k.gguf") as gguf:
        assert gguf.tensors["blk.0.attn_k.weight"].format is gguf.tensors["blk.0.attn_v.weight"].format is Q8_0
        assert gguf.tensors["blk.0.attn_q.weight"].format is F32
        assert gguf.tensors["blk.0.ffn_up.weight"].format is Q6_K


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["a.gguf", "--type", "q4_9"], "no type 'q4_9'"),
        (["a.gguf", "--tensor-type", "attn_v"], "'attn_v' is no tensor type; give REGEX=TYPE"),
        (["a.gguf", "--tensor-type", "attn_v=q4_k_m"], "no tensor type 'q4_k_m'"),
        (["a.gguf", "--tensor-type", "attn_(=q8_0"], "'attn_(' is no regular expression"),
        (["a.gguf", "--tensor-type", "(?\x1b)\udcff=q8_0"], "is no regular expression"),
        (["a.gguf", "--tensor-type", "norm=q8_0"], "'norm' matches no tensor that is quantized"),
        (["nowhere"], "nowhere"),
        (["a.gguf", "-o", "a.gguf"], "a.gguf"),
        (["with space.gguf"], "not a model name; give the file to write with -o"),
        ([], "SOURCE"),
    ],
)
def test_quantize_refuses_in_one_line(models, tmp_path, capsys, monkeypatch, arguments, said) -> None:
    monkeypatch.chdir(tmp_path)
    tiny_gguf(tmp_path / "a.gguf", format=F16)
    tiny_gguf(tmp_path / "with space.gguf", format=F16)
    before = (tmp_path / "a.gguf").read_bytes()
    code, out, err = llmq(capsys, "quantize", *arguments)
    assert (code, out) == (2, "")
    assert said in err
    assert err.count("\n") == 1
    assert (tmp_path / "a.gguf").read_bytes() == before
    assert not list(models.iterdir())


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_quantizer_that_is_stopped_can_go_on(models, tmp_path, capsys, number, code) -> None:
    tiny_gguf(tmp_path / "a.gguf", n_layers=40, format=F16)
    command = [sys.executable, "-m", "cli.main", "quantize", str(tmp_path / "a.gguf"), "--type", "q8_0"]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stderr is not None
        while "->" not in child.stderr.readline():
            assert child.poll() is None
        child.send_signal(number)
        rest = child.stderr.read()
    assert child.returncode == code
    assert "Traceback" not in rest
    assert rest.splitlines()[-1] == "stopped; the same command goes on from here"
    assert sorted(path.name for path in models.iterdir()) == ["a-q8_0.gguf.part", "a-q8_0.gguf.part.journal"]
    code, _out, err = llmq(capsys, "quantize", tmp_path / "a.gguf", "--type", "q8_0")
    assert code == 0
    lines = [line for line in err.splitlines() if "->" in line]
    done = [line.endswith(", done before") for line in lines]
    assert done[0]
    assert done == sorted(done, reverse=True)
    assert [path.name for path in models.iterdir()] == ["a-q8_0.gguf"]
    with open_gguf(models / "a-q8_0.gguf") as gguf:
        assert len(gguf.tensors) == len(lines)


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_get_one_line_from_every_command(models, tmp_path, capsys, name) -> None:
    parts, error, _ = HOSTILE[name]
    path = tmp_path / "hostile.gguf"
    path.write_bytes(b"".join(parts))
    for arguments in (
        ["show", path], ["fit", path], ["run", "-m", path, "hello"], ["quantize", path, "-o", tmp_path / "out.gguf"],
    ):  # fmt: skip
        code, out, err = llmq(capsys, *arguments)
        assert (code, out) == (error.exit_code, ""), err
        assert err.startswith("llmq: ")
        assert err.count("\n") == 1
        assert len(err) <= 241
        assert "bug in llmq" not in err
        assert err.rstrip("\n").isprintable()
    assert not list(tmp_path.glob("out*"))
    assert not list(models.iterdir())
