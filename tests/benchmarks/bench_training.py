"""Training speed and memory: our step against transformers.Trainer and a plain PyTorch loop, and what its parts cost.

    python tests/benchmarks/bench_training.py [--only ours precision overhead corpus] [--rounds 5] [--shapes 1.5M 12.3M]

Prints Markdown tables and writes outputs/benchmarks/training.json; never fails on a number. Each contestant is a process
of its own, ours with the environment that `launch` sets. They take turns, a few steps each, over several rounds; the
others sleep meanwhile. A ratio is taken within a round, so that a busy machine slows both of its sides.
"""
import argparse
import dataclasses
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import numpy as np  # noqa: E402
import torch  # noqa: E402

import stentor.checkpoints  # noqa: E402
import stentor.engine  # noqa: E402
import stentor.process  # noqa: E402
import stentor_utils as su  # noqa: E402
from stentor.launch import machine  # noqa: E402
from stentor.shapes import training_flops  # noqa: E402
from tokenmonster_hf import TokenMonsterTokenizer, Vocabulary  # noqa: E402

STEPS = {"1.5M": 8, "12.3M": 4}                       # timed steps a turn
CONTESTANTS = {"ours": "ours, as `launch` starts it", "ours-compiled": "ours, torch_compile and eager attention",
               "ours-fp32": "ours without autocast",
               "plain": "plain PyTorch loop, fp32", "trainer": "transformers.Trainer, defaults",
               "trainer-fast": "Trainer, bf16 + torch_compile",
               "trainer-fast-eager": "Trainer, bf16 + torch_compile and eager attention"}
NO_TECHNIQUE = {"fp32_norms": False, "fp32_critical_first": 0, "fp32_critical_last": 0, "int8_qat": False,
                "fp32_softmax": False, "attn_implementation": "sdpa", "gradient_checkpointing": False}
TECHNIQUES = {"none": {}, "FP32 norms": {"fp32_norms": True}, "FP32 layers 0 and 1": {"fp32_critical_first": 2},
              "INT8, every linear": {"int8_qat": True}, "eager attention": {"attn_implementation": "eager"},
              "eager attention, FP32 softmax": {"attn_implementation": "eager", "fp32_softmax": True},
              "gradient checkpointing": {"gradient_checkpointing": True}}


def bench_recipe(shape: str) -> su.Recipe:
    """stentor2-12m's CPU twin; at 12.3M the card's own shape and context, with 2 sequences a step."""
    published = su.RECIPES["stentor2-12m"]
    recipe = dataclasses.replace(published.scaled_to("cpu"), sources=(su.Source("prose", "local:prose"),))
    if shape == "12.3M":
        recipe = dataclasses.replace(recipe, shape=published.shape, block_size=1024, per_device_train_batch_size=2,
                                     learning_rate=published.learning_rate)
    return recipe


def make_tokenizer() -> TokenMonsterTokenizer:
    """The most frequent words of local:prose: quick to build and near a real vocabulary in tokens per byte."""
    texts = (json.loads(line)["text"] for line in su.local_corpus("prose").open())
    words = Counter(" " + word for text, _ in zip(texts, range(3000)) for word in text.split()).most_common(3700)
    return TokenMonsterTokenizer(vocabulary=Vocabulary.from_tokens(
        [word for word, _ in words], scores=[n for _, n in words], include="all256"))


# ---------------------------------------------------------------------------------------------------------------------
# In the contestant's process: do as many steps as the line on stdin says, answer with the time they took.


def our_step(recipe, store):
    """What su.train does in a step, with its own parts."""
    model = su.build_model(recipe.shape, recipe.seed, attn_implementation=recipe.attn_implementation)
    su.apply_precision_recipe(model, fp32_norms=recipe.fp32_norms, fp32_critical_layers=recipe.fp32_critical_layers,
                              fp32_softmax=recipe.fp32_softmax, int8_qat=recipe.int8_qat)
    if recipe.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    engine = su.Engine(recipe.mixed_precision)
    optimizer = torch.optim.AdamW(su.parameter_groups(model, recipe.weight_decay), lr=recipe.learning_rate,
                                  betas=(recipe.adam_beta1, recipe.adam_beta2), fused=True)
    parallel, step = engine.prepare(model, recipe.torch_compile), 0

    def one_step():
        nonlocal step
        loss = stentor.engine.accumulate_gradients(parallel, store.batch(step), engine, recipe.per_device_train_batch_size)
        engine.scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.max_grad_norm)
        if torch.isfinite(norm):
            engine.scaler.step(optimizer)
        optimizer.zero_grad(set_to_none=True)
        step += 1
        return loss
    one_step.model, one_step.optimizer = model, optimizer
    return one_step


