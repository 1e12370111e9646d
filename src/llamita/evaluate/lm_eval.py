"""Run the tasks of LM Eval (0.4.13) on the engine: its prompts and metrics, our logits.

The semantics are those of LM Eval's own Hugging Face backend (lm_eval/models/huggingface.py), so both give
the same numbers for the same model. Only this file imports LM Eval, and with it Torch.
"""

import json
import logging
import random
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import lm_eval
import numpy as np
from lm_eval.api.model import TemplateLM
from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED
from lm_eval.evaluator import evaluate
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from llamita.engine.llm import LLM, PREFILL_CHUNK, Options
from llamita.errors import InputError, RunError, first_line, shown
from llamita.evaluate.scores import token_losses
from llamita.system.progress import Progress

WIKITEXT = "wikitext"
DEFAULT_NEW_TOKENS = 256  # the most that LM Eval's backend generates if a task does not say
_DRAWING = ("temperature", "top_k", "top_p", "min_p")


@dataclass(frozen=True)
class TaskScores:
    """A task's results for one model: values of metrics, and those standard errors that are known."""

    task: str
    documents: int
    metrics: dict[str, float]
    errors: dict[str, float]


def run_tasks(
    models: Sequence[LLM],
    tasks: Sequence[str],
    *,
    pages: Sequence[str] | None = None,
    max_seq_len: int = 2048,
    limit: int | None = None,
    add_bos_token: bool | None = None,
    progress: Progress = None,
) -> list[list[TaskScores]]:
    """Run LM Eval's tasks with one model after the other, and return each model's scores.

    Args:
        tasks: names known to LM Eval, or paths of YAML files in its format.
        pages: score these as the task "wikitext" in place of the hub's data set.
        max_seq_len: most tokens that a model sees at a time; its context bounds it too.
        limit: use only so many documents of each task, the first ones.
        add_bos_token: see LM Eval's backend; None does what the tokenizer's files say.

    Raises:
        InputError: a task is unknown, or needs what the engine lacks.
        RunError: a task's data cannot be read.
    """
    with _local_task(pages) as folder, _quiet():
        # LM Eval reads thousands of files for its index; tasks that are files need no index.
        is_local = all((pages and name == WIKITEXT) or Path(name).is_file() for name in tasks)
        loaded = _load(TaskManager(include_path=folder, include_defaults=not is_local), tasks)
        found = []
        for llm in models:
            _set_seeds(loaded)
            model = EngineLM(llm, max_seq_len, add_bos_token, progress)
            results = _evaluate(model, loaded, limit)
            counts = {name: samples["effective"] for name, samples in results["n-samples"].items()}
            found.append([_scores(name, values, counts) for name, values in results["results"].items()])
    return found


def _evaluate(model: "EngineLM", loaded: Any, limit: int | None) -> Any:
    """Call LM Eval's `evaluate`; turn a refusal or a missing package into an error of one line."""
    try:
        return evaluate(lm=model, task_dict=loaded, limit=limit, log_samples=False)
    except ValueError as error:  # such as tasks that run code which a model wrote, or that show it pictures
        raise InputError(f"LM Eval: {first_line(error)}") from error
    except ImportError as error:
        raise RunError(f"LM Eval: a task needs a package that is missing: {first_line(error)}") from error


def wikitext_pages() -> list[str]:
    """Return the pages of LM Eval's wikitext task from the hub or its cache; raise RunError without either."""
    with _quiet():
        task = _load(TaskManager(), [WIKITEXT])["tasks"][WIKITEXT]
        return [document["page"] for document in task.test_docs()]


