"""A store of one stage of several: its evaluations measure the held-out text of the others too."""
from __future__ import annotations

from stentor.engine import evaluate
from stentor.tokens import TokenStore, held_out_text


class StageStore(TokenStore):
    """A TokenStore whose every evaluation also says how the model does on other stores' held-out text.

    The one loop logs it ("texts" in metrics.jsonl): what a stage forgets is seen while it is forgotten.
    """

    def __init__(self, store_dir, recipe, texts: dict):
        """texts: {name: folder of a token store made by the same tokenizer}."""
        super().__init__(store_dir, recipe)
        self.texts = {name: held_out_text(folder) for name, folder in texts.items()}

    def evaluate(self, model, engine=None) -> dict:
        """The keys of `evaluate` for this store's own text, and "texts": {name: {"loss" in nats/token,
        "bits_per_byte"}}."""
        def measured(ids, text_bytes):
            return evaluate(model, ids, text_bytes, block_size=self.recipe.block_size,
                            batch_size=self.recipe.per_device_eval_batch_size, engine=engine)
        others = {name: measured(*text) for name, text in self.texts.items()}
        kept = ("loss", "bits_per_byte")
        return {**measured(*self.validation()),
                "texts": {name: {key: found[key] for key in kept} for name, found in others.items()}}
