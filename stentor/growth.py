"""A small Llama becomes a larger one, its knowledge carried over exactly, or as the Stentor-Big card says.

A LlamaForCausalLM, or a Qwen3ForCausalLM that differs from one by its q_norm and k_norm only (Shape.qk_norm).
Function-preserving growth: for every text the same logits to rounding. With x the residual stream, d -> D its width:

    width       x -> (x, 0). RMSNorm then divides by a mean over D numbers instead of d, so its weight is
                multiplied by sqrt(d / D) and its epsilon by d / D. What writes to x (embedding, o_proj,
                down_proj) gets rows of zeros; what reads x gets random columns, which meet zeros now and give
                every new unit a gradient of its own.
    heads       new query heads are random, and o_proj does not listen to them yet. A query head keeps its
                key-value head; where groups get smaller, that head is copied for each part of its group.
    qk_norm     its weights, of head_dim, stay. Its epsilon is the residual's, so q_proj and k_proj are multiplied
                by sqrt(d / D): each head is normed anyway.
    SwiGLU      new rows of gate_proj and up_proj are random, the new columns of down_proj zero.
    depth       a new layer writes nothing yet (o_proj and down_proj zero), so it is the identity.
    vocabulary  new rows are the mean of the old ones and some noise; the old tokens' logits stay.

So every new unit begins with random inputs and an output of zero: the function stays, and from the second step on no
two of them learn the same (tests/test_growth.py).
"""
from __future__ import annotations

import dataclasses
import math

import torch

from stentor.files import ParameterError
from stentor.model import build_model
from stentor.shapes import Shape

STD = 0.02                                            # of new words' noise: the cards' initialisation


@torch.no_grad()
def grow_model(model, shape: Shape, *, layers="spread", function_preserving: bool = True, seed: int = 42):
    """`model` grown to `shape`: a new one, in fp32 on the CPU; `model` stays as it is.

    layers: where the new layers stand, as for `layer_origins`. function_preserving: the same logits for every
    text; the result's rms_norm_eps is the model's times old / new hidden_size. False is the Stentor-Big card's
    way as far as it says: blocks copied "where possible", the rest random. The result's `copied_parameters` counts
    what was carried over (a key-value head that was copied twice, twice). Raises ParameterError with every reason
    why it cannot be.
    """
    if problems := model_problems(model) or growth_problems(shape_of(model), shape, layers):
        raise ParameterError(problems)
    old = shape_of(model)
    narrower = old.hidden_size / shape.hidden_size if function_preserving else 1.0
    grown = build_model(dataclasses.replace(shape, rms_norm_eps=old.rms_norm_eps * narrower), seed,
                        attn_implementation=model.config._attn_implementation,
                        eos_token_id=model.config.eos_token_id, bos_token_id=model.config.bos_token_id)
    grown.copied_parameters = 0
    origins = layer_origins(old.num_hidden_layers, shape.num_hidden_layers, layers)
    targets = dict(grown.named_parameters())
    for name, source, rows, columns, rest in matrices(model, old, shape, origins, function_preserving):
        if rest == "zero":
            targets[name].zero_()
        if source is not None:
            place = torch.tensor(rows)[:, None], torch.tensor(columns)
            normed = old.qk_norm and name.endswith(("q_proj.weight", "k_proj.weight"))
            targets[name][place] = source.float().cpu() * (math.sqrt(narrower) if normed else 1.0)
            grown.copied_parameters += source.numel()
    if function_preserving:                           # new words begin as the average of the old ones
        for table in {id(end.weight): end.weight for end in ends(grown)}.values():
            words = table[old.vocab_size:, :old.hidden_size]
            words.normal_(0, STD).add_(table[:old.vocab_size, :old.hidden_size].mean(0))
    for name, source, scale in norms(model, origins, narrower):
        targets[name].fill_(scale)
        if source is not None:
            targets[name].fill_(scale * source.float().mean())
            targets[name][:len(source)] = scale * source.float().cpu()
            grown.copied_parameters += source.numel()
    return grown


def ends(model) -> tuple:
    """The embedding and the head of a model; one tensor where they are tied."""
    return model.get_input_embeddings(), model.get_output_embeddings()