class EngineLM(TemplateLM):
    """The engine as LM Eval's model: log-likelihoods of texts, and greedy or drawn continuations."""

    def __init__(
        self, llm: LLM, max_seq_len: int, add_bos_token: bool | None = None, progress: Progress = None
    ) -> None:
        super().__init__()
        self._llm = llm
        self._tokens = llm.tokenizer
        self._add_bos = add_bos_token
        self._progress = progress
        self.max_length = min(max_seq_len, llm.context)
        self._scorer = _Scorer(llm, self.max_length)
        if not self._tokens.eos_token_ids:
            raise InputError(f"{llm.path}: eos_token", "one, which LM Eval needs", "none")

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return self._tokens.eos_token_ids[0]

    @property
    def prefix_token_id(self) -> int:
        """The token before a text that nothing precedes: BOS, or EOS in a model without BOS."""
        bos = self._tokens.bos_token_id
        return self.eot_token_id if bos is None else bos

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Return token ids; do not double a BOS that the string begins with."""
        wanted = self._add_bos if add_special_tokens is None else add_special_tokens
        return self._tokens.encode(string, add_bos=wanted)

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """Return log P of each continuation after its context, and whether greedy decoding would give it."""
        return super().loglikelihood(requests, disable_tqdm=True)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> list[float]:
        """Return log P of whole texts, each in windows that do not overlap.

        The first window follows the prefix token; every other one follows a single token of the text.
        """
        windows: list[Any] = []
        owners: list[int] = []
        for owner, request in enumerate(requests):
            (text,) = request.args
            rolling = get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            windows += [(("", ""), *make_disjoint_window(pair)) for pair in rolling]
            owners += [owner] * (len(windows) - len(owners))
        totals = [0.0] * len(requests)
        for owner, (value, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[owner] += value
        return totals

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Score continuations: cut too long a context from the left, run prompts that begin alike in sequence."""
        jobs = []
        for i, (_, context, continuation) in enumerate(requests):
            if not 0 < len(continuation) <= self.max_length:
                raise InputError(
                    "LM Eval",
                    f"continuations of 1 to {self.max_length} tokens",
                    f"{len(continuation)}",
                    "try a larger --max-seq-len",
                )
            jobs.append(((context + continuation)[-(self.max_length + 1) :], len(continuation), i))
        results = [(0.0, False)] * len(jobs)
        for done, (tokens, count, i) in enumerate(sorted(jobs), start=1):
            results[i] = self._scorer.score(tokens, count)
            self._report("LM Eval: scoring", done, len(jobs))
        return results

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
        """Return continuations of (context, settings), cut before the first stop string."""
        texts = []
        for request in requests:
            context, settings = request.args
            texts.append(self._generate(context, settings))
            self._report("LM Eval: generating", len(texts), len(requests))
        return texts

    def _generate(self, context: str, settings: dict[str, Any]) -> str:
        options = normalize_gen_kwargs(settings, DEFAULT_NEW_TOKENS)
        end = self._tokens.decode([self.eot_token_id], skip_special=False)
        until = [text for text in handle_stop_sequences(options.pop("until"), eos=end) if text]
        count = options.pop("max_gen_toks")
        if count >= self.max_length:
            raise InputError(
                "LM Eval: max_gen_toks", f"below {self.max_length}", f"{count}", "try a larger --max-seq-len"
            )
        ids = self.tok_encode(context)[-(self.max_length - count) :]
        generation = self._llm.generate(ids, **_engine_options(options, count, until))
        return postprocess_generated_text(self._tokens.decode(generation.token_ids), until, None)

    def _report(self, what: str, done: int, total: int) -> None:
        if self._progress:
            self._progress(what, done, total)


class _Scorer:
    """Score continuations one after the other; do not run again what a text shares with the one before.

    The engine's logits do not depend on how a text is cut into steps, so this changes no number.
    """

    def __init__(self, llm: LLM, max_length: int) -> None:
        self._llm = llm
        self._done = np.empty(0, dtype=np.int32)
        self._cache = llm.new_sequence(max_length)

    def score(self, tokens: Sequence[int], count: int) -> tuple[float, bool]:
        """Return log P of the last `count` tokens after those before, and whether each is the likeliest."""
        ids = self._llm.check_ids(np.array(tokens[:-1]))
        targets = np.array(tokens[-count:])
        first = len(ids) - count  # the first row that predicts a target
        start = self._resume(ids, first)
        logprobs: list[float] = []
        greedy = True
        for begin in range(start, len(ids), PREFILL_CHUNK):
            part = ids[begin : begin + PREFILL_CHUNK]
            rows = np.arange(max(0, first - begin), len(part))
            logits = self._llm.model.step([(self._cache, part)], rows)  # (rows, vocab)
            if len(rows):
                wanted = targets[begin + rows[0] - first :][: len(rows)]
                logprobs += (-token_losses(logits, wanted)).tolist()
                greedy = greedy and bool((logits.argmax(axis=1) == wanted).all())
        self._done = ids
        total = sum(logprobs)  # as LM Eval adds up what a server sends: equal to the last bit
        if not np.isfinite(total):
            raise RunError(f"{self._llm.path}: logits", "finite numbers", "NaN or infinity")
        return total, greedy

    def _resume(self, ids: np.ndarray, first: int) -> int:
        """Keep what is common with the text before, up to row `first`; return the position to continue from."""
        if self._llm.config.rope.depends_on_length:
            self._cache = self._llm.new_sequence(len(ids))
            return 0
        shared = min(len(self._done), first)
        differs = np.flatnonzero(self._done[:shared] != ids[:shared])
        self._cache.length = int(differs[0]) if len(differs) else shared
        return self._cache.length


