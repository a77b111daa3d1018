"""Each known failure is brought back on purpose, and the test of its number must see it."""
