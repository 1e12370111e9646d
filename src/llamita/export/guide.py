"""Write the README.md of an export: what it is, and how to use it; for a program, how to use it on a phone."""

from llamita.export.partitioners import BACKENDS
from llamita.export.source import source_name
from llamita.models.packed import PackedModel
from llamita.text.chat_template import find_template

CARD = "README.md"
VERSION = "1.4.1"  # of ExecuTorch; program and runtime need the same
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
   `callback` is an `LlmCallback`. A released app keeps the files in its own directory, not under /data/local/tmp.

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
in ExecuTorch's runtime on the machine that made it; `llamita_export.json` has the proof."""
_HAS_NOT_RUN = """The program
itself has not run either: the runtime of `{backend}` is on the device. Try it there before you release it."""
_STATIC = """
This program takes one token at a time, as compilers for neural processors need it, and leaves activations float.
Weights are those of the packed model; the results differ from those of llamita's engine.
"""
_CHAT = """Prompts have to follow the model's chat template. With the packed model,
`python -c 'import llamita; print(llamita.load(PACKED).chat_template.render([...]))'` shows one."""
_NO_CHAT = "The model has no chat template: it continues a text."


def guide(packed: PackedModel, context: int, backend: str, exceptions: str = "") -> str:
    """Return the text for a program.

    Args:
        context: tokens of a sequence at most.
        exceptions: sentences that say how the program differs from the packed model.
    """
    prompts = _NO_CHAT if find_template(packed.path) is None else _CHAT
    is_xnnpack, is_apples = backend == "xnnpack", backend == "coreml"
    parts = [_ANDROID] * (not is_apples) + [_IOS] * (is_xnnpack or is_apples)
    steps = "\n".join(parts).format(
        version=VERSION, context=context, ios=f"backend_{backend}",
        android="" if is_xnnpack else _OWN_BUILD.format(backend=backend),
    )  # fmt: skip
    static = _STATIC if BACKENDS[backend].is_static else ""
    ran = _RAN if is_xnnpack else _HAS_NOT_RUN.format(backend=backend)
    return f"""# {source_name(packed)} for ExecuTorch {VERSION}

`model.pte` computes with the very codes and scales of the packed model that it was made from, for
sequences of up to {context} tokens, on the backend `{backend}`.{exceptions}
Program and runtime have to be of the same version of ExecuTorch.

| file | what |
|---|---|
| `model.pte` | the program |
| `tokenizer.json` | the tokenizer, as ExecuTorch's runner reads it |
| `llamita_export.json` | its source, and how close it came to llamita's own engine |
| others | settings, licence and use policy of the model |
{static}
{prompts} Tokens that end an answer are in the program (`get_eos_ids`).

{steps}
These steps were written from ExecuTorch's documentation and have not been run on a phone. {ran}
"""


def plain_card(packed: PackedModel, content: str, usage: str, verdict: str) -> str:
    """Return the text for a format that needs no more than a line.

    Args:
        content: see `targets.Target`.
        usage: a sentence that says how to use the files.
        verdict: the result of the comparison with llamita's engine, in words.
    """
    return f"""# {source_name(packed)}: {content}

Made from a packed model of llamita. `SOURCE_README.md` is the card of the packed model, this is the card of the
files here. {usage}

Compared with llamita's engine: {verdict}.

`llamita_export.json` has the figures and the hash of every file; `llamita verify DIRECTORY` checks them.
Licence and use policy of the model are here, if it had any.
"""
