"""Rules that hold for every spec and every observation, tried on generated ones."""

from hypothesis import HealthCheck, settings

# The same examples in every run: a test that fails must fail again. None is timed, as machines
# are shared.
settings.register_profile(
    "property",
    derandomize=True,
    deadline=None,
    max_examples=100,
    suppress_health_check=[HealthCheck.too_slow],
)
