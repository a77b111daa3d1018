"""The lab: a real Slurm cluster of several hosts, with its gateway, on this machine."""

from tests.lab.base import base, in_base
from tests.lab.lab import Lab, running
from tests.lab.wait import LabError, wait_for

__all__ = ["Lab", "LabError", "base", "in_base", "running", "wait_for"]
