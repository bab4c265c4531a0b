"""The model: a stock LlamaForCausalLM, or Qwen3ForCausalLM, freshly initialised; and sampling from
it."""
from __future__ import annotations

import math

import torch
from torch import nn

from stentor.files import ParameterError
from stentor.inference import recommended
from stentor.shapes import Shape, count_parameters
from stentor.stock import stock_classes
from stentor.tokenizer import tokenizer_fit

# Sampling where neither a folder nor a recipe says how: the Stentor2-12M card's favourite.
GENERATION = recommended()


def build_model(shape: Shape, seed: int = 42, *, initialization: str = "normal",
                attn_implementation: str = "sdpa", eos_token_id: int | None = None,
                bos_token_id: int | None = None):
    """A freshly initialised transformers.LlamaForCausalLM of this shape (with qk_norm a
    Qwen3ForCausalLM), fp32, on the CPU. Same seed, same weights."""
    config_class, model_class = (stock_classes(part)[shape.qk_norm]
                                 for part in ("Config", "ForCausalLM"))
    biases = {"attention_bias": False} | ({} if shape.qk_norm else {"mlp_bias": False})
    config = config_class(
        vocab_size=shape.vocab_size, hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_hidden_layers, num_attention_heads=shape.num_attention_heads,
        num_key_value_heads=shape.num_key_value_heads, head_dim=shape.head_dim,
        max_position_embeddings=shape.max_position_embeddings, rms_norm_eps=shape.rms_norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta},
        tie_word_embeddings=shape.tie_word_embeddings, hidden_act="silu", **biases,
        eos_token_id=eos_token_id, bos_token_id=bos_token_id, pad_token_id=eos_token_id,
        attn_implementation=attn_implementation)
    torch.manual_seed(seed)
    model = model_class(config)
    model.generation_config.update(**GENERATION)      # what its saved folder will tell its users
    initialize_weights(model, residual_scaled=initialization == "residual_scaled",
                       zero_projections=initialization == "zero_projections")
    total = sum(parameter.numel() for parameter in model.parameters())
    assert total == count_parameters(shape), (total, count_parameters(shape))
    return model


def initialize_weights(model, std: float = 0.02, residual_scaled: bool = False,
                       zero_projections: bool = False) -> None:
    """The cards' initialisation: Linear and Embedding normal(0, 0.02), RMSNorm 1.

    What writes to the residual stream, o_proj and down_proj, may differ: residual_scaled (Stentor3
    card, after GPT-2) has std / sqrt(2 x layers) there, 0.00408 at 12 layers; zero_projections
    (modded-nanogpt) 0: each layer begins as the identity.
    """
    residual_std = std
    if residual_scaled:
        residual_std = std / math.sqrt(2 * model.config.num_hidden_layers)
    if zero_projections:
        residual_std = 0.0
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.Embedding)):
            if name == "lm_head" and model.config.tie_word_embeddings:
                continue                              # the embedding's own tensor
            writes = name.endswith(("o_proj", "down_proj"))
            nn.init.normal_(module.weight, 0.0, residual_std if writes else std)
        elif "rmsnorm" in type(module).__name__.lower():
            nn.init.ones_(module.weight)


def generate(model, tokenizer, prompts: list[str], *, max_new_tokens: int = 60, seed: int = 42,
             **settings) -> list[str]:
    """One continuation of each prompt (without the prompt), sampled as the model's folder says.

    settings: of transformers' generate, before the folder's (see sampling_of).
    An empty prompt continues from EOS, which in training stands before each document. Raises
    ParameterError for a prompt that is no text, or a tokenizer of more tokens than the model has
    rows, before any is continued.
    """
    if problems := prompt_problems(prompts) + tokenizer_fit(tokenizer, model.config.vocab_size):
        raise ParameterError(problems)
    texts, settings = [], {**sampling_of(model), **settings}
    was_training = model.training
    model.eval()
    for i, prompt in enumerate(prompts):
        torch.manual_seed(seed + i)
        ids = tokenizer(prompt, add_special_tokens=False)["input_ids"] or [tokenizer.eos_token_id]
        ids = torch.tensor([ids], device=model.device)
        with torch.inference_mode():
            out = model.generate(
                ids, attention_mask=torch.ones_like(ids),
                max_length=ids.shape[1] + max_new_tokens, use_cache=True,
                pad_token_id=tokenizer.eos_token_id, **settings)
        texts.append(tokenizer.decode(out[0, ids.shape[1]:].tolist(), skip_special_tokens=True))
    model.train(was_training)
    return texts


def sampling_of(model) -> dict:
    """What the model's generation_config recommends; GENERATION where it says nothing of it."""
    said = model.generation_config.to_diff_dict()
    names = (*GENERATION, "top_k", "min_p", "typical_p", "no_repeat_ngram_size")
    return {name: said[name] for name in names if said.get(name) is not None} or dict(GENERATION)


def prompt_problems(prompts) -> list[str]:
    """One sentence for each prompt that is not a text; an empty one is a text, it continues from
    EOS."""
    if not isinstance(prompts, (list, tuple)):
        return [f"prompts = {prompts!r} must be a list of texts."]
    return [f"prompts[{i}] = {prompt!r} must be a text (\"\" continues from EOS)."
            for i, prompt in enumerate(prompts) if not isinstance(prompt, str)]
