"""The map of the tree that `test_architecture.py` holds: what may import what.

A module imports modules of lower layers, and of its own layer those that SIBLINGS names. A registry's
entry, "module:function", is imported on use and is no import in this sense.
"""

LAYERS: tuple[tuple[str, ...], ...] = (
    # 0: plain values
    ("errors", "scheme", "config", "rotations"),
    # 1: arithmetic and bytes
    ("_native", "threads", "tensorfile", "packing", "affine", "console", "files", "hub",
     "statistics", "wikitext", "shapes", "machine", "charts", "hub_texts", "processes", "optional",
     "hadamard"),
    # 2: models on disk
    ("checkpoint", "packed", "packed_writer", "staging", "resume", "card", "tokenizer",
     "random_weights", "mixed", "transformed"),
    # 3: how codes and scales are chosen
    ("methods.settings", "methods.setup", "methods.chain", "methods.rtn", "methods.energy",
     "methods.fakequant", "methods.trained", "methods.blocks",
     "methods.streams", "methods.calibrated", "methods.gptq",
     "methods.qronos", "methods.ranks", "methods.online", "methods.equalize",
     "methods.spinquant", "methods.learn_rotations", "methods.tune"),
    # 4: the pipeline; the forward pass
    ("sizes", "quantize", "chat", "engine.adaptors", "engine.cache", "engine.sampler", "engine.stops",
     "engine.weights",
     "engine.model", "engine.prefixes", "engine.speculation", "engine.requests",
     "engine.scheduler", "engine.llm"),
    # 5: questions about models
    ("calibration", "evaluate", "baseline", "compare_layers", "compare", "compare_report",
     "harness", "plan", "verify", "work", "speed", "bench_report", "bench_worker", "bench",
     "plot", "own_text", "needs", "methods.auto",
     "train.records", "train.tasks", "train.examples", "train.recipe", "train.preferences", "train.data",
     "train.order", "train.fake_quant", "train.prepare", "train.objective", "train.batches",
     "train.sharding", "train.trainer", "train.start", "train.preference_trainer", "train.finetune",
     "train.save", "train.measures", "train.run"),
    # 6: one file a command
    ("commands.quantize", "commands.evaluate", "commands.compare", "commands.generate",
     "commands.chat", "commands.inspect", "commands.verify", "commands.plan", "commands.bench",
     "commands.selection", "commands.finetune", "commands.options"),
    # 7: names of commands
    ("cli", "__main__"),
)  # fmt: skip

