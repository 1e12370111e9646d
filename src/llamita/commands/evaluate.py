"""`llamita evaluate`: measure what quantization cost, models side by side."""

import contextlib
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import typer

from llamita.commands import console
from llamita.commands.options import ChunkTokens, FloatMath, Json, KvCache, Models, Revision, Text, Threads
from llamita.commands.show import interval_rows, scored
from llamita.commands.sources import convert_first
from llamita.engine.weights import FLOAT_MATHS
from llamita.evaluate import wikitext
from llamita.evaluate.contenders import NO_BASELINE, open_contenders
from llamita.evaluate.scores import CHUNK_TOKENS, Contender, TextScores, default_text, read_text, score_text
from llamita.models.layer_kinds import describe_kinds
from llamita.system.extras import load_optional
from llamita.system.progress import Progress
from llamita.system.threads import remark
from llamita.text.printable import megabytes

HARNESS = "llamita.evaluate.lm_eval"  # imported on use: it needs LM Eval and with it Torch
WIKITEXT = "wikitext"


@dataclass
class _Job:
    """The work to do: a text to score, tasks of LM Eval to run, or both."""

    max_seq_len: int
    limit: int | None
    text_name: str = ""
    text: str | None = None
    whole_chunks: bool = False
    tasks: list[str] = field(default_factory=list)
    pages: Sequence[str] | None = None
    add_bos_token: bool | None = None
    notes: list[str] = field(default_factory=list)


_Baseline = Annotated[
    str | None,
    typer.Option(metavar="SRC", help="Compare with this model, or 'none'; by default the one SRC was made from."),
]
_Tasks = Annotated[str | None, typer.Option(help="Run tasks of LM Eval, separated by commas: wikitext,arc_easy.")]
_Wikitext = Annotated[
    Path | None, typer.Option("--wikitext", metavar="FILE", help="Score this wiki.test.raw in place of the hub's.")
]
_Limit = Annotated[int | None, typer.Option(min=1, help="Use only the first N documents of a task, chunks of a text.")]
_AddBos = Annotated[
    bool | None,
    typer.Option(
        "--add-bos-token/--no-add-bos-token",
        help="Begin texts of tasks with the token for it (BOS); by default as the tokenizer says.",
    ),
]


def command(
    models: Models,
    revision: Revision = None,
    baseline: _Baseline = None,
    tasks: _Tasks = None,
    wikitext_file: _Wikitext = None,
    text: Text = None,
    limit: _Limit = None,
    max_seq_len: ChunkTokens = CHUNK_TOKENS,
    add_bos_token: _AddBos = None,
    threads: Threads = None,
    kv_cache: KvCache = None,
    float_math: FloatMath = FLOAT_MATHS[0],
    json: Json = False,
) -> None:
    """Measure what quantization cost: perplexity, KL divergence from the float model, tasks of LM Eval.

    Without --text and --tasks, the text that ships with llamita is scored. --tasks and --wikitext need LM
    Eval, --text does not. SRC:SCHEME rounds a float model to nearest while it loads: embedded:arm, or
    embedded:arm:256 with its group size. --kv-cache and --float-math leave the baseline as it is.

    Example: llamita evaluate llama-g128 llama-g256 --wikitext wiki.test.raw
    """
    names = _names(tasks, wikitext_file)
    job = _Job(max_seq_len, limit, tasks=names, add_bos_token=add_bos_token)
    if limit:
        job.notes.append(f"--limit {limit}: the figures compare only with others of the same limit")
    found = wikitext.read(wikitext_file) if wikitext_file else None
    harness = _import_harness() if names else None  # before anything that takes time
    _choose_text(job, text, found, str(wikitext_file or "the hub's wikitext"), harness)
    convert_first(*models, None if baseline == NO_BASELINE else baseline, quiet=json)
    with console.progress(quiet=json) as progress:
        how: dict[str, Any] = {"threads": threads, "kv_dtype": kv_cache, "float_math": float_math}
        contenders = open_contenders(models, baseline, **how, progress=progress)
        console.note(remark())
        if job.text is None and not names:
            job.text_name, job.text = "embedded text", default_text(contenders)
        scores = _score(job, contenders, progress)
        results = _run_tasks(job, contenders, harness, progress)
    if json:
        console.print_json(_values(job, contenders, scores, results))
        return
    for note in job.notes:
        console.note(note)
    columns = ["", *(f"{c.name} (float)" if c.llm.scheme is None else c.name for c in contenders)]
    console.print_table("", columns, _rows(job, contenders, scores, results))
    if scores:
        console.note(scored(job.text_name, scores[0].tokens))


def _names(tasks: str | None, wikitext_file: Path | None) -> list[str]:
    names = [name.strip() for name in tasks.split(",")] if tasks else []
    return [WIKITEXT, *names] if wikitext_file and WIKITEXT not in names else names


