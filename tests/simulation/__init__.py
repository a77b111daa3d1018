"""The whole cycle against a simulated site: Slurm, engines, gateways, disk, clock, in one time."""
