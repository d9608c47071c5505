"""Load on the running service: levels, searches, tuning, verdicts, reports."""
