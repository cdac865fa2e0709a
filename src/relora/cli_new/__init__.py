"""The command `relora`: one verb, one call.

A user's mistake prints one line and exits with 2; a run that stopped itself exits with 3; a signal with 128 + its
number. Verbs import what they need when they run, so that a misspelt key or `--help` answers before torch is loaded.
"""

import errno
import json
import os
import re
import signal
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from relora.errors import ReloraError, UserError
from relora.mistakes import shown_line

if TYPE_CHECKING:
    from relora.config import RunConfig

app = typer.Typer(
    help="Pretrain language models through low-rank updates: prepare, pretrain, evaluate, generate.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY.SUB=VALUE]...", help="Overrides of single keys.")]
Json = Annotated[bool, typer.Option("--json", help="Print figures as JSON.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps.")]
Dtype = Annotated[str, typer.Option(help="fp32, bf16 or fp16.")]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Run code that comes with the model, if you read it.")]


def main() -> None:
    """Entry point: errors that carry a message for the user become one line on stderr and an exit status."""
    try:
        app(sys.argv[1:] or ["--help"], prog_name="relora", standalone_mode=False)
    except ReloraError as error:
        _fail(str(error), error.exit_status)
    except typer.Exit as end:
        sys.exit(end.exit_code)
    except (typer.Abort, KeyboardInterrupt):
        sys.exit(130)
    except BrokenPipeError:  # `relora ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except OSError as error:  # a path that cannot be, or a disk that fills up in the wrong moment
        if error.errno == errno.ENAMETOOLONG:
            _fail(f"{error.filename}: {error.strerror}", 2)
        _fail(f"{error.filename or 'disk'}: {error.strerror or error}; make room and run the same command again", 3)
    except Exception as error:
        if not hasattr(error, "format_message"):  # what typer raises for a wrong option has one
            raise
        _fail(f"{shown_line(error.format_message())} (`relora --help` lists verbs, `relora VERB --help` options)", 2)


@app.command(epilog="Example: relora prepare books/ --out prepared/books --train-tokenizer 8192 --validation 1%")
def prepare(
    sources: Annotated[list[str], typer.Argument(help="Files, folders or a hub dataset id (id or id:config).")],
    out: Annotated[Path, typer.Option(help="Folder to write; gets train/ and validation/.")],
    tokenizer: Annotated[str | None, typer.Option(help="Tokenizer folder or hub id.")] = None,
    train_tokenizer: Annotated[int | None, typer.Option(help="Train a byte-level BPE of this many ids.")] = None,
    validation: Annotated[str, typer.Option(help="Share of the documents held out, e.g. 1% or 0.01.")] = "1%",
    text_field: Annotated[str, typer.Option(help="The field that holds the text.")] = "text",
    take: Annotated[int | None, typer.Option(help="At most this many documents of each source.")] = None,
    workers: Annotated[int | None, typer.Option(help="Threads that tokenize; by default one a core.")] = None,
    seed: Annotated[int, typer.Option(help="Keys the choice of held-out documents.")] = 0,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Count broken records instead of refusing.")] = False,
    as_json: Json = False,
) -> None:
    """Turn raw text into token files: a train and a validation folder, each with all that training needs."""
    from relora.data.prepare import prepare as run_prepare
    from relora.data.progress import ConsoleProgress

    with ConsoleProgress() as progress:
        report = run_prepare(
            sources,
            out,
            tokenizer=tokenizer,
            train_tokenizer=train_tokenizer,
            validation=_share(validation),
            text_field=text_field,
            take=take,
            workers=workers,
            seed=seed,
            skip_bad=skip_bad,
            progress=progress,
        )
    _print_json(asdict(report)) if as_json else print(report)