def plain_step(recipe, store):
    model, step = su.build_model(recipe.shape, recipe.seed).train(), 0
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.95))

    def one_step():
        nonlocal step
        loss = model(**store.batch(step)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        return loss.detach()
    return one_step


def trainer_steps(recipe, store, turns, **told):
    """Trainer.train() with a callback that waits for its turn between steps; same model and rows, its own order."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class Rows(torch.utils.data.Dataset):
        def __len__(self):
            return 4096 * recipe.total_batch_size

        def __getitem__(self, i):
            row = store._block("prose", i)
            return {"input_ids": row.astype(np.int64), "labels": row.astype(np.int64)}

    class Turns(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = not turns.step_done(None)

    with tempfile.TemporaryDirectory() as folder:
        turns.begin()
        model = su.build_model(recipe.shape, recipe.seed, attn_implementation=recipe.attn_implementation)
        Trainer(model=model, train_dataset=Rows(), callbacks=[Turns()],
                args=TrainingArguments(folder, max_steps=4096, save_strategy="no", report_to="none", disable_tqdm=True,
                                       per_device_train_batch_size=recipe.total_batch_size,
                                       learning_rate=recipe.learning_rate, **told)).train()


class Turns:
    """Counts steps; at the end of a turn tells the time it took on stdout and waits for the next on stdin."""

    def __init__(self):
        self.out, self.left, self.loss = os.fdopen(os.dup(1), "w"), 0, None
        os.dup2(2, 1)                                 # whatever a library prints goes to stderr

    def begin(self) -> bool:
        line = sys.stdin.readline()
        self.left, self.wall, self.cpu = int(line or 0), time.perf_counter(), time.process_time()
        return bool(line)

    def step_done(self, loss) -> bool:
        self.left -= 1
        if self.left:
            return True
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(json.dumps({"wall": time.perf_counter() - self.wall, "cpu": time.process_time() - self.cpu,
                          "peak_mb": peak, "loss": None if loss is None else float(loss)}), file=self.out, flush=True)
        return self.begin()


def contest(name: str, shape: str, store_dir: str):
    recipe = bench_recipe(shape)
    technique = name.removeprefix("precision:")
    if technique in TECHNIQUES:
        recipe = dataclasses.replace(recipe, **{**NO_TECHNIQUE, **TECHNIQUES[technique]})
    if name == "ours-fp32":
        recipe = dataclasses.replace(recipe, mixed_precision="no")
    if name == "ours-compiled":
        recipe = dataclasses.replace(recipe, torch_compile=True)
    if name in ("ours-compiled", "trainer-fast-eager"):       # compiled eager attention beats SDPA's CPU kernel
        recipe = dataclasses.replace(recipe, attn_implementation="eager")
    store, turns = su.TokenStore(store_dir, recipe), Turns()
    if name.startswith("trainer"):
        told = {"bf16": su.cpu_has_bf16(), "torch_compile": True, "use_cpu": True} if "fast" in name else {}
        return trainer_steps(recipe, store, turns, **told)
    step = (plain_step if name == "plain" else our_step)(recipe, store)
    if turns.begin():
        while turns.step_done(step()):
            pass


# ---------------------------------------------------------------------------------------------------------------------
# In the parent: start the contestants, let them take turns.


def start(*arguments, ours: bool) -> subprocess.Popen:
    """This file again, as `arguments` say; ours with what `launch` sets, the others as a user starts them."""
    env = {**(stentor.process.PROCESS_ENVIRONMENT if ours else {}), **os.environ, "TOKENIZERS_PARALLELISM": "false"}
    return subprocess.Popen([sys.executable, __file__, *map(str, arguments)], env=env, text=True, stdin=subprocess.PIPE,
                            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)


def turn(process, steps: int) -> dict:
    process.stdin.write(f"{steps}\n")
    process.stdin.flush()
    line = process.stdout.readline()
    if not line:
        raise SystemExit(f"{' '.join(map(str, process.args[1:]))} ended early; run it by hand to see why.")
    return json.loads(line)


def take_turns(names, shape, store_dir, steps: int, rounds: int) -> dict[str, list[dict]]:
    """{name: one answer a round}. Two steps first that do not count: torch.compile, caches, the first page faults."""
    contestants = {name: start("contest", name, shape, store_dir, ours=not name.startswith(("plain", "trainer")))
                   for name in names}
    try:
        for process in contestants.values():
            turn(process, 2)
        turns = {name: [] for name in names}
        for _ in range(rounds):
            for name, process in contestants.items():
                turns[name].append(turn(process, steps))
    finally:
        for process in contestants.values():
            process.stdin.close()
        for process in contestants.values():
            process.wait()
    return turns


def spread(values, form="{:.2f}") -> str:
    return f"{form.format(statistics.median(values))} ({form.format(min(values))} to {form.format(max(values))})"


SHOWN = []                                            # what this part has printed, for training.md


def show(text: str):
    SHOWN.append(text)
    print(text, flush=True)


def table(title: str, head: list[str], rows: list[list]):
    show(f"\n{title}:\n\n| " + " | ".join(head) + " |\n|" + "---|" * len(head))
    for row in rows:
        show("| " + " | ".join(map(str, row)) + " |")


def ratios(of, to, key="wall"):
    return [b[key] / a[key] for a, b in zip(of, to)]


def matmul_peak(dtype) -> float:
    """FLOP/s of a 2,048-cube matmul, the best of ten."""
    a, b = torch.randn(2048, 2048).to(dtype), torch.randn(2048, 2048).to(dtype)
    best = float("inf")
    for _ in range(10):
        began = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - began)
    return 2 * 2048**3 / best


def bench_ours(shape, store_dir, rounds):
    recipe, steps = bench_recipe(shape), STEPS[shape]
    peak = {"bf16": matmul_peak(torch.bfloat16), "fp32": matmul_peak(torch.float32)}
    turns = take_turns(CONTESTANTS, shape, store_dir, steps, rounds)
    rows, result = [], {"matmul_peak_gflops": {k: v / 1e9 for k, v in peak.items()}, "contestants": {}}
    for name, label in CONTESTANTS.items():
        rates = [steps * recipe.tokens_per_step / t["wall"] for t in turns[name]]
        dtype = "bf16" if name not in ("ours-fp32", "plain", "trainer") and su.cpu_has_bf16() else "fp32"
        mfu = statistics.median(rates) * training_flops(recipe.shape, recipe.block_size) / peak[dtype]
        faster, cpu = ratios(turns[name], turns["trainer"]), ratios(turns[name], turns["trainer"], "cpu")
        rows.append([label, spread(rates, "{:,.0f}"), spread(faster), spread(cpu), f"{turns[name][-1]['peak_mb']:,.0f}",
                     f"{mfu:.0%} of {dtype}"])
        result["contestants"][name] = {"turns": turns[name], "tokens_per_second": rates, "speed_to_trainer": faster,
                                       "speed_to_trainer_in_cpu_time": cpu, "mfu": mfu, "mfu_of": dtype}
    table(f"{shape} parameters, {recipe.total_batch_size} x {recipe.block_size:,} tokens a step, {rounds} rounds of {steps} "
          f"steps, {torch.get_num_threads()} threads; matmul peak " + ", ".join(
              f"{name} {value / 1e9:,.0f} GFLOP/s" for name, value in peak.items()),
          ["", "tokens/s: median (min to max)", "speed against Trainer's defaults", "the same in CPU time", "peak RSS, MB",
           "matmul peak used"], rows)
    against = {name: {of: ratios(turns[of], turns[name]) for of in ("ours", "ours-compiled")}
               for name in ("trainer-fast", "trainer-fast-eager", "plain")}
    for name, of in against.items():
        show(f"\nAgainst {CONTESTANTS[name]}: ours {spread(of['ours'])}, with torch_compile {spread(of['ours-compiled'])}.")
    return result | {"ours_to": against}


def bench_precision(shape, store_dir, rounds):
    names = [f"precision:{name}" for name in TECHNIQUES]
    turns = take_turns(names, shape, store_dir, STEPS[shape], rounds)
    cost = {name.removeprefix("precision:"): [1 / r for r in ratios(turns[name], turns[names[0]])] for name in names}
    cpu = {name.removeprefix("precision:"): [1 / r for r in ratios(turns[name], turns[names[0]], "cpu")] for name in names}
    table(f"Cost of each precision technique at {shape} under bf16 autocast: time of a step against none",
          ["technique", "time", "CPU time", "peak RSS, MB"],
          [[name, spread(cost[name]), spread(cpu[name]), f"{turns['precision:' + name][-1]['peak_mb']:,.0f}"] for name in cost])
    return {"time_to_none": cost, "cpu_time_to_none": cpu}


def overhead(store_dir: str):
    """In a process of its own: seconds of a step, an evaluation, a checkpoint and a model folder."""
    recipe, turns = bench_recipe("1.5M"), Turns()
    store = su.TokenStore(store_dir, recipe)
    step, (ids, text_bytes) = our_step(recipe, store), store.validation()
    names = {parameter: name for name, parameter in step.model.named_parameters()}
    step()
    seconds = {}

    def timed(name, function, times):
        began = time.perf_counter()
        for _ in range(times):
            function()
        seconds[name] = (time.perf_counter() - began) / times
    with tempfile.TemporaryDirectory() as folder:
        timed("step", step, 10)
        timed("evaluation", lambda: su.evaluate(step.model, ids, text_bytes, block_size=recipe.block_size,
                                                batch_size=recipe.per_device_eval_batch_size), 2)
        timed("checkpoint", lambda: su.save_checkpoint(
            folder, 1, stentor.checkpoints.checkpoint_tensors(step.model, step.optimizer, names), {"step": 1}), 3)
        timed("best folder", lambda: su.save_model_folder(step.model, None, Path(folder) / "best"), 3)
    print(json.dumps(seconds), file=turns.out, flush=True)


def bench_overhead(store_dir):
    recipe = bench_recipe("1.5M")
    seconds = json.loads(start("overhead", store_dir, ours=True).communicate()[0])
    times = {"step": recipe.total_steps, "evaluation": 2 + (recipe.total_steps - 1) // recipe.eval_steps}
    times |= {"checkpoint": times["evaluation"] - 1, "best folder": times["evaluation"] - 1}     # none at step 0
    times["checkpoint"] += int(recipe.total_steps * seconds["step"] / 60 / recipe.save_every_minutes)
    total = sum(seconds[name] * n for name, n in times.items())
    share = {name: seconds[name] * n / total for name, n in times.items()}
    table(f"A run of {recipe.name}: {recipe.token_budget:,} tokens, {total / 60:.1f} minutes",
          ["", "seconds each", "times", "share of the run"],
          [[name, f"{seconds[name]:.3f}", f"{n:,}", f"{share[name]:.1%}"] for name, n in times.items()])
    return {"seconds": seconds, "times": times, "share": share}


# ---------------------------------------------------------------------------------------------------------------------
# Corpus size: real text repeated to 10 and 200 MB, each document numbered so that no two are equal.


def write_corpus(path: Path, megabytes: float):
    texts = [json.loads(line)["text"] for line in su.local_corpus("prose").open()]
    size, i = 0, 0
    with open(path, "w") as file:
        while size < megabytes * 1e6:
            size += file.write(json.dumps({"text": f"Document {i}. {texts[i % len(texts)]}"}) + "\n")
            i += 1


def prepare(corpus: str, store_dir: str, tokenizer_dir: str):
    """In a process of its own: fill a store; answer with seconds, tokens and peak memory."""
    turns, tokenizer = Turns(), su.load_tokenizer(tokenizer_dir)
    tokenizer.encode("compile")
    began = time.perf_counter()
    su.prepare_tokens([su.Source("prose", corpus)], tokenizer, store_dir, tokens_per_source={"prose": 10**12},
                      validation_documents=150, shard_tokens=1 << 20, progress=lambda text: None)
    seconds = time.perf_counter() - began
    tokens = json.loads((Path(store_dir) / "manifest.json").read_text())["sources"]["prose"]["tokens"]
    print(json.dumps({"seconds": seconds, "tokens": tokens,
                      "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}), file=turns.out, flush=True)


def bench_corpus(folder: Path, sizes, rounds):
    make_tokenizer().save_pretrained(folder / "tokenizer")
    result = {}
    for size in sizes:
        write_corpus(folder / f"{size}.jsonl", size)
        result[size] = json.loads(start("prepare", folder / f"{size}.jsonl", folder / f"store-{size}", folder / "tokenizer",
                                        ours=True).communicate()[0])
    # Both trainings side by side, in turns, so that only the size of the store differs.
    training = {size: start("contest", "ours", "1.5M", folder / f"store-{size}", ours=True) for size in sizes}
    turns = {size: [] for size in sizes}
    for process in training.values():
        turn(process, 2)
    for _ in range(rounds):
        for size, process in training.items():
            turns[size].append(turn(process, STEPS["1.5M"]))
    for process in training.values():
        process.communicate()
    tokens = STEPS["1.5M"] * bench_recipe("1.5M").tokens_per_step
    for size in sizes:
        result[size] |= {"training_peak_mb": turns[size][-1]["peak_mb"],
                         "training_tokens_per_second": [tokens / t["wall"] for t in turns[size]],
                         "training_tokens_per_cpu_second": [tokens / t["cpu"] for t in turns[size]]}
    table("Corpus size", ["corpus, MB", "tokens", "prepare: tokens/s", "prepare: peak RSS, MB", "train: tokens/s",
                          "train: tokens per CPU second", "train: peak RSS, MB"],
          [[size, f"{r['tokens']:,}", f"{r['tokens'] / r['seconds']:,.0f}", f"{r['peak_mb']:,.0f}",
            spread(r["training_tokens_per_second"], "{:,.0f}"), spread(r["training_tokens_per_cpu_second"], "{:,.0f}"),
            f"{r['training_peak_mb']:,.0f}"] for size, r in result.items()])
    small, large = result[sizes[0]], result[sizes[-1]]
    show(f"\n{sizes[-1]} MB against {sizes[0]} MB: peak memory of prepare_tokens {large['peak_mb'] / small['peak_mb']:.3f}, "
          f"of training {large['training_peak_mb'] / small['training_peak_mb']:.3f}.")
    return result


def main():
    if sys.argv[1:2] and sys.argv[1] in ("contest", "overhead", "prepare"):
        return {"contest": contest, "overhead": overhead, "prepare": prepare}[sys.argv[1]](*sys.argv[2:])
    parts = ("ours", "precision", "overhead", "corpus")
    arguments = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    arguments.add_argument("--only", nargs="+", choices=parts, default=parts)
    arguments.add_argument("--shapes", nargs="+", choices=list(STEPS), default=list(STEPS))
    arguments.add_argument("--rounds", type=int, default=5)
    arguments.add_argument("--megabytes", type=int, nargs="+", default=[10, 200])
    arguments.add_argument("--out", type=Path, default=ROOT / "outputs/benchmarks/training.json")
    given = arguments.parse_args()

    before = json.loads(given.out.read_text()) if given.out.exists() else {}         # parts not run now stay
    result = {**before, "machine": machine(),
              "torch": torch.__version__, "threads": torch.get_num_threads(), "load_at_start": os.getloadavg()}
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        if set(given.only) != {"corpus"}:
            su.prepare_tokens([su.Source("prose", "local:prose")], make_tokenizer(), folder / "store",
                              tokens_per_source={"prose": 1_500_000}, validation_documents=150, progress=lambda text: None)
        every = [(part, shape) for part in parts for shape in (STEPS if part in ("ours", "precision") else [None])]
        for part, shape in every:
            if part not in given.only or shape not in (None, *given.shapes):
                continue
            SHOWN.clear()
            name = f"{part} {shape}" if shape else part
            if part == "ours":
                result[name] = bench_ours(shape, folder / "store", given.rounds)
            elif part == "precision":
                result[name] = bench_precision(shape, folder / "store", given.rounds)
            elif part == "overhead":
                result[name] = bench_overhead(folder / "store")
            else:
                result[name] = bench_corpus(folder, given.megabytes, given.rounds)
            given.out.parent.mkdir(parents=True, exist_ok=True)
            show(f"\nLoad average at the end: {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores.")
            result["markdown"] = {**result.get("markdown", {}), name: "\n".join(SHOWN)}
            su.write_atomically(given.out, json.dumps(result, indent=1))
            names = [" ".join(filter(None, pair)) for pair in every]
            texts = [result["markdown"][name] for name in names if name in result["markdown"]]
            su.write_atomically(given.out.with_suffix(".md"), "\n".join(texts) + "\n")
    print(f"\nload average {os.getloadavg()[0]:.1f}; written to {given.out}")


if __name__ == "__main__":
    main()
