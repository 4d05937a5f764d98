"""Training, decoding and mixed batches on one GPU, against the frozen base and PEFT in one run.

    python bench/gpu.py                 # every row
    python bench/gpu.py --only decode   # the rows whose name holds this word

The floor is the frozen base itself: forward plus the gradient of its input for training, forward
for inference. Arms take turns; figures are medians of CUDA events. 8-layer Llama of hidden size
4096 (intermediate 14336, 32 heads, 8 KV heads), bfloat16, rank 16, all linear layers. Launch-bound
rows: 16 layers of hidden size 2048 (intermediate 8192). "graphed" arms are CUDA graphs.
"""

from __future__ import annotations

import argparse
import gc
import re
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from _report import Report

HIDDEN, INNER, LAYERS, RANK = 4096, 14336, 8, 16
Arms = dict[str, Callable[[], Any]]


def base(layers: int = LAYERS, hidden: int = HIDDEN, inner: int = INNER) -> Any:
    """The frozen model, made on the GPU."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=32000,
        use_cache=False,
    )
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = LlamaForCausalLM(shape)
    torch.set_default_dtype(torch.float32)
    return model.requires_grad_(False)


def adapt(library: str, model: Any, count: int = 1, wide: bool = False, **options: Any) -> Any:
    """The model with adapters `a0`, `a1`, …; the first one is active.

    Args:
        wide: float32 adapters, PEFT's default.
    """
    lib = __import__(library)
    config = lib.LoraConfig(r=RANK, target_modules="all-linear", init_lora_weights=False, **options)
    adapted = lib.get_peft_model(model, config, "a0", autocast_adapter_dtype=wide)
    for index in range(1, count):
        adapted.add_adapter(f"a{index}", config, autocast_adapter_dtype=wide)
    return adapted


def train_step(
    model: Any, ids: torch.Tensor, updates: list[Any] | None = None, **more: Any
) -> Callable[[], None]:
    """Forward, loss, backward; gradients are dropped.

    Args:
        updates: parameters that AdamW then takes a step on.
    """
    inner = getattr(model, "get_base_model", lambda: model)()
    embed = inner.get_input_embeddings()
    embeds = embed(ids).detach().requires_grad_()
    optimiser = torch.optim.AdamW(updates, lr=1e-5, fused=True) if updates else None

    def step() -> None:
        model(inputs_embeds=embeds, labels=ids, **more).loss.backward()
        if optimiser is not None:
            optimiser.step()
        embeds.grad = None
        for parameter in model.parameters():
            parameter.grad = None

    return step


def forward(model: Any, ids: torch.Tensor, **more: Any) -> Callable[[], None]:
    """A forward without gradients."""

    @torch.no_grad()
    def run() -> None:
        model(input_ids=ids, logits_to_keep=1, **more)

    return run


def measure(arms: Arms, runs: int) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Milliseconds of each arm, run by run in turns, and its peak GiB."""
    times: dict[str, list[float]] = {name: [] for name in arms}
    peaks = {}
    for name, run in arms.items():
        for _ in range(3):
            run()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        peaks[name] = (torch.cuda.max_memory_allocated() - before) / 2**30
    for _ in range(runs):
        for name, run in arms.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            torch.cuda.synchronize()
            times[name].append(start.elapsed_time(end))
    return times, peaks


def training(
    report: Report,
    runs: int,
    title: str,
    shape: tuple[int, int],
    compiled: bool = False,
    **options: Any,
) -> None:
    """A step of the floor, ours and PEFT's on equal models."""
    ids = torch.randint(32000, shape, device="cuda")
    models = {"floor": base()}
    models |= {arm: adapt(arm, base(), **options) for arm in ("multigraft", "peft")}
    if compiled:
        for model in models.values():
            model.compile()
    show(report, title, {arm: train_step(m.train(), ids) for arm, m in models.items()}, runs)


