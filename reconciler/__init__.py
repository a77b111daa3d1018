"""Declarative fleets of language models on Slurm: specs in git, vLLM jobs, NGINX in front."""

__version__ = "0.1.0"
