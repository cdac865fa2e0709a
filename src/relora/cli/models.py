"""The verbs that use a model or a run: export, evaluate, generate, chat, report."""

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from relora.cli.options import (
    Device,
    Dtype,
    Json,
    Trust,
    launched,
    print_found,
    print_json,
    processes_to_lead,
)
from relora.errors import UserError

app = typer.Typer()

Adapter = Annotated[
    list[str] | None, typer.Option(help="Folder or run with an adapter, or `base`; may be given several times.")
]
Stop = Annotated[
    list[str] | None, typer.Option(help="Text that ends an answer, and is not printed; may be given several times.")
]

_OPTIONS_OF_DATA_KIND = {
    "data": ("sequence_length", "stride", "tokens", "batch"),
    "instructions": (
        *("template", "prompt_column", "response_column", "limit", "max_new_tokens"),
        *("sequence_length", "batch", "out"),
    ),
    "tasks": ("tasks_folder", "limit", "sequence_length", "batch", "out"),
}
"""Option that says what a model is scored on -> the further options that belong to it."""


@app.command(epilog="Example: relora export runs/quickstart --format gguf --dtype q8_0")
def export(
    run: Annotated[str, typer.Argument(help="Folder of a pretraining run; with --format gguf also a model.")],
    checkpoint: Annotated[int | None, typer.Option(help="Step; by default the newest, of gguf RUN/model.")] = None,
    out: Annotated[Path | None, typer.Option(help="By default RUN/model-STEP or RUN/model-DTYPE.gguf.")] = None,
    form: Annotated[str, typer.Option("--format", help="folder (Hugging Face) or gguf (llama.cpp).")] = "folder",
    dtype: Annotated[str, typer.Option(help="fp32, bf16 or fp16; of gguf also q8_0.")] = "fp32",
    trust_remote_code: Trust = False,
) -> None:
    """Write a pretraining run's checkpoint as a plain Hugging Face model folder, factors merged; or a model as GGUF.

    Of a fine-tuning run, `relora adapters merge RUN/adapter` writes the model folder.
    """
    from relora.export.checkpoint import export as export_folder
    from relora.export.checkpoint import export_gguf

    verbs = {"folder": export_folder, "gguf": export_gguf}
    if form not in verbs:
        raise UserError(f"--format: `{form}` is none of {', '.join(verbs)}")
    print(verbs[form](run, step=checkpoint, out=out, dtype=dtype, trust_remote_code=trust_remote_code))


