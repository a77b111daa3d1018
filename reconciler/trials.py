"""Whether a canary does worse than the rest of its model. Pure."""

from reconciler.spec import Abort
from reconciler.state import Traffic, Trial

# Nobody feels less, and on a fast model chance alone makes such differences.
LEAST_LONGER_S = 0.05


def verdict(trial: Trial, limits: Abort) -> str | None:
    """Return why a canary is to be given up, None while it does as well or too little is known."""
    canary, rest = trial.canary, trial.rest
    if min(canary.requests, rest.requests) < limits.requests:
        return None
    failing, usual = _errors_percent(canary), _errors_percent(rest)
    if failing - usual > limits.errors_percent:
        return (
            f"{canary.errors} of its {canary.requests} requests failed, "
            f"{rest.errors} of {rest.requests} elsewhere"
        )
    if canary.first_byte_s is None or rest.first_byte_s is None:
        return None
    slow, fast = canary.first_byte_s[0], rest.first_byte_s[0]
    if slow > fast * (1 + limits.first_byte_percent / 100) and slow - fast > LEAST_LONGER_S:
        return f"its median time to the first byte is {slow:.2g} s, {fast:.2g} s elsewhere"
    return None


def _errors_percent(traffic: Traffic) -> float:
    return 100 * traffic.errors / traffic.requests