def matrices(model, old: Shape, new: Shape, origins: list, function_preserving: bool):
    """(name in the grown model, what is copied or None, its rows, its columns, the rest) of every matrix.

    The rest is "random", as built, where it reads the residual stream or is not listened to yet, "zero" where it
    writes; without function_preserving it is random everywhere.
    """
    state, silent = model.state_dict(), "zero" if function_preserving else "random"
    width, inner, dim = range(old.hidden_size), range(old.intermediate_size), range(old.head_dim)
    query, kept = head_places(old, new)
    if not function_preserving:                       # blocks as they stand
        query, kept = range(old.num_attention_heads), range(old.num_key_value_heads)
    queries = [head * old.head_dim + i for head in query for i in dim]
    keys = [place * old.head_dim + i for place, head in enumerate(kept) if head is not None for i in dim]
    key_sources = [head * old.head_dim + i for head in kept if head is not None for i in dim]
    blocks = {"self_attn.q_proj": (queries, width, "random"), "self_attn.k_proj": (keys, width, "random"),
              "self_attn.v_proj": (keys, width, "random"), "self_attn.o_proj": (width, queries, silent),
              "mlp.gate_proj": (inner, width, "random"), "mlp.up_proj": (inner, width, "random"),
              "mlp.down_proj": (width, inner, silent)}
    for place, origin in enumerate(origins):
        for block, (rows, columns, rest) in blocks.items():
            source = None if origin is None else state[f"model.layers.{origin}.{block}.weight"]
            if source is not None and rows is keys:
                source = source[key_sources]
            yield f"model.layers.{place}.{block}.weight", source, rows, columns, rest
    words = state["model.embed_tokens.weight"]
    yield "model.embed_tokens.weight", words, range(old.vocab_size), width, silent
    if not new.tie_word_embeddings:
        head = words if old.tie_word_embeddings else state["lm_head.weight"]
        yield "lm_head.weight", head, range(old.vocab_size), width, "random"


def norms(model, origins: list, narrower: float):
    """(name in the grown model, the old weight or None, the factor it gets) of every RMSNorm."""
    state, wider = model.state_dict(), math.sqrt(narrower)
    scales = {"input_layernorm": wider, "post_attention_layernorm": wider}
    if shape_of(model).qk_norm:                      # over a head: as wide as before
        scales |= {"self_attn.q_norm": 1.0, "self_attn.k_norm": 1.0}
    for place, origin in enumerate(origins):
        for name, scale in scales.items():
            source = None if origin is None else state[f"model.layers.{origin}.{name}.weight"]
            yield f"model.layers.{place}.{name}.weight", source, scale
    yield "model.norm.weight", state["model.norm.weight"], wider


# The kinds of model in config.json, and whether they have q_norm and k_norm.
KINDS = {"llama": False, "qwen3": True}


