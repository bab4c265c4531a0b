"""The production training step of a TPU recipe, compiled for a real v5e 2x4 by libtpu, without a TPU (`make tpu-aot`).

    .venv-tpu/bin/python tests/benchmarks/aot_tpu.py export  [recipe ...]     the step's graph, as the XLA engine describes it
    .venv-aot/bin/python tests/benchmarks/aot_tpu.py compile [recipe ...]     compiled for eight v5 lite chips

Two environments, because torch_xla 2.9 and the jax that compiles for this topology have each their own libtpu and XLA.
Prints, and writes to outputs/benchmarks/aot_<recipe>.json: memory of one chip (it has 16 GB), flops and bytes of one step
as the compiler counts them, and from these upper bounds on tokens/s, beside the card's 304,000 (published, stentor3-20m).
Peaks of a v5e chip (cloud.google.com/tpu/docs/v5e): 197 TFLOP/s in bf16, 819 GB/s. `recipe@4` sets the micro-batch per chip
to 4.
"""
import dataclasses
import json
import os
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "outputs" / "benchmarks"
PEAK_FLOPS, PEAK_BYTES, CHIPS = 197e12, 819e9, 8


def export(name: str) -> None:
    """Describe one optimiser step of the recipe on eight virtual devices and write it as StableHLO; nothing is computed."""
    os.environ |= {"PJRT_DEVICE": "CPU", "CPU_NUM_DEVICES": str(CHIPS), "TF_CPP_MIN_LOG_LEVEL": "2"}
    sys.path.insert(0, str(ROOT))
    import torch
    import torch_xla.core.xla_model as xm

    import stentor_utils as su
    from stentor.xla import XlaEngine
    recipe_name, _, micro = name.partition("@")
    recipe = su.ALL_RECIPES[recipe_name] if recipe_name != "tiny" else su.RECIPES["stentor3-20m"].scaled_to("cpu")
    if recipe_name == "tiny":
        recipe = dataclasses.replace(recipe, per_device_train_batch_size=1, num_processes=8, mixed_precision="bf16")
    if micro:
        recipe = dataclasses.replace(recipe, per_device_train_batch_size=int(micro),
                                     gradient_accumulation_steps=recipe.total_batch_size // CHIPS // int(micro))
    engine = XlaEngine(recipe.mixed_precision)
    model = su.build_model(recipe.shape, initialization=recipe.initialization, attn_implementation=engine.attention("sdpa"))
    su.apply_precision_recipe(model, fp32_norms=recipe.fp32_norms, fp32_critical_layers=recipe.fp32_critical_layers)
    model = engine.place(model).train()
    optimizer = engine.optimizer(model, recipe)
    engine.begin(recipe, {"updates": 0, "skipped_steps": 0, "window": [0.0, 0]}, print)
    ids = torch.zeros(recipe.total_batch_size, recipe.block_size, dtype=torch.int64)
    per_device = engine.micro_batch(model, {"input_ids": ids}, recipe.per_device_train_batch_size, print)
    batch = engine._upload({"input_ids": ids, "labels": ids}, recipe.total_batch_size)
    engine._describe_step(model, optimizer, batch, per_device)
    text = xm.get_stablehlo([])
    FOLDER.mkdir(parents=True, exist_ok=True)
    (FOLDER / f"aot_{name}.mlir").write_text(text)
    (FOLDER / f"aot_{name}.shape.json").write_text(json.dumps({
        "recipe": recipe.name, "rows": recipe.total_batch_size, "block_size": recipe.block_size, "micro_batch": per_device,
        "parameters": su.count_parameters(recipe.shape), "tokens_per_step": recipe.tokens_per_step,
        "published_tokens_per_second": recipe.published.get("tokens_per_second")}))
    print(f"{name}: {len(text):,} characters of StableHLO", flush=True)
    os._exit(0)                                       # the engine's graph is still pending and is not to be executed


def compile_for_tpu(name: str) -> None:
    os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5litepod-8",
                   "TPU_WORKER_HOSTNAMES": "localhost"}
    import jax
    import numpy as np
    from jax._src.interpreters import mlir
    from jax._src.lib import xla_client
    from jax._src.lib.mlir import ir
    from jax.experimental import topologies
    shape = json.loads((FOLDER / f"aot_{name}.shape.json").read_text())
    text = (FOLDER / f"aot_{name}.mlir").read_text()          # its arguments say how they are cut over the chips
    topology = topologies.get_topology_desc("v5e:2x4", platform="tpu")
    devices = topology.devices
    client = devices[0].client
    options = xla_client.CompileOptions()
    build = options.executable_build_options
    build.num_replicas, build.num_partitions, build.use_spmd_partitioning = 1, CHIPS, True
    build.device_assignment = xla_client.DeviceAssignment.create(np.array([[device.id for device in devices]]))
    started = time.monotonic()
    with mlir.make_ir_context():
        module = ir.Module.parse(text)
        executable = client.compile(module, xla_client.DeviceList(tuple(devices)), options)
    seconds = time.monotonic() - started
    memory = executable.get_compiled_memory_stats()
    cost = executable.cost_analysis()
    cost = cost[0] if isinstance(cost, list) else cost
    live = memory.argument_size_in_bytes + memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    flops, moved = cost.get("flops", 0.0), cost.get("bytes accessed", 0.0)
    bound = {"by flops": shape["tokens_per_step"] / (flops / PEAK_FLOPS),
             "by bytes": shape["tokens_per_step"] / (moved / PEAK_BYTES)}
    result = {**shape, "jax": jax.__version__, "device_kind": devices[0].device_kind, "devices": len(devices),
              "compile_seconds": seconds, "flops_per_chip": flops, "bytes_per_chip": moved,
              "memory_per_chip": {"arguments": memory.argument_size_in_bytes, "temporary": memory.temp_size_in_bytes,
                                  "outputs": memory.output_size_in_bytes, "aliased": memory.alias_size_in_bytes, "total": live},
              "fits_16_GB": live < 16e9, "tokens_per_second_bound": bound}
    (FOLDER / f"aot_{name}.json").write_text(json.dumps(result, indent=1))
    print(f"{name}: {len(devices)} x {devices[0].device_kind}, compiled in {seconds:.0f} s; "
          f"micro-batch {shape['micro_batch']} a chip\n"
          f"  memory of a chip: {live / 1e9:.2f} GB ({memory.temp_size_in_bytes / 1e9:.2f} temporary) of 16\n"
          f"  one step, one chip: {flops / 1e12:.2f} TFLOP, {moved / 1e9:.1f} GB moved\n"
          f"  at most {min(bound.values()):,.0f} tokens/s ({bound['by flops']:,.0f} by flops, "
          f"{bound['by bytes']:,.0f} by bytes); "
          "card: 304,000 for stentor3-20m (published)")


if __name__ == "__main__":
    verb, names = sys.argv[1], sys.argv[2:] or ["stentor3-20m", "stentor3-50m"]
    if len(names) > 1:                                # a process each: the graph of one must not be in the next
        import subprocess
        sys.exit(max(subprocess.call([sys.executable, __file__, verb, name]) for name in names))
    {"export": export, "compile": compile_for_tpu}[verb](names[0])