@app.command(epilog="Example: relora pretrain configs/quickstart.yaml optimizer.lr=2e-3")
def pretrain(
    config: Annotated[Path, typer.Argument(help="YAML configuration.")],
    overrides: Overrides = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan of the run; build nothing.")] = False,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Start over; what is in the run folder is moved aside.")
    ] = False,
    strict: Annotated[
        bool, typer.Option("--strict", help="Continue from the newest checkpoint and to the last bit, or not at all.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress.")] = False,
    as_json: Json = False,
) -> None:
    """Pretrain by a configuration; on a run folder that holds a checkpoint, continue."""
    # what asks a run for a checkpoint must not end one that has not begun, or has trained its last step
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    settings = _configuration(config, overrides)
    if dry_run:
        from relora.recipes.dry_run import describe, print_plan

        plan = describe(settings)
        _print_json(asdict(plan)) if as_json else print_plan(plan)
        return
    from relora.recipes.pretrain import pretrain as run_pretrain

    result = run_pretrain(settings, fresh=fresh, strict=strict, quiet=quiet or as_json)
    if as_json:
        _print_json(asdict(result))


@app.command(epilog="Example: relora plan configs/quickstart.yaml --fit 6GiB --out fits.yaml")
def plan(
    config: Annotated[Path, typer.Argument(help="YAML configuration.")],
    overrides: Overrides = None,
    fit: Annotated[str | None, typer.Option(help="Find the fastest configuration within so much, e.g. 6GiB.")] = None,
    out: Annotated[Path | None, typer.Option(help="With --fit: file to write it to.")] = None,
    probe: Annotated[bool, typer.Option("--probe", help="Take real steps of each phase; use what they took.")] = False,
    alternatives: Annotated[
        bool, typer.Option("--alternatives", help="Also for other methods, bases and kinds of checkpointing.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Memory by kind and time by phase, before anything is built."""
    from relora.config import to_yaml
    from relora.recipes.plan import as_figures, fitting, make_plan, size_in_bytes, write_config
    from relora.recipes.plan_table import print_plan

    settings = _configuration(config, overrides)
    if out is not None and fit is None:
        raise UserError("--out: writes what --fit finds; give --fit SIZE")
    if out is not None and out.exists():
        raise UserError(f"{out}: is there already and was left as it is; give another --out")
    if out is not None and not out.parent.is_dir():
        raise UserError(f"{out}: there is no folder {out.parent}; make it, or give another --out")
    if fit is not None:
        settings = fitting(settings, size_in_bytes(fit))
    found = make_plan(settings, probed=probe, alternatives=alternatives)
    if out is not None:
        write_config(settings, out)
    if as_json:
        _print_json({**as_figures(found), **({"config": settings.model_dump(mode="json")} if fit else {})})
        return
    if fit is not None and out is None:
        print(to_yaml(settings), end="")
    print_plan(found)


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
    _print_json([asdict(score) for score in scores]) if as_json else print_scores(scores)


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
        _print_json(asdict(generation))
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
    _print_json(asdict(diagnosis)) if as_json else print_diagnosis(diagnosis)


@app.command("config", epilog="Example: relora config configs/quickstart.yaml batch.sequences=32")
def show_config(
    config: Annotated[Path | None, typer.Argument(help="YAML configuration.")] = None,
    overrides: Overrides = None,
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON schema of all keys instead.")] = False,
) -> None:
    """Check a configuration and print it with every default filled in."""
    from relora.config import RunConfig, to_yaml

    if schema:
        print(json.dumps(RunConfig.model_json_schema(), indent=1))
        return
    if config is None:
        raise UserError("give a configuration file, or --schema")
    print(to_yaml(_configuration(config, overrides)), end="")


def _configuration(path: Path, overrides: list[str] | None) -> "RunConfig":
    from relora.config import load_config

    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise UserError("WORLD_SIZE: this version trains in one process; start it without torchrun")
    return load_config(path, overrides or [])


def _share(text: str) -> float:
    """`1%` or `0.01` -> 0.01."""
    try:
        share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        share = -1.0
    if not 0 <= share < 1:
        raise UserError(f"--validation {text}: give a share below 100%, e.g. 1% or 0.01")
    return share


def _print_json(figures: Any) -> None:
    print(json.dumps(figures, indent=1, default=str))


def _fail(message: str, status: int) -> NoReturn:
    # one line, in which a name can neither move the cursor nor fill the screen
    line = "".join(c if c.isprintable() else repr(c)[1:-1] for c in " ".join(message.split()))
    line = re.sub(r"\S{200,}", lambda word: f"{word[0][:60]}...{word[0][-60:]}", line)
    print(f"relora: {line}", file=sys.stderr)
    sys.exit(status)
