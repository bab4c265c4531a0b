"""What a run trains: the model with its precision techniques, its optimiser, and the average of
the weights where one is kept."""
from __future__ import annotations

import torch

from stentor.checkpoints import checkpoint_tensors, restore, weights_sha256
from stentor.engine import Engine
from stentor.folders import save_model_folder
from stentor.inference import recommended
from stentor.model import build_model
from stentor.optimizers import update_ema, weights_swapped
from stentor.precision import apply_precision_recipe
from stentor.recipes import Recipe


class Learner:
    """The model on its devices, and all that moves with it.

    model: the module that is measured and saved; parallel: what a step calls; names: {parameter:
    its name} of those that are trained; averages: of these, in the same order, or [].
    """

    def __init__(self, engine: Engine, recipe: Recipe, tokenizer, model, say):
        """model: one that is built already; None: one of the recipe's shape and precision."""
        self.engine, self.recipe, self.tokenizer = engine, recipe, tokenizer
        if tokenizer is not None:                     # saved with it; truncation goes by it
            tokenizer.model_max_length = recipe.shape.max_position_embeddings
        self.start_weights, self.precision = {}, {"notes": []}
        if model is not None:                         # its weights belong to the run's fingerprint
            self.start_weights = {"start_weights": weights_sha256(model)}
        else:
            model = self._build()
        if recipe.gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        self.model = engine.place(model).train()
        self.optimizer = engine.optimizer(self.model, recipe, say)
        self.names = {parameter: name for name, parameter in self.model.named_parameters()
                      if parameter.requires_grad}
        self.averages = []
        if recipe.ema_decay:
            self.averages = [parameter.detach().clone() for parameter in self.names]
        self.parallel = engine.prepare(self.model, recipe.torch_compile)

    def _build(self):
        recipe, tokenizer, special = self.recipe, self.tokenizer, {}
        if tokenizer is not None:
            special = {"eos_token_id": tokenizer.eos_token_id,
                       "bos_token_id": tokenizer.bos_token_id}
        model = build_model(
            recipe.shape, recipe.seed, initialization=recipe.initialization,
            attn_implementation=self.engine.attention(recipe.attn_implementation), **special)
        model.generation_config.update(**recommended(recipe.name))   # what its folders will say
        self.precision = apply_precision_recipe(
            model, fp32_norms=recipe.fp32_norms, fp32_critical_layers=recipe.fp32_critical_layers,
            fp32_softmax=recipe.fp32_softmax, int8_qat=recipe.int8_qat)
        return model

    @property
    def size(self) -> int:
        """Parameters of the model."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    @property
    def trainable(self) -> int:
        return sum(parameter.numel() for parameter in self.names)

    def step(self, batch: dict, per_device: int) -> bool | None:
        """One optimiser step over the global batch; whether it was done (see Engine.step)."""
        done = self.engine.step(self.parallel, self.optimizer, batch, per_device)
        if done and self.averages:
            decay, updates = self.recipe.ema_decay, self.engine.updates - 1
            update_ema(self.averages, list(self.names), decay, updates)
        return done

    def averaged(self):
        """A context in which the model is the average of its weights, where one is kept."""
        return weights_swapped(list(self.names), self.averages)

    def save(self, folder) -> None:
        """The (averaged) model as a Hugging Face folder."""
        with self.averaged():
            save_model_folder(self.engine.on_cpu(self.model), self.tokenizer, folder)

    def tensors(self) -> dict[str, dict[str, torch.Tensor]]:
        """What a checkpoint holds of it, on the CPU."""
        tensors = checkpoint_tensors(self.model, self.optimizer, self.names)
        if self.averages:
            tensors["ema"] = {name: average.cpu()
                              for name, average in zip(self.names.values(), self.averages)}
        return tensors

    def put_back(self, tensors: dict) -> None:
        """Weights, optimiser and average of a checkpoint."""
        restore(self.model, self.optimizer, self.names, tensors)
        for name, average in zip(self.names.values(), self.averages):
            average.copy_(tensors["ema"][name])
