"""README.md of what was exported: what it is, and what to do with it; of a program, on a phone."""

from llamita.export.partitioners import BACKENDS
from llamita.models.packed import PackedModel
from llamita.text.chat_template import find_template

CARD = "README.md"
VERSION = "1.4.1"  # of ExecuTorch: programs and runtimes go together
_ANDROID = """## Android

1. In `build.gradle.kts` of the app: `implementation("org.pytorch:executorch-android:{version}")`{android}.
2. Copy program and tokenizer to the device, for a first try with adb:
   ```
   adb shell mkdir -p /data/local/tmp/llama
   adb push model.pte tokenizer.json /data/local/tmp/llama/
   ```
3. In the app, off the main thread:
   ```kotlin
   val llm = LlmModule("/data/local/tmp/llama/model.pte", "/data/local/tmp/llama/tokenizer.json", 0.8f)
   llm.load()
   llm.generate(prompt, {context}, callback, false)
   ```
   `callback` is an `LlmCallback`; an app that ships has the files among its own, not under /data/local/tmp.

Without an app, with a `llama_main` that was built from ExecuTorch {version} for arm64-v8a:
```
adb shell
cd /data/local/tmp/llama && ./llama_main --model_path=model.pte --tokenizer_path=tokenizer.json --prompt="..."
```
"""
_IOS = """## iOS

1. In Xcode, add the Swift package `https://github.com/pytorch/executorch`, branch `swiftpm-{version}`, with
   `executorch_llm`, `{ios}`, `kernels_llm`, `kernels_optimized`, `kernels_quantized` and
   `kernels_torchao`, and the linker flag `-all_load`.
2. Add `model.pte` and `tokenizer.json` to the app's bundle.
3. In the app:
   ```swift
   let runner = TextRunner(modelPath: modelPath, tokenizerPath: tokenizerPath)
   try runner.load()
   try runner.generate(prompt, Config {{ $0.sequenceLength = {context} }}) {{ token in
     print(token, terminator: "")
   }}
   ```
"""


_OWN_BUILD = """, but with an AAR
   built from ExecuTorch's source with the backend `{backend}`: the published one has XNNPACK alone"""
_RAN = """The program was run
in ExecuTorch's runtime on the machine that made it, where `llamita_export.json` has a proof."""
_HAS_NOT_RUN = """The program
itself has not run either: the runtime of `{backend}` is on the device. Try it there before you ship it."""
_STATIC = """
This program takes a token at a time, as compilers for neural processors want it, and leaves activations
float: weights are the packed directory's, what is computed with them is not what llamita's engine computes.
"""


def guide(packed: PackedModel, context: int, backend: str, exceptions: str = "") -> str:
    """The text, for a program of this context and backend, and in what it differs from its source."""
    has_template = find_template(packed.path) is not None
    prompts = (
        "Prompts have to be written as the model's chat template has them; from the packed directory,\n"
        "`python -c 'import llamita; print(llamita.load(PACKED).chat_template.render([...]))'` shows one."
        if has_template
        else "The model has no chat template: it continues a text."
    )
    is_xnnpack, is_apples = backend == "xnnpack", backend == "coreml"
    parts = [_ANDROID] * (not is_apples) + [_IOS] * (is_xnnpack or is_apples)
    steps = "\n".join(parts).format(
        version=VERSION, context=context, ios=f"backend_{backend}",
        android="" if is_xnnpack else _OWN_BUILD.format(backend=backend),
    )  # fmt: skip
    static = _STATIC if BACKENDS[backend].is_static else ""
    ran = _RAN if is_xnnpack else _HAS_NOT_RUN.format(backend=backend)
    source = _name_of(packed)
    return f"""# {source} for ExecuTorch {VERSION}

`model.pte` computes with the very codes and scales of the packed directory that it was made from, for
sequences of up to {context} tokens, on the backend `{backend}`.{exceptions}
Program and runtime have to be of the same version of ExecuTorch.

| file | what |
|---|---|
| `model.pte` | the program |
| `tokenizer.json` | the tokenizer, as ExecuTorch's runner reads it |
| `llamita_export.json` | what it was made from, and how close it came to llamita's own engine |
| others | settings, licence and use policy of the model |
{static}
{prompts} Tokens that end an answer are in the program (`get_eos_ids`).

{steps}
These steps were written from ExecuTorch's documentation and have not been run on a phone. {ran}
"""


def plain_card(packed: PackedModel, form: str, following: str, verdict: str) -> str:
    """The text for a form that needs no more than a line.

    Args:
        form, following: of `targets.Target`.
        verdict: how it compares with llamita's engine, in words.
    """
    how, _, step = following.format(out="DIRECTORY").partition(": ")
    steps = f"To use it: `{step}`." if how == "try" else f"Next: {step}."
    return f"""# {_name_of(packed)}: {form}

Made from a packed directory of llamita, whose card is `SOURCE_README.md`: that speaks of the packed
directory, this of what lies here. {steps}

Beside llamita's own engine: {verdict}.

`llamita_export.json` has the figures and the hash of every file, which `llamita verify DIRECTORY` checks.
Licence and use policy of the model lie here, where it had some.
"""


def _name_of(packed: PackedModel) -> str:
    return packed.metadata.source.name.rsplit("/", 1)[-1]