def _engine_options(options: Any, count: int, until: list[str]) -> Options:
    """Translate a task's generation settings into the engine's; refuse what the engine lacks."""
    settings = dict(options)
    result: Options = {"max_tokens": count, "stop": until}
    if settings.pop("do_sample"):
        result["seed"] = DEFAULT_OTHER_SEED
    else:  # a task may still name a temperature; LM Eval's backend drops it too
        result["greedy"] = True
        settings = {key: value for key, value in settings.items() if key not in _DRAWING}
    unknown = settings.keys() - {*_DRAWING, "repetition_penalty"}
    if unknown:
        known = ", ".join([*_DRAWING, "repetition_penalty"])
        raise InputError("LM Eval: generation_kwargs", known, shown(min(unknown)))
    result.update(settings)  # type: ignore[typeddict-item]
    return result


@contextmanager
def _local_task(pages: Sequence[str] | None) -> Iterator[str | None]:
    """Yield a folder with LM Eval's own wikitext task, its detokenizer and metrics, over these pages."""
    if pages is None:
        yield None
        return
    original = Path(str(lm_eval.__file__)).parent / "tasks" / "wikitext" / "wikitext.yaml"
    with tempfile.TemporaryDirectory(prefix="llamita-") as folder:
        data = Path(folder) / "pages.jsonl"
        data.write_text("".join(json.dumps({"page": page}) + "\n" for page in pages), "utf-8")
        task = {
            "include": str(original),
            "task": WIKITEXT,  # it takes the place of the original
            "dataset_path": "json",
            "dataset_name": None,
            "dataset_kwargs": {"data_files": {"test": str(data)}, "cache_dir": str(Path(folder) / "cache")},
            "training_split": None,
            "validation_split": None,
        }
        (Path(folder) / "wikitext.yaml").write_text(json.dumps(task), "utf-8")  # JSON is YAML
        yield folder


def _load(manager: TaskManager, names: Sequence[str]) -> Any:
    """Return the tasks as LM Eval's `evaluate` takes them, with their data loaded."""
    for name in names:
        if name not in manager.task_index and not Path(name).is_file():
            raise InputError("--tasks", "a task of LM Eval", shown(name), "try `lm_eval ls tasks`")
    try:
        return manager.load(list(names))
    except Exception as error:  # whatever the data set's loader, the hub's client or the network raise
        hint = "try --wikitext FILE with a local wiki.test.raw" if WIKITEXT in names else None
        raise RunError(f"--tasks {','.join(names)}: cannot be loaded: {first_line(error)}", hint=hint) from error


def _set_seeds(loaded: Any) -> None:
    """Do what LM Eval's `simple_evaluate` does before `evaluate`, its reports on the machine aside."""
    random.seed(DEFAULT_RANDOM_SEED)
    np.random.seed(DEFAULT_OTHER_SEED)
    for task in loaded["tasks"].values():
        if task.get_config("num_fewshot") is None:
            task.set_config("num_fewshot", 0)
        task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence LM Eval's remarks on its own tasks; its errors are raised, not logged."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        logger.setLevel(level)
        datasets.enable_progress_bars()


def _scores(name: str, values: Any, counts: dict[str, int]) -> TaskScores:
    """Read scores from LM Eval's "metric,filter" keys; leave out the filter's name if it is "none"."""
    metrics, errors = {}, {}
    for key, value in values.items():
        metric, _, chosen = key.partition(",")
        if not chosen or not isinstance(value, int | float):
            continue  # alias, sample_len and the like; a standard error that is "N/A"
        is_error, label = metric.endswith("_stderr"), metric.removesuffix("_stderr")
        label = label if chosen == "none" else f"{label} ({chosen})"
        (errors if is_error else metrics)[label] = float(value)
    documents = counts.get(name, int(values.get("sample_len", 0)))
    return TaskScores(name, documents, metrics, errors)
