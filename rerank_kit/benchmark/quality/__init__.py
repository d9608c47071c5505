"""How well a service ranks, measured on judgements: metrics, comparison of two runs, thresholds (docs/quality.md)."""