def dora(report: Report, runs: int, title: str, shape: tuple[int, int]) -> None:
    """A step with DoRA and one of AdamW, beside the same with LoRA and with PEFT's DoRA.

    The optimiser's step is part of it: ours takes the norm once for each.
    """
    ids = torch.randint(32000, shape, device="cuda")
    kinds = {
        "floor": None,
        "multigraft, LoRA": ("multigraft", False),
        "multigraft, DoRA": ("multigraft", True),
        "peft, DoRA": ("peft", True),
    }
    arms: Arms = {}
    for name, kind in kinds.items():
        model = base() if kind is None else adapt(kind[0], base(), use_dora=kind[1])
        trained = [p for p in model.parameters() if p.requires_grad]
        arms[name] = train_step(model.train(), ids, updates=trained)
    show(report, title, arms, runs)


def graphed(run: Callable[[], Any]) -> Callable[[], None]:
    """The same work, captured once and replayed."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()

    def replay(keep: Any = run) -> None:  # the graph reads what the work holds
        graph.replay()

    return replay


def launch_bound(report: Report, runs: int, title: str, is_graphed: bool) -> None:
    """A step of 512 tokens on a smaller model, where launches count more than bytes."""
    ids = torch.randint(32000, (1, 512), device="cuda")
    shape = {"layers": 16, "hidden": 2048, "inner": 8192}
    models = {"floor": base(**shape)}
    models |= {arm: adapt(arm, base(**shape)) for arm in ("multigraft", "peft")}
    arms: Arms = {arm: train_step(model.train(), ids) for arm, model in models.items()}
    show(report, title, {k: graphed(v) for k, v in arms.items()} if is_graphed else arms, runs)


def graphed_decode(report: Report, runs: int, title: str, adapters: int) -> None:
    """One token of 64 rows; PEFT's mixed batch waits for the host, so no graph can hold it."""
    ids = torch.randint(32000, (64, 1), device="cuda")
    ours = adapt("multigraft", base(), adapters).eval()
    arms: Arms = {"floor": graphed(forward(base().eval(), ids))}
    with ours.mixed_batch([f"a{row % adapters}" for row in range(64)]):
        arms["multigraft"] = graphed(forward(ours, ids))
        show(report, title, arms, runs)


def attach(report: Report, runs: int, title: str) -> None:
    """64 adapters, one after the other, by the clock; once for each library."""
    for arm in ("multigraft", "peft"):
        model = base()
        torch.cuda.synchronize()
        start = time.perf_counter()
        adapt(arm, model, 64)
        torch.cuda.synchronize()
        ms = (time.perf_counter() - start) * 1e3
        report.row(workload=title, arm=arm, ms=[ms])
        print(f"{title:55} {arm:12} {ms:9.2f} ms", flush=True)


def several(report: Report, runs: int, title: str, shape: tuple[int, int]) -> None:
    """Eight adapters in one step, against the base on all rows and eight steps of PEFT's."""
    ids = torch.randint(32000, shape, device="cuda")
    ours, theirs = (adapt(arm, base(), 8) for arm in ("multigraft", "peft"))
    names = [f"a{i}" for i in range(8)]
    for name in names:
        ours.base_model.set_requires_grad(name)
    singles = [train_step(theirs.train(), ids[i : i + 1]) for i in range(8)]

    def one_after_the_other() -> None:
        for name, step in zip(names, singles, strict=True):
            theirs.set_adapter(name)
            step()

    arms: Arms = {
        "floor": train_step(base().train(), ids),
        "multigraft": train_step(ours.train(), ids, adapter_names=names),
        "peft": one_after_the_other,
    }
    show(report, title, arms, runs)


def inference(
    report: Report, runs: int, title: str, shape: tuple[int, int], adapters: int, peft: bool = True
) -> None:
    """A forward of rows that share one adapter, or of rows with one of their own each."""
    ids = torch.randint(32000, shape, device="cuda")
    frozen = base().eval()
    ours = adapt("multigraft", base(), adapters).eval()
    # Adapters in order, equally many rows of each: rows in another order are gathered first.
    names = [f"a{row * adapters // shape[0]}" for row in range(shape[0])]
    mixed = {"adapter_names": names} if adapters > 1 else {}
    arms: Arms = {"floor": forward(frozen, ids), "multigraft": forward(ours, ids, **mixed)}
    if peft:
        arms["peft"] = forward(adapt("peft", base(), adapters).eval(), ids, **mixed)
    show(report, title, arms, runs)
    if adapters > 1:
        arms = {"floor": forward(frozen, ids), "multigraft": forward(ours, ids)}
        with ours.mixed_batch(names):
            show(report, f"{title}, mixed_batch", arms, runs)


