"""`llamita generate`: continue a prompt, text on stdout as it comes."""

import sys
from contextlib import closing
from dataclasses import asdict
from io import TextIOWrapper
from pathlib import Path
from typing import Annotated, Any

import typer

from llamita.commands import console
from llamita.commands.sources import convert_first
from llamita.engine.llm import LLM
from llamita.engine.requests import DEFAULT_SPECULATE, Generation, Options, Prompt
from llamita.errors import InputError
from llamita.imports.open import open_source
from llamita.loading import load
from llamita.quantize.lineage import is_made_for
from llamita.system.threads import remark

# Options that `llamita chat` has, too, each with what `--help` says of it.
Temperature = Annotated[float | None, typer.Option(help="Below 1 safer, above 1 wilder; 0 greedy.")]
Speculate = Annotated[int, typer.Option(help="Tokens drafted from the text so far and verified together; 0 for none.")]
Preset = Annotated[str | None, typer.Option(help="Round a float model to this scheme first; none: not at all.")]
Threads = Annotated[int | None, typer.Option(help="Threads of the kernels, 1 to 1024; all by default.")]
Context = Annotated[int | None, typer.Option(help="Tokens at most; by default the model's own.")]
KvCache = Annotated[str | None, typer.Option(help="Keys and values as f32, f16 or int8.")]
AdapterPath = Annotated[
    Path | None, typer.Option("--adapter", "--adaptor", metavar="DIR", help="A low-rank adapter in PEFT's form to use.")
]
ADAPTER = "adapter"  # what the one of --adapter is called


def command(
    model: Annotated[str, typer.Argument(help="A quantized directory, a checkpoint, a hub name or 'embedded'.")],
    prompt: Annotated[str, typer.Option(help="The text to continue; '-' reads it from stdin.")],
    max_tokens: Annotated[int, typer.Option(help="Tokens to generate at most.")] = 256,
    greedy: Annotated[bool, typer.Option("--greedy", help="Always take the likeliest token.")] = False,
    temperature: Temperature = None,
    top_k: Annotated[int | None, typer.Option(help="Draw from the k likeliest tokens; 0 for all.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Draw from the likeliest that sum to this.")] = None,
    min_p: Annotated[float | None, typer.Option(help="Drop tokens below this times the likeliest.")] = None,
    repetition_penalty: Annotated[float | None, typer.Option(help="Above 1: repeat less.")] = None,
    seed: Annotated[int | None, typer.Option(help="Makes the draws repeatable.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="End before this text; may be given again.")] = None,
    speculate: Speculate = DEFAULT_SPECULATE,
    preset: Preset = None,
    threads: Threads = None,
    context: Context = None,
    kv_cache: KvCache = None,
    adapter: AdapterPath = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of the stream.")] = False,
) -> None:
    """Continue a prompt.

    Example: llamita generate embedded --prompt "Once upon a time" --max-tokens 100
    """
    text = read_prompt(prompt)
    llm = load_beside(model, adapter, preset=preset, threads=threads, context=context, kv_dtype=kv_cache)
    options: Options = {
        "max_tokens": max_tokens, "greedy": greedy, "temperature": temperature, "top_k": top_k,
        "top_p": top_p, "min_p": min_p, "repetition_penalty": repetition_penalty, "seed": seed,
        "stop": stop or [], "speculate": speculate, "adapter": adapter and ADAPTER,
    }  # fmt: skip
    if as_json:
        generation = llm.generate(text, **options)
        console.print_json({"model": model, "prompt": text, **describe(generation)})
        return
    generation = show_stream(llm, text, options, [])
    sys.stdout.write("\n")
    console.note(summary(generation))


def load_beside(model: str, adapter: Path | None, **options: Any) -> LLM:
    """`load` with the adapter of --adapter; says so where that was trained on another model."""
    convert_first(model)
    llm = load(model, adapters={} if adapter is None else {ADAPTER: adapter}, **options)
    if adapter is not None and is_made_for(open_source(llm.path), adapter) is False:
        console.note(f"--adapter {adapter}: was trained on another model; answers may be worse than without")
    console.note(remark())
    return llm


def read_prompt(prompt: str) -> str:
    """The prompt itself, or all of stdin for "-".

    Raises:
        InputError: stdin is not UTF-8.
    """
    if prompt != "-":
        return prompt
    data = sys.stdin.buffer.read()
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        found = f"0x{data[error.start]:02x} at byte {error.start}"
        raise InputError("--prompt", "UTF-8 on stdin", f"{found}", "try iconv") from None


def show_stream(llm: LLM, prompt: Prompt, options: Options, shown: list[str]) -> Generation:
    """Write the pieces to stdout as they come, and add them to `shown`; the generation that they make."""
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that is not UTF-8 shows "?" for what it lacks
    with closing(llm.stream(prompt, **options)) as stream:  # stopped, it ends there and then
        for piece in stream:
            if isinstance(piece, Generation):
                return piece
            shown.append(piece)
            sys.stdout.write(piece)
            sys.stdout.flush()
    raise AssertionError("a stream ends with its generation")


def describe(generation: Generation) -> dict[str, object]:
    """A generation as JSON values."""
    timings = generation.timings
    rates = {"prefill_rate": timings.prefill_rate, "decode_rate": timings.decode_rate}
    return {
        "text": generation.text,
        "token_ids": generation.token_ids,
        "finish_reason": generation.finish_reason,
        "timings": {**asdict(timings), **rates},
    }


def summary(generation: Generation) -> str:
    """One line about how it went."""
    t = generation.timings
    reused = f" ({t.reused_tokens} reused)" if t.reused_tokens else ""
    drafts = f" ({t.accepted_tokens} of {t.drafted_tokens} drafted right)" if t.drafted_tokens else ""
    return (
        f"[{generation.finish_reason}] prompt {t.prompt_tokens} tokens{reused} "
        f"at {t.prefill_rate:,.0f} tok/s, first token after {t.first_token_seconds:.3f} s, "
        f"{t.generated_tokens} tokens{drafts} at {t.decode_rate:,.1f} tok/s"
    )
