"""Counters for Prometheus. Names are vLLM's where they mean the same, with `llamita_` in front."""

from collections.abc import Iterable, Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from llamita.engine.llm import LLM
from llamita.engine.requests import Generation

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class Metrics:
    """The counters of one server.

    Args:
        llms: the loaded models by name; gauges read their schedulers when they are asked.
    """

    def __init__(self, llms: Mapping[str, LLM]) -> None:
        self._registry = registry = CollectorRegistry()
        registry.register(_Schedulers(llms))
        self._prompt = Counter("llamita_prompt_tokens", "Prompt tokens of finished answers", registry=registry)
        self._generated = Counter("llamita_generation_tokens", "Tokens of finished answers", registry=registry)
        self._cached = Counter(
            "llamita_prompt_tokens_cached", "Prompt tokens that were not computed", registry=registry
        )
        self._ends = Counter("llamita_request_success", "Answers by their end", ["finished_reason"], registry=registry)
        self._requests = Counter("llamita_http_requests", "HTTP requests", ["status"], registry=registry)
        self._first = self._histogram("llamita_time_to_first_token_seconds", "From a request to its first token")
        self._gap = self._histogram("llamita_inter_token_latency_seconds", "Between two updates of a request")
        self._whole = self._histogram("llamita_e2e_request_latency_seconds", "From a request to its end")
        self._queue = self._histogram("llamita_request_queue_time_seconds", "From a request to its first step")

    def _histogram(self, name: str, text: str) -> Histogram:
        return Histogram(name, text, buckets=_SECONDS, registry=self._registry)

    def note_first(self, seconds: float) -> None:
        """Count the time to a first token."""
        self._first.observe(seconds)

    def note_gap(self, seconds: float) -> None:
        """Count the time between two updates."""
        self._gap.observe(seconds)

    def note_generation(self, generation: Generation) -> None:
        """Count a finished answer."""
        timings = generation.timings
        self._prompt.inc(timings.prompt_tokens)
        self._cached.inc(timings.reused_tokens)
        self._generated.inc(timings.generated_tokens)
        self._queue.observe(timings.queue_seconds)
        self._ends.labels(generation.finish_reason).inc()

    def note_end(self, seconds: float, stopped: int) -> None:
        """Count the end of a request, and its answers that were stopped before theirs."""
        self._whole.observe(seconds)
        self._ends.labels("abort").inc(stopped)

    def note_response(self, status: int) -> None:
        """Count an HTTP answer."""
        self._requests.labels(str(status)).inc()

    def render(self) -> bytes:
        """Return all counters in Prometheus' text form."""
        return generate_latest(self._registry)


class _Schedulers(Collector):
    """Reads the schedulers of all models."""

    def __init__(self, llms: Mapping[str, LLM]) -> None:
        self._llms = llms

    def collect(self) -> Iterator[Metric]:
        """Yield gauges and counters, each with one sample for every model."""
        schedulers = {name: llm.scheduler for name, llm in self._llms.items()}
        loads = {name: scheduler.load for name, scheduler in schedulers.items()}
        done = [scheduler.counters for scheduler in schedulers.values()]

        def gauge(name: str, text: str, values: Iterable[float]) -> Metric:
            family = GaugeMetricFamily(f"llamita_{name}", text, labels=["model_name"])
            for model, value in zip(loads, values, strict=True):
                family.add_metric([model], value)
            return family

        def counter(name: str, text: str, values: Iterable[float]) -> Metric:
            family = CounterMetricFamily(f"llamita_{name}", text, labels=["model_name"])
            for model, value in zip(loads, values, strict=True):
                family.add_metric([model], value)
            return family

        every = loads.values()
        yield gauge("num_requests_running", "Answers that run", (load.running for load in every))
        yield gauge("num_requests_waiting", "Answers that wait", (load.waiting for load in every))
        yield gauge("kv_cache_usage_perc", "Share of the memory for keys and values in use, 0 to 1", (
            (load.used_positions + load.kept_positions) / max(1, load.room_positions) for load in every
        ))  # fmt: skip
        yield counter("prefix_cache_queries", "Prompt tokens that were looked for", (c.prefix_queries for c in done))
        yield counter("prefix_cache_hits", "Prompt tokens that were found", (c.prefix_hits for c in done))
        yield counter("num_preemptions", "Answers that gave way for a time", (c.preemptions for c in done))
        yield counter("steps", "Steps of the model", (c.steps for c in done))