@app.command(epilog="Example: relora evaluate runs/quickstart --data prepared/quickstart/validation")
def evaluate(
    model: Annotated[str, typer.Argument(help="Run folder, model folder, hub id, or an adapter's folder.")],
    data: Annotated[
        list[str] | None, typer.Option(help="Score on a prepared folder, or raw text; may be given several times.")
    ] = None,
    instructions: Annotated[str | None, typer.Option(help="Score on a set of prompts and responses.")] = None,
    tasks: Annotated[
        list[str] | None, typer.Option(help="Score on a task of lm-evaluation-harness; may be given several times.")
    ] = None,
    adapter: Annotated[str | None, typer.Option(help="Folder or run whose adapter is used.")] = None,
    out: Annotated[Path | None, typer.Option(help="New folder for scores and samples; not with --data.")] = None,
    limit: Annotated[int | None, typer.Option(help="At most so many records; not with --data.")] = None,
    tokens: Annotated[int | None, typer.Option(help="Of --data: score only the first so many tokens.")] = None,
    stride: Annotated[int | None, typer.Option(help="Of --data: tokens a window moves on; by default half.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="Of an answer to --instructions; by default 256.")] = None,
    template: Annotated[str | None, typer.Option(help="Of --instructions: auto, alpaca, chat or plain.")] = None,
    prompt_column: Annotated[str | None, typer.Option(help="Of --instructions, if it has no usual name.")] = None,
    response_column: Annotated[str | None, typer.Option(help="Of --instructions, if it has no usual name.")] = None,
    tasks_folder: Annotated[Path | None, typer.Option(help="Of --tasks: where task files are.")] = None,
    sequence_length: Annotated[int | None, typer.Option(help="Tokens per window or example.")] = None,
    batch: Annotated[int | None, typer.Option(help="Windows, prompts or requests at a time; by default 8.")] = None,
    device: Device = "auto",
    dtype: Dtype = "fp32",
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Score a model: likelihood of text, answers to instructions, or tasks of lm-evaluation-harness."""
    scored_on = {"data": data, "instructions": instructions, "tasks": tasks}
    options: dict[str, Any] = {
        "out": out,
        "limit": limit,
        "tokens": tokens,
        "stride": stride,
        "max_new_tokens": max_new_tokens,
        "template": template,
        "prompt_column": prompt_column,
        "response_column": response_column,
        "tasks_folder": tasks_folder,
        "sequence_length": sequence_length,
        "batch": batch,
    }
    options = {name: value for name, value in options.items() if value is not None}
    kind = _one_kind([name for name, value in scored_on.items() if value], list(options))
    options |= {"adapter": adapter, "device": device, "dtype": dtype, "trust_remote_code": trust_remote_code}
    if kind != "data" and processes_to_lead() is None:
        return
    if kind == "instructions":
        from relora.cli.tables.scores import print_instruction_scores
        from relora.evaluation.instructions import evaluate_instructions

        print_found(evaluate_instructions(model, instructions or "", **options), as_json, print_instruction_scores)
    elif kind == "tasks":
        from relora.cli.tables.scores import print_task_scores
        from relora.evaluation.lm_eval import evaluate_tasks

        print_found(evaluate_tasks(model, tasks or [], **options), as_json, print_task_scores)
    else:
        from relora.cli.tables.scores import print_scores
        from relora.evaluation.perplexity import evaluate_model

        with launched() as prints:
            scores = evaluate_model(model, data or [], **options)
        if prints:
            print_found(scores, as_json, print_scores)


@app.command(epilog='Example: relora generate runs/quickstart --prompt "Once upon a time" --max-new-tokens 100')
def generate(
    model: Annotated[str, typer.Argument(help="Run folder, model folder, hub id, or an adapter's folder.")],
    prompt: Annotated[list[str], typer.Option(help="Text to continue; may be given several times.")],
    adapter: Adapter = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="Also what the base writes without an adapter, and first.")
    ] = False,
    chat: Annotated[bool, typer.Option("--chat", help="Each prompt is a user's turn; print the answer alone.")] = False,
    system: Annotated[str | None, typer.Option(help="With --chat: the system prompt.")] = None,
    stop: Stop = None,
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
    """Continue prompts, with one adapter or several side by side; streams the text and says how fast it went."""
    from relora.inference.decoding import Sampling
    from relora.inference.generate import describe
    from relora.inference.generate import generate as run_generate

    generation = run_generate(
        model,
        prompt,
        Sampling(max_new_tokens, temperature, top_p, top_k, do_sample, repetition_penalty),
        adapters=adapter or [],
        compare=compare,
        chat=chat,
        system=system,
        stop=stop or [],
        seed=seed,
        device=device,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
        write=None if as_json else lambda text: print(text, end="", flush=True),
    )
    if as_json:
        print_json(asdict(generation))
    else:
        print(describe(generation), file=sys.stderr)


@app.command(epilog='Example: relora chat runs/alpaca --system "Answer in one sentence."')
def chat(
    model: Annotated[str, typer.Argument(help="Run folder, model folder, hub id, or an adapter's folder.")],
    adapter: Adapter = None,
    system: Annotated[str | None, typer.Option(help="System prompt.")] = None,
    stop: Stop = None,
    max_new_tokens: Annotated[int, typer.Option(help="Of one answer, at most.")] = 512,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.8,
    top_p: Annotated[float, typer.Option()] = 0.95,
    top_k: Annotated[int, typer.Option(help="0 is no limit.")] = 0,
    do_sample: Annotated[bool, typer.Option("--do-sample/--greedy")] = True,
    repetition_penalty: Annotated[float, typer.Option()] = 1.0,
    seed: Annotated[int, typer.Option()] = 0,
    device: Device = "auto",
    dtype: Dtype = "fp32",
    trust_remote_code: Trust = False,
) -> None:
    """Talk with a model: a line is a question, or /reset /system /adapter /save /help /quit. Ctrl-C ends an answer."""
    from relora.inference.chat import chat as run_chat
    from relora.inference.decoding import Sampling

    speed = run_chat(
        model,
        Sampling(max_new_tokens, temperature, top_p, top_k, do_sample, repetition_penalty),
        adapters=adapter or [],
        system=system,
        stop=stop or [],
        seed=seed,
        device=device,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
    )
    print(speed, file=sys.stderr)


@app.command(epilog="Example: relora report runs/quickstart")
def report(run: Annotated[Path, typer.Argument(help="Run folder, finished or not.")]) -> None:
    """Write RUN/report.html: curves, phases, restarts, samples, in one file."""
    from relora.report.html import write_report

    print(write_report(run))


def _one_kind(kinds: list[str], options: list[str]) -> str:
    """Return the one kind of data that the model is scored on.

    Args:
        kinds: those of `data`, `instructions` and `tasks` that were given.
        options: names of the further options that were given.

    Raises:
        UserError: none or several kinds were given, or an option that belongs to another kind.
    """
    if len(kinds) != 1:
        raise UserError(
            "give one of --data, --instructions and --tasks: what is the model to be scored on? "
            f"(given: {' and '.join(f'--{kind}' for kind in kinds) or 'none'})"
        )
    for name in options:
        if name not in _OPTIONS_OF_DATA_KIND[kinds[0]]:
            owners = " and ".join(f"--{kind}" for kind, names in _OPTIONS_OF_DATA_KIND.items() if name in names)
            raise UserError(f"--{name.replace('_', '-')} belongs to {owners}, not to --{kinds[0]}; leave it out")
    return kinds[0]
