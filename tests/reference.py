"""The same weights in transformers: the oracle for logits."""

from pathlib import Path

import numpy as np
import pytest

from llmq.config import ModelConfig

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")


def _halves(w: np.ndarray, n_heads: int) -> np.ndarray:
    """Rows of a q or k matrix with rotary pairs as neighbours -> pairs half a head apart (Hugging Face's layout)."""
    head_dim = w.shape[0] // n_heads
    return w.reshape(n_heads, head_dim // 2, 2, -1).swapaxes(1, 2).reshape(w.shape)


def reference_logits(config: ModelConfig, weights: dict[str, np.ndarray], ids: list[int]) -> np.ndarray:
    """float32 logits [n, vocab] of Hugging Face's Mistral or Mixtral with these weights (GGUF names)."""
    common = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.dim,
        "intermediate_size": config.ffn_dim,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": 4096,
        "rms_norm_eps": config.rms_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_base},
        "sliding_window": config.window or None,
        "tie_word_embeddings": config.tied_embeddings,
        "attn_implementation": "eager",
    }
    if config.n_experts:
        settings = transformers.MixtralConfig(
            **common, num_local_experts=config.n_experts, num_experts_per_tok=config.n_experts_used
        )
        model = transformers.MixtralForCausalLM(settings)
    else:
        model = transformers.MistralForCausalLM(transformers.MistralConfig(**common))
    state = model.state_dict()
    for name, value in _renamed(config, weights, set(state)).items():
        assert state[name].shape == value.shape, (name, state[name].shape, value.shape)
        state[name] = torch.from_numpy(np.ascontiguousarray(value))
    model.load_state_dict(state)
    model.eval()
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].numpy()


def _renamed(config: ModelConfig, weights: dict[str, np.ndarray], names: set[str]) -> dict[str, np.ndarray]:
    found = {
        "model.embed_tokens.weight": weights["token_embd.weight"],
        "model.norm.weight": weights["output_norm.weight"],
        "lm_head.weight": weights["token_embd.weight" if config.tied_embeddings else "output.weight"],
    }
    for i in range(config.n_layers):
        theirs, ours = f"model.layers.{i}.", f"blk.{i}."
        w = lambda name, ours=ours: weights[f"{ours}{name}.weight"]  # noqa: E731
        found |= {
            f"{theirs}input_layernorm.weight": w("attn_norm"),
            f"{theirs}post_attention_layernorm.weight": w("ffn_norm"),
            f"{theirs}self_attn.q_proj.weight": _halves(w("attn_q"), config.n_heads),
            f"{theirs}self_attn.k_proj.weight": _halves(w("attn_k"), config.n_kv_heads),
            f"{theirs}self_attn.v_proj.weight": w("attn_v"),
            f"{theirs}self_attn.o_proj.weight": w("attn_output"),
        }
        if config.n_experts:
            gate_up = np.concatenate([w("ffn_gate_exps"), w("ffn_up_exps")], axis=1)
            found |= {
                f"{theirs}mlp.gate.weight": w("ffn_gate_inp"),
                f"{theirs}mlp.experts.gate_up_proj": gate_up,
                f"{theirs}mlp.experts.down_proj": w("ffn_down_exps"),
            }
        else:
            for name in ("gate", "up", "down"):
                found[f"{theirs}mlp.{name}_proj.weight"] = w(f"ffn_{name}")
    unknown = found.keys() ^ names
    assert not unknown, unknown
    return found


def load_config(path: Path) -> ModelConfig:
    from llmq.config import read_config
    from llmq.gguf import open_gguf

    with open_gguf(path) as gguf:
        return read_config(gguf)
