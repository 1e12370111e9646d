"""`llamita generate`: continue a prompt, and write the text to stdout as it comes."""

import sys
from typing import Annotated

import typer

from llamita.commands import console
from llamita.commands.options import (
    AdapterPath,
    Context,
    DraftFrom,
    DrawSeed,
    FloatMath,
    Greedy,
    Json,
    KvCache,
    Model,
    Revision,
    Scheme,
    Speculate,
    Temperature,
    Threads,
    TopP,
)
from llamita.commands.show import describe, show_stream, summary
from llamita.commands.sources import ADAPTER, load_with_adapter, read_prompt
from llamita.engine.requests import DEFAULT_SPECULATE, Options
from llamita.engine.weights import FLOAT_MATHS

_Prompt = Annotated[str, typer.Option(help="The text to continue; '-' reads it from stdin.")]
_MaxTokens = Annotated[int, typer.Option(help="Most tokens to generate.")]
_TopK = Annotated[int | None, typer.Option(help="Draw from the k likeliest tokens; 0 for all.")]
_MinP = Annotated[float | None, typer.Option(help="Drop tokens less likely than this times the likeliest.")]
_Penalty = Annotated[float | None, typer.Option(help="Repeat less, with a number above 1.")]
_Stop = Annotated[list[str] | None, typer.Option(help="End before this text; repeatable.")]


def command(
    model: Model,
    prompt: _Prompt,
    max_tokens: _MaxTokens = 256,
    revision: Revision = None,
    greedy: Greedy = False,
    temperature: Temperature = None,
    top_k: _TopK = None,
    top_p: TopP = None,
    min_p: _MinP = None,
    repetition_penalty: _Penalty = None,
    seed: DrawSeed = None,
    stop: _Stop = None,
    speculate: Speculate = DEFAULT_SPECULATE,
    draft_from: DraftFrom = None,
    scheme: Scheme = None,
    threads: Threads = None,
    context: Context = None,
    kv_cache: KvCache = None,
    float_math: FloatMath = FLOAT_MATHS[0],
    adapter: AdapterPath = None,
    as_json: Json = False,
) -> None:
    """Continue a prompt. The text goes to stdout as it comes, speeds go to stderr.

    Sampling options that are not given are those that the model recommends. With --json, one JSON object
    comes at the end instead.

    Example: llamita generate embedded --prompt "Once upon a time" --max-tokens 100
    """
    text = read_prompt(prompt)
    llm = load_with_adapter(
        model, adapter, scheme=scheme, threads=threads, context=context, kv_dtype=kv_cache, float_math=float_math,
        draft_from=draft_from,
    )  # fmt: skip
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
