"""Measure what AVX-512 VNNI could do where AMX runs, and check that AMX's tiles keep what is in them."""

from llamita import _native
from llamita.errors import RunError

VNNI = "avx512vnni"
_CHECK_SECONDS = 0.05


def vnni_rate() -> float | None:
    """Return VNNI's int8 multiply-adds per second, the limit without AMX; None where AMX does not run.

    Raises:
        RunError: a product by tiles was wrong, as in virtual machines that lose tiles when a thread is interrupted.
    """
    isa = _native.isa()
    if not isa.startswith("amx"):
        return None
    rounds, wrong = _native.check_products(isa, _CHECK_SECONDS, 2 * _native.threads())
    if wrong:
        raise RunError(
            isa, "the same products as without tiles", f"{wrong} of {rounds} wrong", f"try LLAMITA_ISA={VNNI}"
        )
    return _native.int8_rate(VNNI) * 1e9