SIBLINGS: dict[str, tuple[str, ...]] = {
    "scheme": ("errors",),
    "config": ("errors",),
    "threads": ("_native",),
    "tensorfile": ("files",),
    "hub": ("files",),
    "packed": ("checkpoint",),
    "packed_writer": ("checkpoint", "packed"),
    "methods.chain": ("methods.settings", "methods.setup"),
    "methods.rtn": ("methods.energy",),
    "methods.blocks": ("methods.rtn",),
    "methods.calibrated": ("methods.blocks", "methods.energy", "methods.fakequant", "methods.rtn",
     "methods.setup",
     "methods.streams", "methods.ranks", "methods.online"),
    "methods.streams": ("methods.setup",),
    "methods.gptq": ("methods.calibrated", "methods.rtn", "methods.settings"),
    "methods.qronos": ("methods.calibrated", "methods.gptq", "methods.settings"),
    "quantize": ("sizes",),
    "engine.cache": ("engine.adaptors",),
    "engine.model": ("engine.adaptors", "engine.cache", "engine.weights"),
    "engine.llm": ("chat", "quantize", "engine.adaptors", "engine.cache", "engine.model", "engine.prefixes",
     "engine.requests",
     "engine.sampler", "engine.scheduler", "engine.weights"),
    "engine.prefixes": ("engine.adaptors", "engine.cache"),
    "engine.requests": ("chat", "engine.adaptors", "engine.sampler", "engine.stops"),
    "engine.scheduler": ("engine.cache", "engine.model", "engine.prefixes", "engine.requests",
     "engine.sampler",
     "engine.speculation"),
    "charts": ("console",),
    "baseline": ("evaluate",),
    "compare_layers": ("evaluate",),
    "compare": ("compare_layers", "evaluate"),
    "compare_report": ("compare", "compare_layers"),
    "harness": ("evaluate",),
    "random_weights": ("checkpoint", "packed"),
    "plan": ("work",),
    "bench_report": ("work",),
    "bench_worker": ("plan", "speed", "work"),
    "bench": ("bench_report", "bench_worker", "work"),
    "plot": ("bench_report", "work"),
    "commands.chat": ("commands.generate",),
    "commands.compare": ("commands.evaluate", "commands.generate"),
    "calibration": ("own_text",),
    "__main__": ("cli",),
    "rotations": ("errors",),
    "processes": ("_native",),
    "mixed": ("checkpoint",),
    "commands.quantize": ("commands.options", "commands.selection"),
    "commands.finetune": ("commands.options",),
    "transformed": ("checkpoint",),
    "methods.equalize": ("methods.energy", "methods.settings", "methods.setup"),
    "methods.spinquant": ("methods.settings", "methods.setup"),
    "methods.learn_rotations": ("methods.blocks", "methods.online", "methods.ranks", "methods.settings",
     "methods.setup", "methods.spinquant"),
    "methods.tune": ("methods.blocks", "methods.calibrated", "methods.settings", "methods.setup"),
    "methods.trained": ("methods.energy", "methods.rtn"),
    "train.tasks": ("train.records",),
    "train.examples": ("train.tasks",),
    "train.prepare": ("train.fake_quant",),
    "train.objective": ("train.examples",),
    "train.batches": ("train.examples",),
    "train.trainer": ("train.batches", "train.examples", "train.fake_quant", "train.objective",
     "train.recipe", "train.sharding"),
    "train.save": ("train.fake_quant",),
    "train.preferences": ("train.examples", "train.records", "train.tasks"),
    "train.preference_trainer": ("train.examples", "train.preferences"),
    "train.data": ("train.examples", "train.preferences", "train.recipe", "train.records", "train.tasks"),
    "train.measures": ("evaluate", "train.examples", "train.tasks"),
    "train.order": ("train.data", "train.recipe"),
    "train.run": ("train.measures", "train.finetune", "train.order", "train.recipe", "train.save"),
    "train.finetune": ("train.batches", "train.examples", "train.fake_quant", "train.preference_trainer",
     "train.preferences", "train.prepare", "train.recipe", "train.save", "train.sharding", "train.start",
     "train.trainer"),
}  # fmt: skip

# The one file each may be imported in; everything else on the lean side makes do with LEAN.
LEAN = ("numpy", "tokenizers", "jinja2", "typer", "rich", "huggingface_hub", "yaml")
ONLY_IN: dict[str, tuple[str, ...]] = {
    "tokenizers": ("tokenizer",),
    "jinja2": ("chat",),
    "huggingface_hub": ("hub",),
    "rich": ("console",),
    "yaml": ("train.recipe",),
    "matplotlib": ("plot",),
}
TORCH_SIDE = {
    "harness": ("lm_eval", "datasets"),
    "methods.fakequant": ("torch",),
    "methods.blocks": ("torch", "transformers"),
    "methods.streams": ("torch",),
    "methods.calibrated": ("torch",),
    "methods.gptq": ("torch",),
    "methods.qronos": ("torch",),
    "hub_texts": ("datasets",),
    "methods.ranks": ("torch",),
    "methods.online": ("torch",),
    "methods.learn_rotations": ("torch", "accelerate"),
    "methods.tune": ("torch",),
    "train.fake_quant": ("torch",),
    "train.prepare": ("torch",),
    "train.objective": ("torch",),
    "train.batches": ("torch", "datasets"),
    "train.sharding": ("torch", "transformers", "safetensors"),
    "train.trainer": ("torch", "transformers", "trl"),
    "train.preference_trainer": ("torch", "datasets", "transformers", "trl"),
    "train.save": ("torch", "safetensors"),
    "train.run": (),
    "train.measures": ("sacrebleu", "rouge_score"),
    "train.finetune": ("torch", "transformers", "peft"),
}  # fmt: skip
EXTRAS = {"plot": ("matplotlib",)}  # lean, but with a package that only an extra installs
TORCH_PACKAGES = (
    "torch", "torchao", "transformers", "lm_eval", "datasets", "accelerate", "peft", "trl", "executorch",
    "compressed_tensors", "evaluate", "sacrebleu", "rouge_score",
)  # fmt: skip

# Imports inside functions, each with its reason.
NESTED: dict[str, str] = {}
