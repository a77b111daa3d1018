"""One folder a situation: `fleet.yaml` and `observation.json` give `plan.txt`, read in review."""