def model_problems(model) -> list[str]:
    """One sentence for each reason why a model, or its config, is none that a Shape describes whole; what it has
    besides would be lost without a word."""
    config = getattr(model, "config", model)
    if config.model_type not in KINDS:
        return [f"a {config.model_type} cannot be grown; only {' and '.join(KINDS)} models can."]
    rope = getattr(config, "rope_parameters", None) or {}
    own = {"attention_bias": False, "mlp_bias": False, "hidden_act": "silu", "use_sliding_window": False,
           "head_dim": config.hidden_size // config.num_attention_heads}
    wrong = [f"its config.json has {name} = {getattr(config, name)!r}; only {wanted!r} can be grown."
             for name, wanted in own.items() if getattr(config, name, wanted) != wanted]
    if rope.get("rope_type", "default") != "default":
        wrong.append(f"its config.json has rope_type = {rope['rope_type']!r}; only 'default' can be grown.")
    return wrong


def shape_of(model) -> Shape:
    """The Shape of a model, or of its config, that has no `model_problems`."""
    config = getattr(model, "config", model)
    same = {field.name: getattr(config, field.name) for field in dataclasses.fields(Shape)
            if field.name not in ("rope_theta", "qk_norm")}
    return Shape(**same, rope_theta=config.rope_parameters["rope_theta"],
                 qk_norm=KINDS[config.model_type])


def growth_problems(old: Shape, new: Shape, layers="spread") -> list[str]:
    """One sentence for each reason why a model of shape `old` cannot become one of shape `new`."""
    if problems := new.problems():
        return problems
    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
             "num_key_value_heads", "vocab_size", "max_position_embeddings")
    wrong = [f"{name} = {getattr(new, name):,} is less than the model's {getattr(old, name):,}; growing never takes "
             "away." for name in sizes if getattr(new, name) < getattr(old, name)]
    if wrong:
        return wrong
    if new.head_dim != old.head_dim:
        wrong.append(f"head_dim would become {new.head_dim} where the model has {old.head_dim}; RoPE and the "
                     f"attention's scale depend on it: take num_attention_heads = hidden_size / {old.head_dim}.")
    if new.rope_theta != old.rope_theta:
        wrong.append(f"rope_theta = {new.rope_theta:g} is not the model's {old.rope_theta:g}; positions would be "
                     "read anew.")
    if new.qk_norm != old.qk_norm:
        wrong.append(f"qk_norm = {new.qk_norm} where the model has {old.qk_norm}; with other norms its attention "
                     "would be another.")
    if new.tie_word_embeddings and not old.tie_word_embeddings:
        wrong.append("tie_word_embeddings = True cannot be had from a model whose two embeddings differ; leave it "
                     "False.")
    if (needed := heads_needed(old, new)) > new.num_key_value_heads:
        wrong.append(f"num_key_value_heads = {new.num_key_value_heads} is too few: groups of {group(new)} query "
                     f"heads need {needed} to keep what {old.num_key_value_heads} groups of {group(old)} did.")
    try:
        layer_origins(old.num_hidden_layers, new.num_hidden_layers, layers)
    except ValueError as error:
        wrong.append(str(error))
    return wrong


def larger_shape(shape: Shape) -> Shape:
    """`shape` enlarged as Stentor-Big's card enlarged Stentor-30M's: twice as wide, 10 / 7 as deep."""
    return dataclasses.replace(
        shape, hidden_size=2 * shape.hidden_size, intermediate_size=2 * shape.intermediate_size,
        num_attention_heads=2 * shape.num_attention_heads,
        num_key_value_heads=2 * shape.num_key_value_heads,
        num_hidden_layers=max(shape.num_hidden_layers + 1, round(shape.num_hidden_layers * 10 / 7)))


def layer_origins(old: int, new: int, layers="spread") -> list[int | None]:
    """For each of `new` layers the old layer that it is, or None for a new one.

    layers: "spread" (new ones evenly in between), "end", "start", or the places (from 0) of the new layers.
    Raises ValueError for any other.
    """
    count = new - old
    places = {"end": range(old, new), "start": range(count),
              "spread": [(2 * i + 1) * new // (2 * count) for i in range(count)]}
    chosen = list(places.get(layers, ())) if isinstance(layers, str) else list(layers)
    if len(set(chosen) & set(range(new))) != count or len(chosen) != count:
        raise ValueError(f"layers = {layers!r} must be \"spread\", \"end\", \"start\" or the {count} different places "
                         f"of the new layers, from 0 to {new - 1}.")
    olds = iter(range(old))
    return [None if place in chosen else next(olds) for place in range(new)]


def copied_share(grown) -> float:
    """The share of a grown model's parameters that its small one's were copied to."""
    return grown.copied_parameters / sum(parameter.numel() for parameter in grown.parameters())


def group(shape: Shape) -> int:
    """Query heads that share a key-value head."""
    return shape.num_attention_heads // shape.num_key_value_heads


def heads_needed(old: Shape, new: Shape) -> int:
    """Key-value heads that the old ones become where groups get smaller."""
    return old.num_key_value_heads * math.ceil(group(old) / group(new))


def head_places(old: Shape, new: Shape) -> tuple[list[int], list[int | None]]:
    """(new place of each old query head, old head that each new key-value head is a copy of, or None)."""
    before, after = group(old), group(new)
    parts = math.ceil(before / after)                 # key-value heads that an old group becomes
    query = []
    for head in range(old.num_attention_heads):
        key_value, inside = divmod(head, before)
        query.append((key_value * parts + inside // after) * after + inside % after)
    filled = old.num_key_value_heads * parts
    kept = [head // parts if head < filled else None for head in range(new.num_key_value_heads)]
    return query, kept
