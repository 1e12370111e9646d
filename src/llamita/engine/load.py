"""What a scheduler tells about itself: limits, a snapshot of its work, and counters since its start."""

from dataclasses import dataclass
from typing import NamedTuple

from llamita.engine.prompt_budget import ALONE_SECONDS, BESIDE_SECONDS


@dataclass(frozen=True)
class SequenceLimits:
    """Bounds for the sequences of a scheduler.

    Attributes:
        sequences: how many run at once.
        cache_memory: bytes of keys and values, of running sequences and kept caches together. Each counts in whole
            blocks of positions, because its cache takes memory by blocks.
        prefix_memory: how many of these bytes kept caches may take.
        kv_dtype: the type of keys and values.
        context: the most tokens of a sequence.
        share_prefixes: let a sequence begin with another owner's tokens. How soon it begins then tells its owner
            whether somebody had sent such a prompt before.
        beside_seconds: the most that a step which takes in prompts should take while generations run. If those
            alone take more than two thirds of it, the step takes one and a half times what they take.
        alone_seconds: what it should take while none do.
    """

    sequences: int
    cache_memory: int
    prefix_memory: int
    kv_dtype: str
    context: int
    share_prefixes: bool = False
    beside_seconds: float = BESIDE_SECONDS
    alone_seconds: float = ALONE_SECONDS


class RunningSequence(NamedTuple):
    """A running sequence in a snapshot."""

    tokens: int  # that its cache holds
    prompt_tokens: int
    is_decoding: bool  # its prompt is taken in
    owner: str | None


@dataclass(frozen=True)
class SchedulerLoad:
    """A snapshot of a scheduler. Positions are tokens that memory is taken for, in whole blocks.

    Attributes:
        waiting: sequences that wait, paused ones among them.
        waiting_tokens: their known tokens, which are still to be computed.
        running, decoding: sequences that have a slot; those of them that are past their prompt.
        used_positions, kept_positions, room_positions: of running sequences, of kept caches, and of both at most.
        prefill_rate: prompt tokens per second of late; 0.0 before any.
        paused: sequences that gave their memory away and wait to go on.
        sequences: the running ones.
    """

    waiting: int
    waiting_tokens: int
    running: int
    decoding: int
    used_positions: int
    room_positions: int
    kept_positions: int
    prefill_rate: float
    paused: int
    sequences: tuple[RunningSequence, ...]


@dataclass
class Counters:
    """What a scheduler has done since its start.

    Attributes:
        steps: steps of the model.
        preemptions: how often a sequence was paused.
        prompt_tokens: tokens taken in for prompts, also those that a pause made necessary again.
        generated_tokens: tokens drawn.
        prefix_queries: prompt tokens that could have been found in a cache.
        prefix_hits: those that were.
    """

    steps: int = 0
    preemptions: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0
