"""Measure what bf16 inputs of float layers cost: KL divergence from float32 math, beside that of 4-bit weights.

python benchmarks/float_math.py [MODEL] [--text FILE] [--chunks N]

MODEL has BF16 weights, and the processor AVX-512 BF16.
"""

from kl_table import PRESET, parser, print_table

import llamita
from llamita.engine.weights import FLOAT_MATHS
from llamita.evaluate.scores import Contender


def main() -> None:
    """Print the table."""
    made = parser(__doc__)
    arguments = made.parse_args()
    settings = [(None, math) for math in FLOAT_MATHS] + [(PRESET, FLOAT_MATHS[0])]
    contenders = []
    for i, (preset, math) in enumerate(settings):
        llm = llamita.load(arguments.model, scheme=preset, float_math=math, kv_dtype="f32")
        if llm.float_math != math:
            made.error(f"expected BF16 weights and a processor that multiplies them, got {llm.float_math} math")
        contenders.append(Contender(f"{preset or 'float'} | {math}", llm, i == 0))
    print_table(arguments, contenders, "float math", 6)


if __name__ == "__main__":
    main()