def show(report: Report, title: str, arms: Arms, runs: int) -> None:
    """Rows of one workload, with ratios to its floor."""
    times, peaks = measure(arms, runs)
    floor = sorted(times["floor"])[runs // 2]
    for name, samples in times.items():
        ms = sorted(samples)[runs // 2]
        ratio = round(ms / floor, 3)
        report.row(workload=title, arm=name, ms=samples, of_floor=ratio, GiB=round(peaks[name], 2))
        print(f"{title:55} {name:12} {ms:9.2f} ms {ratio:8.3f}  {peaks[name]:6.2f} GiB", flush=True)


def rows(report: Report, runs: int) -> dict[str, Callable[[], None]]:
    """The issue's table."""
    few = max(runs // 3, 3)
    step = (4, 2048)
    return {
        "training 4 x 2048, bf16 adapters": lambda t: training(report, runs, t, step),
        "training 4 x 2048, fp32 adapters": lambda t: training(report, runs, t, step, wide=True),
        "training 4 x 2048, dropout 0.05": lambda t: training(
            report, runs, t, step, lora_dropout=0.05
        ),
        "training 4 x 2048, compiled": lambda t: training(report, runs, t, step, compiled=True),
        "training 4 x 2048, DoRA and AdamW": lambda t: dora(report, runs, t, step),
        "decode 64 rows, 1 adapter": lambda t: inference(report, runs, t, (64, 1), 1),
        "decode 64 rows, 64 adapters": lambda t: inference(report, few, t, (64, 1), 64),
        "prefill 16 x 1024, 16 adapters": lambda t: inference(report, few, t, (16, 1024), 16),
        "decode 64 rows, 1 adapter, graphed": lambda t: graphed_decode(report, runs, t, 1),
        "decode 64 rows, 8 adapters, graphed": lambda t: graphed_decode(report, runs, t, 8),
        "decode 64 rows, 64 adapters, graphed": lambda t: graphed_decode(report, runs, t, 64),
        "8 adapters in one step, 8 x 256": lambda t: several(report, few, t, (8, 256)),
        "8 adapters in one step, 8 x 1024": lambda t: several(report, few, t, (8, 1024)),
        "launch-bound training": lambda t: launch_bound(report, runs, t, False),
        "launch-bound training, graphed": lambda t: launch_bound(report, runs, t, True),
        "attach 64 adapters": lambda t: attach(report, runs, t),
    }


def profile(title: str) -> None:
    """What the GPU spends a training step on, for the floor and for ours."""
    ids = torch.randint(32000, (4, 2048), device="cuda")
    for name, model in (("floor", base()), ("multigraft", adapt("multigraft", base()))):
        step = train_step(model.train(), ids)
        step()
        with torch.profiler.profile() as found:
            step()
            torch.cuda.synchronize()
        print(title, name)
        print(found.key_averages().table(sort_by="self_device_time_total", row_limit=28))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--only", default="", help="run the rows whose name this regular expression finds"
    )
    parser.add_argument("--runs", type=int, default=30, help="timed runs of each arm")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    report = Report("gpu", __doc__)
    for title, run in rows(report, options.runs).items():
        if re.search(options.only, title):
            try:
                run(title)
            except (RuntimeError, TypeError) as error:  # one row less; the others are still to come
                report.note(f"{title}: no figure ({str(error).splitlines()[0]}).")
                print(title, "failed:", error, flush=True)
            gc.collect()
            torch.cuda.empty_cache()
    report.note(f"Device: {torch.cuda.get_device_name()}.")
    report.write()


if __name__ == "__main__":
    main()
