"""The verbs for a model that is there."""

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from relora.cli.common import Device, Dtype, Json, Trust, print_json

app = typer.Typer()


@app.command(epilog="Example: relora export runs/quickstart --checkpoint 500 --out models/at-500")
def export(
    run: Annotated[Path, typer.Argument(help="Run folder.")],
    checkpoint: Annotated[int | None, typer.Option(help="Step; by default the newest.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder to write; by default RUN/model-STEP.")] = None,
    dtype: Dtype = "fp32",
    trust_remote_code: Trust = False,
) -> None:
    """Write any checkpoint as a plain Hugging Face model folder, factors merged."""
    from relora.recipes.export import export as run_export

    print(run_export(run, step=checkpoint, out=out, dtype=dtype, trust_remote_code=trust_remote_code))


@app.command(epilog="Example: relora evaluate runs/quickstart --data prepared/quickstart/validation")
def evaluate(
    model: Annotated[str, typer.Argument(help="Run folder, model folder or hub id.")],
    data: Annotated[list[str], typer.Option(help="Prepared folder, or raw text; may be given several times.")],
    sequence_length: Annotated[int | None, typer.Option(help="Tokens per window.")] = None,
    stride: Annotated[int | None, typer.Option(help="Tokens a window moves on; by default half of it.")] = None,
    tokens: Annotated[int | None, typer.Option(help="Score only the first so many tokens.")] = None,
    batch: Annotated[int, typer.Option(help="Windows per forward pass.")] = 8,
    device: Device = "auto",
    dtype: Dtype = "fp32",
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Perplexity and bits per byte on prepared folders or raw text (sliding window)."""
    from relora.recipes.evaluate import evaluate_model, print_scores

    scores = evaluate_model(
        model,
        data,
        sequence_length=sequence_length,
        stride=stride,
        tokens=tokens,
        device=device,
        dtype=dtype,
        batch=batch,
        trust_remote_code=trust_remote_code,
    )
    print_json([asdict(score) for score in scores]) if as_json else print_scores(scores)


@app.command(epilog='Example: relora generate runs/quickstart --prompt "Once upon a time" --max-new-tokens 100')
def generate(
    model: Annotated[str, typer.Argument(help="Run folder, model folder or hub id.")],
    prompt: Annotated[list[str], typer.Option(help="Text to continue; may be given several times.")],
    max_new_tokens: Annotated[int, typer.Option()] = 200,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.8,
    top_p: Annotated[float, typer.Option()] = 0.95,
    top_k: Annotated[int, typer.Option(help="0 is no limit.")] = 0,
    do_sample: Annotated[bool, typer.Option("--do-sample/--greedy")] = True,
    repetition_penalty: Annotated[float, typer.Option()] = 1.0,
    seed: Annotated[int, typer.Option()] = 0,
    device: Device = "auto",
    dtype: Dtype = "fp32",
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Continue prompts; streams the text and says how fast it went."""
    from relora.recipes.generate import Sampling, describe
    from relora.recipes.generate import generate as run_generate

    sampling = Sampling(max_new_tokens, temperature, top_p, top_k, do_sample, repetition_penalty)
    write = None if as_json else lambda text: print(text, end="", flush=True)
    generation = run_generate(
        model,
        prompt,
        sampling,
        seed=seed,
        device=device,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
        write=write,
    )
    if as_json:
        print_json(asdict(generation))
    else:
        print(describe(generation), file=sys.stderr)


@app.command(epilog="Example: relora report runs/quickstart")
def report(run: Annotated[Path, typer.Argument(help="Run folder, finished or not.")]) -> None:
    """Write RUN/report.html: curves, phases, restarts, samples, in one file."""
    from relora.report.html import write_report

    print(write_report(run))


@app.command(epilog="Example: relora doctor --json")
def doctor(
    calibrate: Annotated[
        bool, typer.Option("--calibrate", help="Measure the rates that runs choose by anew; on an idle machine.")
    ] = False,
    as_json: Json = False,
) -> None:
    """What this machine has and lacks: versions, devices, dtypes, memory, disk, extras."""
    from relora.recipes.doctor import diagnose, print_diagnosis

    diagnosis = diagnose(calibrate=calibrate)
    print_json(asdict(diagnosis)) if as_json else print_diagnosis(diagnosis)
