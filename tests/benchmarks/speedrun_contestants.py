"""Who runs against us in the speedrun: transformers.Trainer, and nanochat from a checkout of it.

    python tests/benchmarks/speedrun_contestants.py trainer|nanochat JOB.json

Each in a process of its own, as its user starts it. JOB.json: {"recipe", "store", "result", and for nanochat "checkout",
"rates"}; writes {"parameters", "matrix_parameters", "tokens", "eval_loss", "bits_per_byte", "train_seconds"} to `result`.
"""
import json
import math
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import torch  # noqa: E402

import stentor_utils as su  # noqa: E402


def measured(model, recipe, store, matrices: int, seconds: float) -> dict:
    """What a contestant came to, by `evaluate`, as ours."""
    ids, text_bytes = store.validation()
    found = su.evaluate(model, ids, text_bytes, block_size=recipe.block_size, batch_size=recipe.per_device_eval_batch_size)
    return {"parameters": sum(p.numel() for p in model.parameters()), "matrix_parameters": matrices,
            "tokens": recipe.total_tokens, "eval_loss": found["loss"], "bits_per_byte": found["bits_per_byte"],
            "train_seconds": seconds}


def layer_matrices(model) -> int:
    return sum(p.numel() for name, p in model.named_parameters() if ".layers." in name and p.ndim == 2)


class Rows(torch.utils.data.Dataset):
    """The rows of a run in the order in which our loop reads them."""

    def __init__(self, store, recipe):
        self.store, self.recipe = store, recipe

    def __len__(self):
        return self.recipe.sequences_to_train

    def __getitem__(self, i):
        step, place = divmod(i, self.recipe.total_batch_size)
        row = self.store.batch(step)["input_ids"][place]
        return {"input_ids": row, "labels": row}


def run_trainer(recipe, store, mixed: bool) -> dict:
    """The recipe in transformers.Trainer: the same model with its precision techniques, rows, order, AdamW, schedule.

    mixed: bf16 autocast, as our loop; else as Trainer is by default on a CPU, in FP32.
    """
    from transformers import Trainer, TrainingArguments, get_cosine_schedule_with_warmup

    class InOrder(Trainer):
        def _get_train_sampler(self, *_, **__):
            return torch.utils.data.SequentialSampler(self.train_dataset)

    model = su.build_model(recipe.shape, recipe.seed, initialization=recipe.initialization)
    su.apply_precision_recipe(model, fp32_norms=recipe.fp32_norms, fp32_critical_layers=recipe.fp32_critical_layers,
                              fp32_softmax=recipe.fp32_softmax, int8_qat=recipe.int8_qat)
    optimizer = torch.optim.AdamW(su.parameter_groups(model, recipe.weight_decay), lr=recipe.learning_rate,
                                  betas=(recipe.adam_beta1, recipe.adam_beta2), eps=recipe.adam_epsilon)
    schedule = get_cosine_schedule_with_warmup(optimizer, recipe.warmup_steps, recipe.schedule_steps)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, max_steps=recipe.total_steps, per_device_train_batch_size=recipe.per_device_train_batch_size,
            gradient_accumulation_steps=recipe.gradient_accumulation_steps, max_grad_norm=recipe.max_grad_norm,
            save_strategy="no", report_to="none", disable_tqdm=True, use_cpu=True, seed=recipe.seed,
            bf16=mixed and recipe.mixed_precision == "bf16")
        trainer = InOrder(model=model, args=arguments, train_dataset=Rows(store, recipe), optimizers=(optimizer, schedule))
        began = time.monotonic()
        trainer.train()
    return measured(model, recipe, store, layer_matrices(model), time.monotonic() - began)


class Logits(torch.nn.Module):
    """A nanochat model as `evaluate` calls one."""

    def __init__(self, gpt):
        super().__init__()
        self.gpt = gpt

    def forward(self, input_ids, use_cache=False):
        return SimpleNamespace(logits=self.gpt(input_ids))


def run_nanochat(recipe, store, checkout: str, rates: float) -> dict:
    """nanochat's own model and optimiser over our rows, by the schedules and defaults of its scripts/base_train.py.

    Equal width, layers and heads, its own head and value embeddings; `rates` multiplies its rates, which are for batches
    of 524,288 tokens; its weight decay, a function of its own budget, is left out. Nothing of it is copied here.
    """
    sys.path.insert(0, checkout)
    from nanochat.gpt import GPT, GPTConfig

    shape, steps = recipe.shape, recipe.total_steps
    torch.manual_seed(recipe.seed)
    gpt = GPT(GPTConfig(sequence_len=recipe.block_size, vocab_size=shape.vocab_size, n_layer=shape.num_hidden_layers,
                        n_head=shape.num_attention_heads, n_kv_head=shape.num_key_value_heads, n_embd=shape.hidden_size,
                        window_pattern="L"))
    gpt.init_weights()
    optimizer = gpt.setup_optimizer(unembedding_lr=0.008 * rates, embedding_lr=0.3 * rates, matrix_lr=0.02 * rates,
                                    scalar_lr=0.5 * rates)
    cooling = round(0.65 * steps)
    began = time.monotonic()
    for step in range(steps):
        ids = store.batch(step)["input_ids"]
        gpt(ids[:, :-1], ids[:, 1:].contiguous()).backward()
        left = (steps - step) / max(1, cooling)
        share = min(1.0, (step + 1) / 40, left + (1 - left) * 0.05 if left < 1 else 1.0)
        momentum = 0.85 + 0.12 * min(1.0, step / 400) if left >= 1 else 0.97 * left + 0.90 * (1 - left)
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * share
            if group["kind"] == "muon":
                group["momentum"] = momentum
        optimizer.step()
        gpt.zero_grad(set_to_none=True)
    seconds = time.monotonic() - began
    matrices = sum(p.numel() for p in gpt.transformer.h.parameters() if p.ndim == 2)
    return measured(Logits(gpt), recipe, store, matrices, seconds)


def main(kind: str, path: str) -> None:
    job = json.loads(Path(path).read_text())
    recipe = su.Recipe.from_dict(job["recipe"])
    store = su.TokenStore(job["store"], recipe)
    if kind == "nanochat":
        result = run_nanochat(recipe, store, job["checkout"], job["rates"])
    else:
        result = run_trainer(recipe, store, mixed=job["mixed"])
    assert math.isfinite(result["eval_loss"]), result
    su.write_atomically(Path(job["result"]), json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