def _import_harness() -> Any:
    os.environ.setdefault("TQDM_DISABLE", "1")  # LM Eval's progress bars would break into ours
    return load_optional(
        HARNESS,
        "--tasks and --wikitext: expected the package {package}, found none; try pip install 'llamita[torch]' "
        "(in a checkout '.[torch]'), or --text FILE, which needs none",
    )


def _choose_text(job: _Job, text: Path | None, found: wikitext.WikiText | None, name: str, harness: Any) -> None:
    """Put the text to score and the pages of the wikitext task, which come from the hub if not given, into the job."""
    if WIKITEXT in job.tasks:
        if found is None:
            with contextlib.redirect_stdout(sys.stderr):
                found = wikitext.from_pages(harness.wikitext_pages(), name)
        job.text_name = "WikiText-2 test" if found.is_original else name
        job.text, job.whole_chunks, job.pages = found.text, True, found.pages
        job.notes += [found.note] if found.note else []
    if text:
        job.text_name, job.text, job.whole_chunks = str(text), read_text(text), False


def _score(job: _Job, contenders: list[Contender], progress: Progress) -> list[TextScores]:
    if job.text is None:
        return []
    return score_text(
        contenders,
        job.text,
        chunk_tokens=job.max_seq_len,
        whole_chunks=job.whole_chunks,
        limit=job.limit,
        progress=progress,
    )


def _run_tasks(job: _Job, contenders: list[Contender], harness: Any, progress: Progress) -> list[list[Any]]:
    """Return every model's `TaskScores` of `evaluate.lm_eval`."""
    if not job.tasks:
        return [[] for _ in contenders]
    with contextlib.redirect_stdout(sys.stderr):  # stdout is for the answer
        return harness.run_tasks(
            [contender.llm for contender in contenders],
            job.tasks,
            pages=job.pages,
            max_seq_len=job.max_seq_len,
            limit=job.limit,
            add_bos_token=job.add_bos_token,
            progress=progress,
        )


def _values(
    job: _Job, contenders: list[Contender], scores: list[TextScores], results: list[list[Any]]
) -> dict[str, Any]:
    """Return everything as JSON values."""
    models = [
        {
            "name": contender.name,
            "path": str(contender.llm.path),
            "is_baseline": contender.is_baseline,
            "scheme": contender.llm.scheme.to_dict() if contender.llm.scheme else None,
            "kv_cache": contender.llm.kv_dtype,
            "float_math": contender.llm.float_math,
            "weight_bytes": contender.weight_bytes,
            "text": asdict(scores[i]) if scores else None,
            "tasks": [asdict(task) for task in results[i]],
        }
        for i, contender in enumerate(contenders)
    ]
    return {
        "text": {"name": job.text_name, "whole_chunks": job.whole_chunks} if scores else None,
        "lm_eval": metadata.version("lm_eval") if job.tasks else None,
        "max_seq_len": job.max_seq_len,
        "limit": job.limit,
        "add_bos_token": job.add_bos_token,
        "notes": job.notes,
        "models": models,
    }


def _rows(
    job: _Job, contenders: list[Contender], scores: list[TextScores], results: list[list[Any]]
) -> list[list[str]]:
    """Return the table: a row per metric, a column per model."""
    schemes = [c.llm.scheme for c in contenders]
    rows = [
        ["scheme", *(s.name if s else "float" for s in schemes)],
        ["weights in a group", *(_groups(c) for c in contenders)],
        ["weight files", *(megabytes(c.weight_bytes) for c in contenders)],
    ]
    for i, task in enumerate(results[0]):
        for metric in task.metrics:
            label = f"{metric.replace('_', ' ')} (LM Eval)" if task.task == WIKITEXT else f"{task.task} {metric}"
            rows.append([label, *(_with_error(own[i], metric) for own in results)])
    if not scores:
        return rows
    chunk_tokens = min(job.max_seq_len, *(c.llm.context for c in contenders))
    rows.append([f"token perplexity, chunks of {chunk_tokens:,}", *(f"{s.perplexity:.4g}" for s in scores)])
    if any(s.kl for s in scores):
        baseline = "baseline" if schemes[0] else "float model"
        rows += interval_rows(f"  over the {baseline}'s", [s.increase for s in scores], 100, ".2f", "\xa0%")
        rows += interval_rows("mean KL, nats a token", [s.kl for s in scores], 1, ".5f", "")
        rows += interval_rows("top-1 agreement", [s.agreement for s in scores], 100, ".2f", "\xa0%")
    return rows


def _groups(contender: Contender) -> str:
    scheme = contender.llm.scheme
    if scheme is None or not scheme.layers:
        return str(scheme.group_size) if scheme else ""
    return describe_kinds(contender.llm.config, scheme)


def _with_error(task: Any, metric: str) -> str:
    value = f"{task.metrics[metric]:.4f}"
    return f"{value} ± {task.errors[metric]:.4f}" if metric in task.errors else value
